"""What stands out in an analysis, in a few sentences: the top of the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .analysis import Analysis

SIGNIFICANT = 0.05
IDLE_LOAD = 0.01
YOUNG = 0.5


@dataclass(frozen=True)
class Finding:
    """A sentence; kind is `good`, `warn` or `info`."""

    kind: str
    title: str
    text: str


def findings(found: Analysis) -> list[Finding]:
    """The sentences that apply, most important first."""
    makers = (_specialisation, _balance, _worth, _advice, _young)
    return [finding for make in makers if (finding := make(found)) is not None] + _caveats(found)


def _specialisation(found: Analysis) -> Finding | None:
    if (special := found.specialisation) is None:
        return None
    above = int((special.observed[:-1] > special.high[:-1]).sum())
    numbers = (
        f"on average {special.observed[-1]:.3f} bits of a possible {special.maximum:.2f}, by chance "
        f"{special.chance[-1]:.3f} (p = {special.p_value[-1]:.3f}); {above} of {len(found.routers)} routers lie "
        "above chance."
    )
    if special.p_value[-1] <= SIGNIFICANT:
        return Finding("good", "Domains use different experts:", numbers)
    return Finding("warn", "No sign that domains use different experts:", numbers)


def _balance(found: Analysis) -> Finding:
    load_RE = found.load.mean(0)
    if idle := int((load_RE < IDLE_LOAD).sum()):
        text = f"they take less than {IDLE_LOAD:.0%} of their router's assignments, over all domains."
        return Finding("warn", f"{idle} of {load_RE.size} experts (each router's counted) idle:", text)
    low, high = load_RE.min(), load_RE.max()
    return Finding(
        "good", "No expert idles:", f"in every router each takes between {low:.0%} and {high:.0%} of the assignments."
    )


def _worth(found: Analysis) -> Finding | None:
    if found.worth is None or not np.isfinite(found.worth).any():
        return None
    domain, expert = np.unravel_index(np.nanargmax(found.worth), found.worth.shape)
    text = f"without expert {expert}, {found.domains[domain]} loses {found.worth[domain, expert]:.3f} nats per token."
    return Finding("info", "Worth most:", text)


def _advice(found: Analysis) -> Finding | None:
    actions = [suggestion.action for suggestion in found.suggestions]
    if not actions:
        return None
    counts = ", ".join(f"{actions.count(action)} to {verb}" for action, verb in
                       (("prune", "prune"), ("merge", "merge"), ("look", "look at")) if action in actions)  # fmt: skip
    return Finding("warn", "Suggestions:", f"{counts}; see Experts alike.")


def _young(found: Analysis) -> Finding | None:
    if not np.isfinite(found.maturity).any() or (mean := np.nanmean(found.maturity)) >= YOUNG:
        return None
    text = f"their maturity is {mean:.2f}, so nearly all act on every token still and shares lie close to even."
    return Finding("info", "The experts are young:", text)


def _caveats(found: Analysis) -> list[Finding]:
    notes = []
    if learned := [name for name, is_held_out in zip(found.domains, found.is_held_out, strict=True) if not is_held_out]:
        title = f"{', '.join(learned)} may have been trained on:"
        notes.append(Finding("info", title, "losses and worths are those on these very texts."))
    if not found.unit_is_document and found.specialisation is not None:
        text = "chance is estimated from blocks of them, which looks smaller than it is. Give five documents or more."
        notes.append(Finding("warn", "Some domain has very few documents:", text))
    if cut := [name for name, left in zip(found.domains, found.left_out, strict=True) if left]:
        title = f"{sum(found.left_out):,} documents of {', '.join(cut)} were left out:"
        notes.append(Finding("info", title, "raise --max-tokens to read them."))
    return notes
