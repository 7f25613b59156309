"""The tables that end a run, drawn from run.json alone."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..console import make_table

OLD_DOMAINS = "old_domains"
"""Where run.json keeps the losses on what was learned before, by domain."""

Loads = Mapping[str, Sequence[float]]
"""Expert load by domain."""


def summary(record: Mapping[str, Any]) -> RenderableType:
    """Losses per domain, then which experts each domain used."""
    domains = record["domains"]
    tables = [losses_table(domains)]
    if OLD_DOMAINS in record:
        tables.append(old_losses_table(record[OLD_DOMAINS]))
    if all(domain["expert_load"] for domain in domains.values()):
        by_router = loads_by_router(domains)
        mean = {name: domain["expert_load"] for name, domain in domains.items()}
        tables.append(
            experts_table(f"Expert load per domain (share of assignments), mean over {len(by_router)} routers", mean)
        )
        if len(by_router) > 1 and len(domains) > 1:
            # Experts of different routers have nothing in common but their number, so a mean hides most of the routing.
            router = max(by_router, key=lambda name: difference(by_router[name]))
            tables.append(experts_table(f"The same in {router}, where the domains differ most", by_router[router]))
    return Group(*tables)


def loads_by_router(domains: Mapping[str, Mapping[str, Any]]) -> dict[str, Loads]:
    routers = next(iter(domains.values()))["expert_load_by_router"]
    return {
        router: {name: domain["expert_load_by_router"][router] for name, domain in domains.items()}
        for router in routers
    }


def difference(loads: Loads) -> float:
    """How much domains differ in the experts they use: total variation distance, summed over the pairs of domains.

    >>> difference({"a": [1.0, 0.0], "b": [0.0, 1.0]}), difference({"a": [0.5, 0.5], "b": [0.5, 0.5]})
    (1.0, 0.0)
    """
    pairs = combinations(loads.values(), 2)
    return sum(abs(left - right) / 2 for pair in pairs for left, right in zip(*pair, strict=True))


def losses_table(domains: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, domain in domains.items():
        changes = (_change(domain, "loss", 3), _change(domain, "perplexity", 1))
        rows.append((name, f"{domain['train_tokens']:,}", f"{domain['held_out_tokens']:,}", *changes))
    right = ("train tokens", "held-out tokens", "loss", "perplexity")
    return make_table("Held-out loss per token (nats), before and after", ("domain",), right, rows)


def old_losses_table(domains: Mapping[str, Mapping[str, Any]]) -> Table:
    """What growing has done to the domains that were learned before."""
    rows = [(name, f"{domain['held_out_tokens']:,}", _change(domain, "loss", 3)) for name, domain in domains.items()]
    title = "What was learned before: held-out loss per token (nats), before and after"
    return make_table(title, ("domain",), ("held-out tokens", "loss"), rows)


def _change(domain: Mapping[str, Any], what: str, digits: int) -> str:
    values = (domain[f"{what}_{when}"] for when in ("before", "after"))
    return " → ".join("-" if value is None else f"{value:.{digits}f}" for value in values)  # null: not finite


def experts_table(title: str, loads: Loads) -> Table:
    """One row per expert and one column per domain: a mixture may have far more experts than a screen has columns."""
    by_expert = enumerate(zip(*loads.values(), strict=True))
    rows = [(str(expert), *(f"{load:.1%}" for load in row)) for expert, row in by_expert]
    return make_table(title, (), ("expert", *loads), rows, min_width=len(title))
