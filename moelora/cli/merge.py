"""`moelora merge`: several experts of a mixture become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..experts.evaluation import Evaluation
from ..experts.merging import Merged, MergeRecipe, check_mergeable, domain_notes, merge_experts
from ..experts.parts import names_of, put_together, take_apart
from ..schema import Problem, UserError, telling_user
from .evaluation import loss_notes, loss_record, open_adapter
from .operation import Plan, check_rank
from .options import MergeOptions


def merge_command(options: MergeOptions) -> Path | None:
    """Merge experts of an adapter and write the result to a folder of its own."""
    recipe = MergeRecipe(options.method, options.rank, options.density, options.seed)
    problems = []
    if options.method == "average" and options.rank is not None:
        problems.append(Problem("--rank", options.rank, "drop it: average keeps every rank; svd truncates"))
    opened = open_adapter(options, problems)
    numbers = opened.find(options.experts, "--experts")
    if len(numbers) < 2:
        raise UserError(str(Problem("--experts", options.experts, "name two experts or more, such as 0,1")))
    names = opened.source.experts
    if options.rank is not None:
        chosen = [names[number] for number in numbers]
        check_rank("--rank", options.rank, opened.source.highest_rank(chosen, options.method in ("ties", "dare")))
    model, texts = opened.load()
    with telling_user():
        adapters = take_apart(model)
        check_mergeable(adapters, numbers, recipe)
        before = texts.read(model)
        shares = [float(before.share[number]) for number in numbers]
        merged = merge_experts(adapters, numbers, shares, recipe)
    model = put_together(model, merged.adapters)
    after = texts.read(model)
    outcome = {"becomes": merged.becomes, "domains": loss_record(texts, before, after)}
    notes = [*domain_notes(adapters, numbers), *loss_notes(texts, before, after)]
    plan = _plan(options, names, numbers, merged, notes, before)
    return opened.write(model, plan, outcome)


def _plan(
    options: MergeOptions,
    names: Sequence[str],
    numbers: Sequence[int],
    merged: Merged,
    notes: Sequence[str],
    before: Evaluation,
) -> Plan:
    after = names_of(merged.adapters)
    common = sum(before.share[number] for number in numbers)
    rows = []
    for number, (name, place) in enumerate(zip(names, merged.becomes, strict=True)):
        share = before.share[number]
        part = f"merged with a share of {share / common:.1%} into" if number in numbers else "stays, as"
        rows.append((str(number), name, f"{share:.1%}", f"{part} {place} ({after[place]})"))
    title = f"Merge {options.adapter}: experts {', '.join(map(str, numbers))} become one ({options.method})"
    return Plan(title, ("expert", "adapter", "routing weight", "outcome"), rows, notes)
