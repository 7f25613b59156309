"""One forward pass: its state, hooks, gradient checkpoints, linears that share an input, and the loss."""

from .hooks import BlockHook, ForwardHook

__all__ = ["BlockHook", "ForwardHook"]
