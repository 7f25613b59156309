"""Some of a task's training rows read once more, before or after they are learned.

Letters: N rows, B rows of a batch, D in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..quality.batches import Batches
from ..quality.trainer import autocast
from .learner import Setting, lora_factors

ROWS = 256  # enough to estimate what a task's inputs span, or which parameters its answers need
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # reads what the other reads


def some_rows(setting: Setting, stage: int) -> Batches:
    """ceil(min(N, ROWS) / B) batches of a task; where that is all of them and no multiple of B, the last one begins
    anew."""
    rows = setting.plan.rows
    return setting.batches([stage], steps=-(-min(ROWS, len(setting.tasks[stage].examples["train"])) // rows))


def reader(name: str) -> str:
    """The linear in whose name the inputs of this one are kept.

    Example:
        >>> reader("layers.0.self_attn.v_proj")
        'layers.0.self_attn.q_proj'
    """
    parent, _, last = name.rpartition(".")
    return f"{parent}.{SAME_INPUT.get(last, last)}"


@torch.no_grad()
def input_covariances(model: nn.Module, batches: Batches, device: str) -> dict[str, Tensor]:
    """``sum_x x x^T`` over the inputs x of all tokens, [D, D] in float64, by the linear that reads them (`reader`)."""
    model.eval()
    covariances: dict[str, Tensor] = {}
    mask = None

    def add(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0][mask].float()
        with torch.autocast(device, enabled=False):  # the products themselves are not to be in bfloat16
            covariances[name] = covariances.get(name, 0) + (x.T @ x).double()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(add, name))
        for name in lora_factors(model)
        if reader(name) == name
    ]
    for step in range(len(batches)):
        ids, _, mask = batches.batch(step)
        with autocast(device):
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return covariances
