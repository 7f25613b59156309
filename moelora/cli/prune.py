"""`moelora prune`: a mixture with fewer experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..experts.evaluation import Texts
from ..experts.parts import names_of, take_apart
from ..experts.prune import Pruned, drop, prune
from ..schema import Problem, UserError, telling_user
from .evaluation import loss_notes, loss_record, open_adapter
from .operation import Plan
from .options import PruneOptions


def prune_command(options: PruneOptions) -> Path | None:
    """Prune an adapter and write the smaller one to a folder of its own."""
    both = [Problem("--keep", options.keep, "give either --keep N or --drop EXPERT")]
    opened = open_adapter(options, both if (options.keep is None) == (not options.drop) else [])
    names = opened.source.experts
    numbers = opened.find(options.drop, "--drop") if options.drop else []
    if len(numbers) == len(names) or (options.keep or 0) >= len(names):
        key, value = ("--drop", options.drop) if numbers else ("--keep", options.keep)
        raise UserError(str(Problem(key, value, f"must leave 1 to {len(names) - 1} of the {len(names)} experts")))
    model, texts = opened.load()
    with telling_user():
        found = drop(model, texts, numbers) if options.keep is None else prune(model, texts, options.by, options.keep)
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
