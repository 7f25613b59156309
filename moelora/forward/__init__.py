"""What happens in one forward pass: its state, hooks, checkpoints, linears that share an input, and the loss."""

from .hooks import BlockHook, ForwardHook

__all__ = ["BlockHook", "ForwardHook"]
