"""Remove the experts that are used least, are worth least, or are most like another.

One expert at a time: what is left is measured anew, for of two experts that say the same each is worth nothing while
the other is there. Shapes: E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peft import PeftModel

from ..options import PruneOptions
from ..report.analysis import geometry_of
from ..training.schema import Problem, UserError
from .judged import loss_notes, loss_record, open_adapter
from .operation import Plan
from .parts import names_of, put_together, select, take_apart
from .reading import Reading, Texts


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
    before: Reading
    after: Reading


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
    before = reading = texts.read(model)
    removals = []
    while len(numbers) > keep:
        place, reason = CRITERIA[by](model, texts, reading, numbers)
        removals.append(Removal(numbers[place], names[numbers[place]], reason))
        model = put_together(model, select(take_apart(model), [i for i in range(len(numbers)) if i != place]))
        del numbers[place]
        reading = texts.read(model)
    return Pruned(model, removals, before, reading)


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


Criterion = Callable[[PeftModel, Texts, Reading, Sequence[int]], tuple[int, str]]
"""The place of the expert to remove next, and why; numbers [E] are the experts' numbers before pruning."""


def _by_load(model: PeftModel, texts: Texts, reading: Reading, numbers: Sequence[int]) -> tuple[int, str]:
    place = int(np.argmin(reading.share))
    return place, f"least used: {reading.share[place]:.1%} of the routing weight"


def _by_worth(model: PeftModel, texts: Texts, reading: Reading, numbers: Sequence[int]) -> tuple[int, str]:
    worth_E = np.nanmean(texts.worth(model, reading).worth, axis=0)
    place = int(np.argmin(worth_E))
    return place, f"worth least: without it the loss changes by {worth_E[place]:+.4f} nats per token"


def _by_similarity(model: PeftModel, texts: Texts, reading: Reading, numbers: Sequence[int]) -> tuple[int, str]:
    similarity_EE = np.tril(geometry_of(model)[0].similarity.numpy(), -1) - 2 * np.triu(np.ones((len(numbers),) * 2))
    pair = np.unravel_index(int(np.argmax(similarity_EE)), similarity_EE.shape)
    less, more = sorted(map(int, pair), key=lambda place: reading.share[place])
    return less, (
        f"most like another: cosine {similarity_EE[pair]:+.3f} with expert {numbers[more]}, which is used more "
        f"({reading.share[more]:.1%} of the routing weight against {reading.share[less]:.1%})"
    )


CRITERIA: dict[str, Criterion] = {"load": _by_load, "worth": _by_worth, "similarity": _by_similarity}


# ---- the command -----------------------------------------------------------------------------------------------------


def prune_command(options: PruneOptions) -> Path | None:
    """Prune an adapter and write the smaller one to a folder of its own.

    Raises:
        UserError: an option, a text or the adapter is not in order; nothing is written then.
    """
    both = [Problem("--keep", options.keep, "give either --keep N or --drop EXPERT")]
    opened = open_adapter(options, both if (options.keep is None) == (not options.drop) else [])
    names = opened.source.experts
    numbers = opened.find(options.drop, "--drop") if options.drop else []
    if len(numbers) == len(names) or (options.keep or 0) >= len(names):
        key, value = ("--drop", options.drop) if numbers else ("--keep", options.keep)
        raise UserError(str(Problem(key, value, f"must leave 1 to {len(names) - 1} of the {len(names)} experts")))
    model, texts = opened.load()
    try:
        found = drop(model, texts, numbers) if options.keep is None else prune(model, texts, options.by, options.keep)
    except ValueError as error:
        raise UserError(str(error)) from error
    removed = [dataclasses.asdict(removal) for removal in found.removals]
    outcome = {"removed": removed, "domains": loss_record(texts, found.before, found.after)}
    return opened.write(found.model, _plan(options, names, texts, found), outcome)


def _plan(options: PruneOptions, names: Sequence[str], texts: Texts, found: Pruned) -> Plan:
    reasons = {removal.number: removal.reason for removal in found.removals}
    order = [removal.number for removal in found.removals]
    left = iter(enumerate(names_of(take_apart(found.model))))
    rows = []
    for number, name in enumerate(names):
        if number in reasons:
            fate = f"goes ({order.index(number) + 1}): {reasons[number]}"
        else:
            fate = "stays, as {} ({})".format(*next(left))
        rows.append((str(number), name, f"{found.before.share[number]:.1%}", fate))
    notes = loss_notes(texts, found.before, found.after)
    if len(names) - len(reasons) == 1:
        notes.append("One expert is left: it always has the whole routing weight, and its router decides nothing.")
    title = f"Prune {options.adapter}: {len(names)} experts to {len(names) - len(reasons)}"
    return Plan(title, ("expert", "adapter", "routing weight", "outcome"), rows, notes)
