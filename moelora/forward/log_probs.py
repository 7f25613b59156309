"""How likely a model takes a prompt's tokens to be: what a reader of it sees, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch import nn


@torch.no_grad()
def log_probs(model: nn.Module, token_ids: Sequence[int]) -> list[float]:
    """[S - 1] log-probability in nats of each token after the first, from one forward of the prompt alone.

    Args:
        model: a causal language model in evaluation mode.
        token_ids: [S], on no device.
    """
    device = next(model.parameters()).device
    ids_1S = torch.tensor([list(token_ids)], device=device)
    logits_SV = model(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S)).logits[0, :-1].float()
    return logits_SV.log_softmax(dim=-1).gather(1, ids_1S[0, 1:, None])[:, 0].tolist()


def with_and_without(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    without: Callable[[], AbstractContextManager[None]] | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """[`log_probs`] of each prompt with the adapter and without it, both in evaluation mode.

    Args:
        without: within it the adapter is switched off; PEFT's `disable_adapter` by default.
    """
    with _evaluating(model):
        adapted = [log_probs(model, ids) for ids in prompts]
        with (without or model.disable_adapter)():
            base = [log_probs(model, ids) for ids in prompts]
    return adapted, base


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
