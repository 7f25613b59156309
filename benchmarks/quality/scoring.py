"""How good a model is on one domain or task.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORED, Examples
from .trainer import autocast, logits_kept

ROWS = 96  # of one forward


@dataclass(frozen=True)
class Score:
    """loss: mean over predicted tokens; accuracy: share of right answers, None in language modelling."""

    loss: float
    accuracy: float | None = None


@torch.no_grad()
def score(model: nn.Module, examples: Examples, device: str, mixed: bool = True, rows: int = ROWS) -> Score:
    """Evaluate on all rows, so many at a time, as it was trained: under autocast if `mixed`.

    An answer is right where it is the likeliest of its task's choices; without choices, where every token of it, the
    end included, is the likeliest given those before: exactly when greedy decoding writes it.
    """
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = torch.zeros((), dtype=torch.int64, device=device)
    num_right = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(examples), rows):
        ids, labels = (torch.from_numpy(a[start : start + rows]).to(device) for a in (examples.ids, examples.labels))
        mask = None if examples.mask is None else torch.from_numpy(examples.mask[start : start + rows]).to(device)
        with autocast(device) if mixed else nullcontext():
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **logits_kept(ids, labels))
        logits = output.logits[:, :-1]
        targets = labels[:, 1:]
        for part, answers in zip(logits.split(16), targets.split(16), strict=True):  # float32 logits are large
            total += F.cross_entropy(part.float().flatten(0, 1), answers.flatten(), reduction="sum")
        num_targets += (targets != IGNORED).sum()
        if mask is not None:
            num_right += _right(logits, targets, examples.choices).sum()
    accuracy = num_right.item() / len(examples) if examples.mask is not None else None
    return Score((total / num_targets).item(), accuracy)


def _right(logits: Tensor, targets: Tensor, choices: tuple[int, ...]) -> Tensor:
    """[B] bool for logits [B, S, V] and targets [B, S]."""
    is_answer = targets != IGNORED
    if not choices:
        return ((logits.argmax(dim=-1) == targets) | ~is_answer).all(dim=-1)
    first = is_answer.int().argmax(dim=-1)  # of the first True
    rows = torch.arange(len(targets), device=targets.device)
    candidates = torch.tensor(choices, device=targets.device)
    chosen = candidates[logits[rows, first][:, candidates].argmax(dim=-1)]
    return chosen == targets[rows, first]
