"""The transformer blocks of vLLM whose routing is known to be right: an allow-list.

A router reads what enters its block. vLLM hands a block that as one tensor or as two that are still to be added, and
some blocks take a `residual` that they ignore; a wrong guess would serve wrong answers without a word. So a class is
listed here once a test has compared it with transformers: tests/serving/test_architectures.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

_MODELS = "vllm.model_executor.models"
_TRANSFORMERS = "transformers.models"

# Whether what enters is `hidden_states + residual`; else it is `hidden_states`.
IS_SPLIT = {
    f"{_MODELS}.llama.LlamaDecoderLayer": True,  # Phi-3 too
    f"{_MODELS}.mistral.MistralDecoderLayer": True,
    f"{_MODELS}.qwen2.Qwen2DecoderLayer": True,
    f"{_MODELS}.qwen3.Qwen3DecoderLayer": True,
    f"{_MODELS}.gemma2.Gemma2DecoderLayer": True,
    f"{_MODELS}.gemma3.Gemma3DecoderLayer": True,
    f"{_MODELS}.granite.GraniteDecoderLayer": False,
    f"{_MODELS}.mixtral.MixtralDecoderLayer": True,
    f"{_MODELS}.qwen3_moe.Qwen3MoeDecoderLayer": True,
    f"{_MODELS}.gpt_oss.TransformerBlock": True,
    # Served by vLLM with the code of transformers.
    f"{_TRANSFORMERS}.olmo2.modeling_olmo2.Olmo2DecoderLayer": False,
    f"{_TRANSFORMERS}.smollm3.modeling_smollm3.SmolLM3DecoderLayer": False,
}


def class_name(module: nn.Module) -> str:
    """As the list has it."""
    return f"{type(module).__module__}.{type(module).__name__}"


def adapted_blocks(model: nn.Module, linears: Iterable[str]) -> dict[str, nn.Module]:
    """The transformer blocks that hold any of these linears, listed or not, in the order of the model's modules.

    A block is what stands in an nn.ModuleList; of those within one another (native experts are lists too), the outer.
    """
    prefixes = {name[: end + 1] for name in linears for end, letter in enumerate(name) if letter == "."}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parent, _, _ = name.rpartition(".")
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if f"{name}." in prefixes and not is_inner and isinstance(model.get_submodule(parent), nn.ModuleList):
            found[name] = module
    return found


@dataclass(frozen=True)
class BlockInput:
    """Where a block finds what enters it among the arguments of its forward.

    Example:
        >>> class Block(nn.Module):
        ...     def forward(self, positions, hidden_states, residual): ...
        >>> BlockInput.of(Block(), is_split=True)
        BlockInput(hidden_at=1, residual_at=2)
    """

    hidden_at: int
    residual_at: int | None

    @classmethod
    def of(cls, block: nn.Module, is_split: bool) -> BlockInput:
        """That of a block.

        Raises:
            ValueError: its forward does not call its arguments so; vLLM's are of another version.
        """
        names = list(inspect.signature(block.forward).parameters)
        if "hidden_states" not in names or (is_split and "residual" not in names):
            raise ValueError(f"{class_name(block)}: its forward has no such arguments among {', '.join(names)}")
        return cls(names.index("hidden_states"), names.index("residual") if is_split else None)

    def find(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | None]:
        """The two tensors [T, H] of which it is the sum; of the first block, one."""
        hidden = args[self.hidden_at] if self.hidden_at < len(args) else kwargs["hidden_states"]
        if hidden.dim() == 3:
            hidden = hidden.flatten(0, 1)  # [1, T, H] where vLLM runs the code of transformers
        if self.residual_at is None:
            return hidden, None
        return hidden, args[self.residual_at] if self.residual_at < len(args) else kwargs.get("residual")
