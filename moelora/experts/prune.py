"""Remove the experts that are used least, are worth least, or are most like another.

One expert at a time: what is left is measured anew, for of two experts that say the same each is worth nothing while
the other is there. Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from peft import PeftModel

from ..report.analysis import geometry_of
from .evaluation import Evaluation, Texts
from .parts import names_of, put_together, select, take_apart


@dataclass(frozen=True)
class Removal:
    """An expert that goes: its number and adapter in the mixture before pruning, and why."""

    number: int
    adapter: str
    reason: str


@dataclass(frozen=True)
class Pruned:
    """The smaller mixture, what went in which order, and what both lose on the texts."""

    model: PeftModel
    removals: list[Removal]
    before: Evaluation
    after: Evaluation


def prune(model: PeftModel, texts: Texts, by: str, keep: int) -> Pruned:
    """Remove experts until `keep` are left.

    Args:
        model: the mixture; it loses its adapters to the result.
        by: a key of CRITERIA.

    Raises:
        ValueError: keep is not between 1 and the number of experts less one, or a router is attached.
    """
    names = names_of(take_apart(model))
    if not 1 <= keep < len(names):
        raise ValueError(
            f"`keep` ({keep}) must be between 1 and {len(names) - 1}: the mixture has {len(names)} experts"
        )
    numbers = list(range(len(names)))
    before = evaluation = texts.read(model)
    removals = []
    while len(numbers) > keep:
        place, reason = CRITERIA[by](model, texts, evaluation, numbers)
        removals.append(Removal(numbers[place], names[numbers[place]], reason))
        model = put_together(model, select(take_apart(model), [i for i in range(len(numbers)) if i != place]))
        del numbers[place]
        evaluation = texts.read(model)
    return Pruned(model, removals, before, evaluation)


def drop(model: PeftModel, texts: Texts, numbers: Sequence[int]) -> Pruned:
    """Remove the experts of these numbers.

    Raises:
        ValueError: none would be left, or a router is attached.
    """
    adapters = take_apart(model)
    names = names_of(adapters)
    kept = select(adapters, [i for i in range(len(names)) if i not in numbers])
    before = texts.read(model)
    model = put_together(model, kept)
    return Pruned(model, [Removal(i, names[i], "named by --drop") for i in numbers], before, texts.read(model))


Criterion = Callable[[PeftModel, Texts, Evaluation, Sequence[int]], tuple[int, str]]
"""The place of the expert to remove next, and why; numbers [E] are the experts' numbers before pruning."""


def _by_load(model: PeftModel, texts: Texts, evaluation: Evaluation, numbers: Sequence[int]) -> tuple[int, str]:
    place = int(np.argmin(evaluation.share))
    return place, f"least used: {evaluation.share[place]:.1%} of the routing weight"


def _by_worth(model: PeftModel, texts: Texts, evaluation: Evaluation, numbers: Sequence[int]) -> tuple[int, str]:
    worth_E = np.nanmean(texts.worth(model, evaluation).worth, axis=0)
    place = int(np.argmin(worth_E))
    return place, f"worth least: without it the loss changes by {worth_E[place]:+.4f} nats per token"


def _by_similarity(model: PeftModel, texts: Texts, evaluation: Evaluation, numbers: Sequence[int]) -> tuple[int, str]:
    similarity_EE = np.tril(geometry_of(model)[0].similarity.numpy(), -1) - 2 * np.triu(np.ones((len(numbers),) * 2))
    pair = np.unravel_index(int(np.argmax(similarity_EE)), similarity_EE.shape)
    less, more = sorted(map(int, pair), key=lambda place: evaluation.share[place])
    return less, (
        f"most like another: cosine {similarity_EE[pair]:+.3f} with expert {numbers[more]}, which is used more "
        f"({evaluation.share[more]:.1%} of the routing weight against {evaluation.share[less]:.1%})"
    )


CRITERIA: dict[str, Criterion] = {"load": _by_load, "worth": _by_worth, "similarity": _by_similarity}
