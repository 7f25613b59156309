"""What a run writes beside its adapter for `moelora verify`: prompts from held-out texts, scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from transformers import Trainer

from ..console import is_main_process
from ..data.preparation import DomainBlocks
from ..forward.log_probs import with_and_without
from ..storage.references import MOST_PROMPTS, MOST_TOKENS, pair_up, write_or_tell


def keep_references(
    trainer: Trainer,
    domains: Sequence[DomainBlocks],
    base_model: str,
    folder: Path,
    without: Callable[[], AbstractContextManager[None]],
) -> None:
    """Write what the trained model makes of some held-out texts; every process of a run computes, the first writes.

    Args:
        folder: holds the adapter as it was just saved.
        without: within it the model is the base model.
    """
    prompts = choose_prompts(domains)
    adapted, base = with_and_without(trainer.model, prompts, without)
    if is_main_process:
        write_or_tell(folder, base_model, _precision(trainer), pair_up(prompts, adapted, base))


def choose_prompts(domains: Sequence[DomainBlocks]) -> list[list[int]]:
    """The starts of held-out blocks, of each domain in turn."""
    deepest = max(len(domain.held_out) for domain in domains)
    blocks = (domain.held_out[row] for row in range(deepest) for domain in domains if row < len(domain.held_out))
    return [list(block["input_ids"][:MOST_TOKENS]) for block, _ in zip(blocks, range(MOST_PROMPTS), strict=False)]


def _precision(trainer: Trainer) -> str:
    """What the model computes in: that of autocast, where the run uses it, else of the frozen weights."""
    autocast = {"bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}  # of the recipe or of the launcher
    own = str(trainer.model.get_base_model().dtype).removeprefix("torch.")
    return autocast.get(trainer.accelerator.mixed_precision, own)
