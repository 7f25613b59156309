"""Which experts to prune or to merge, from their load, their worth and their likeness.

Shapes: D domains, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Thresholds:
    """What the suggestions go by.

    Attributes:
        worth: nats per token. An expert is worth little when removing it costs less than this in every domain, its
            error (two standard errors) included.
        load: of the fair share 1 / E. Where worth is not measured, an expert with less than this part of it in every
            domain is worth a closer look.
        similarity: two experts whose products have at least this cosine do much the same.
    """

    worth: float = 0.005
    load: float = 0.25
    similarity: float = 0.8


@dataclass(frozen=True)
class Suggestion:
    """What to do with one or two experts: `prune`, `merge` or `look`, and why."""

    action: str
    experts: tuple[int, ...]
    reason: str


def suggest(
    share_DE: Array,
    similarity_EE: Array,
    worth_DE: Array | None,
    error_DE: Array | None,
    domains: list[str],
    thresholds: Thresholds | None = None,
) -> list[Suggestion]:
    """Suggestions, most certain first; empty where every expert earns its place.

    Args:
        share_DE: each expert's share of the routing weight, by domain, mean over routers.
        similarity_EE: cosine of the experts' products over all linears.
        worth_DE: what removing each expert adds to the loss, in nats per token; None where that was not measured.
        error_DE: its standard error; NaN counts as unknown, and what is unknown is not pruned.
    """
    limits = thresholds or Thresholds()
    num_experts = share_DE.shape[1]
    if num_experts < 2:
        return []
    if worth_DE is None or error_DE is None:
        idle = _idle(share_DE, limits)
        pruned: list[Suggestion] = idle
    else:
        pruned = _worthless(share_DE, worth_DE, error_DE, limits) + _harmful(worth_DE, error_DE, domains)
    gone = {expert for suggestion in pruned if suggestion.action == "prune" for expert in suggestion.experts}
    return pruned + _alike(similarity_EE, share_DE, gone, limits)


def _worthless(share_DE: Array, worth_DE: Array, error_DE: Array, limits: Thresholds) -> list[Suggestion]:
    ceiling_E = (worth_DE + 2 * error_DE).max(axis=0)
    return [
        Suggestion(
            "prune",
            (int(expert),),
            f"without it no domain loses more than {max(ceiling_E[expert], 0):.4f} nats per token (error included), "
            f"below {limits.worth}; it takes {share_DE[:, expert].mean():.0%} of the routing weight",
        )
        for expert in np.argsort(ceiling_E)
        if ceiling_E[expert] < limits.worth
    ]


def _harmful(worth_DE: Array, error_DE: Array, domains: list[str]) -> list[Suggestion]:
    hurts = (worth_DE + 2 * error_DE) < 0
    found = []
    for expert in range(worth_DE.shape[1]):
        names = [domains[d] for d in np.flatnonzero(hurts[:, expert])]
        if names and not hurts[:, expert].all():
            gain = -float(worth_DE[hurts[:, expert], expert].min())
            reason = f"{', '.join(names)} would do better without it (by up to {gain:.4f} nats per token), others worse"
            found.append(Suggestion("look", (expert,), reason))
    return found


def _idle(share_DE: Array, limits: Thresholds) -> list[Suggestion]:
    limit = limits.load / share_DE.shape[1]
    most_E = share_DE.max(axis=0)
    return [
        Suggestion(
            "look",
            (int(expert),),
            f"no domain gives it more than {most_E[expert]:.1%} of its routing weight (a fair share is "
            f"{1 / share_DE.shape[1]:.1%}); measure its worth before pruning it",
        )
        for expert in np.flatnonzero(most_E < limit)
    ]


def _alike(similarity_EE: Array, share_DE: Array, gone: set[int], limits: Thresholds) -> list[Suggestion]:
    pairs = [pair for pair in combinations(range(len(similarity_EE)), 2) if not gone & set(pair)]
    return [
        Suggestion(
            "merge",
            pair,
            f"their products have cosine {similarity_EE[pair]:.2f}, at least {limits.similarity}: they do much the "
            f"same, with {share_DE[:, pair].mean(0).sum():.0%} of the routing weight together",
        )
        for pair in sorted(pairs, key=lambda pair: -similarity_EE[pair])
        if similarity_EE[pair] >= limits.similarity
    ]
