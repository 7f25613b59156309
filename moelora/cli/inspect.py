"""`moelora inspect`: what an adapter holds, from its two files alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ..console import make_stdout, make_table, print_exactly, printable, track
from ..files.opening import expand_user
from ..report.geometry import Geometry, geometry, group_modules, sharpness
from ..routing import Router
from ..storage.mixture_files import StoredAdapter, read_mixture, stacked
from ..storage.run_record import finite
from .options import InspectOptions

WIDEST_MATRIX = 16  # experts: more columns than that fit no terminal


@dataclass(frozen=True)
class AdapterFacts:
    """One stored adapter: its place in the mixture (None: inactive), its experts, their ranks and its size.

    knows_domain says whether it has domain statistics; domain_window is the number of tokens that a classifier then
    reads (None: the whole text).
    """

    name: str
    position: int | None
    num_experts: int
    ranks: list[int]
    num_linears: int
    num_parameters: int
    router_type: str
    router_scope: str
    top_k_experts: int
    knows_domain: bool
    domain_window: int | None


@dataclass(frozen=True)
class ExpertFacts:
    """One expert over all its linears and routers.

    norm, effective_rank and nearest_similarity are those of scaling · B A; nearest is the expert most like it;
    maturity is the mean over routers; training_share its share of all assignments in training.
    """

    expert: int
    adapter: str
    norm: float
    effective_rank: float
    nearest: int | None
    nearest_similarity: float
    maturity: float
    training_share: float


@dataclass(frozen=True)
class RouterFacts:
    """One router and the experts in its linears: see [`moelora.report.geometry`] for sharpness and similarity."""

    router: str
    sharpness: float | None
    maturity: list[float]
    training_share: list[float]
    norm: list[float]
    closest_pair: tuple[int, int] | None
    closest_similarity: float


@dataclass(frozen=True)
class Inspection:
    """Everything `moelora inspect` knows. similarity [E, E] is over all linears together."""

    folder: str
    base_model: str | None
    adapters: list[AdapterFacts]
    experts: list[ExpertFacts]
    routers: list[RouterFacts]
    similarity: list[list[float]]


def inspect(options: InspectOptions) -> None:
    """Print an adapter's tables, or its JSON, on standard output."""
    found = inspect_adapter(expand_user(options.adapter))
    if options.json:
        print_exactly(json.dumps(finite(dataclasses.asdict(found)), indent=2))
    else:
        make_stdout().print(tables(found))


def inspect_adapter(folder: Path) -> Inspection:
    """Read an adapter's files and measure its experts and routers."""
    adapters = read_mixture(folder)
    layout = tuple((adapter.name, adapter.num_experts) for adapter in adapters)
    modules: dict[str, dict[str, Any]] = {}
    for adapter in adapters:
        for module, pool in adapter.pools.items():
            modules.setdefault(module, {})[adapter.name] = pool
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.routers))
    groups = group_modules(modules, names)
    whole = geometry(modules, layout)
    routers = [
        _router_facts(name, adapters, geometry(groups[name], layout))
        for name in track(names, "Comparing experts", transient=True)
    ]
    return Inspection(
        folder=str(folder),
        base_model=adapters[0].config.base_model_name_or_path,
        adapters=[_adapter_facts(adapter) for adapter in adapters],
        experts=_expert_facts(adapters, names, whole),
        routers=routers,
        similarity=whole.similarity.tolist(),
    )


def _adapter_facts(adapter: StoredAdapter) -> AdapterFacts:
    return AdapterFacts(
        name=adapter.name,
        position=adapter.position,
        num_experts=adapter.num_experts,
        ranks=sorted({pool.rank for pool in adapter.pools.values()}),
        num_linears=len(adapter.pools),
        num_parameters=adapter.num_parameters,
        router_type=adapter.config.router_type,
        router_scope=adapter.config.router_scope,
        top_k_experts=adapter.config.top_k_experts,
        knows_domain=adapter.config.router_memory > 0,
        domain_window=adapter.config.domain_window,
    )


def _expert_facts(adapters: list[StoredAdapter], names: Sequence[str], whole: Geometry) -> list[ExpertFacts]:
    owners = [adapter.name for adapter in adapters for _ in range(adapter.num_experts)]
    maturity = torch.stack([stacked(adapters, name, "maturity") for name in names]).nanmean(dim=0)
    taken = torch.stack([stacked(adapters, name, "tokens_per_expert") for name in names]).nansum(dim=0)
    share = taken / taken.sum().clamp(min=1)
    others = whole.similarity.clone().fill_diagonal_(-math.inf)
    is_alone = len(owners) == 1
    return [
        ExpertFacts(
            expert=expert,
            adapter=owner,
            norm=float(whole.norm[expert]),
            effective_rank=float(whole.effective_rank[expert]),
            nearest=None if is_alone else int(others[expert].argmax()),
            nearest_similarity=math.nan if is_alone else float(others[expert].max()),
            maturity=float(maturity[expert]),
            training_share=float(share[expert]),
        )
        for expert, owner in enumerate(owners)
    ]


def _router_facts(name: str, adapters: list[StoredAdapter], local: Geometry) -> RouterFacts:
    active = [adapter for adapter in adapters if adapter.position is not None and name in adapter.routers]
    built = [router for adapter in active if isinstance(router := adapter.router(name), Router)]
    taken = stacked(adapters, name, "tokens_per_expert")
    pair, similarity = closest_pair(local)
    return RouterFacts(
        router=name or "model",
        sharpness=sharpness(built, active[0].config.router_temperature) if built else None,
        maturity=stacked(adapters, name, "maturity").tolist(),
        training_share=(taken / taken.nansum().clamp(min=1)).tolist(),
        norm=local.norm.tolist(),
        closest_pair=pair,
        closest_similarity=similarity,
    )


def closest_pair(local: Geometry) -> tuple[tuple[int, int] | None, float]:
    """The two experts that are most alike, and how much; None with fewer than two."""
    pairs = combinations(range(len(local.norm)), 2)
    best = max(pairs, key=lambda pair: float(local.similarity[pair]), default=None)
    return best, math.nan if best is None else float(local.similarity[best])


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(found: Inspection) -> RenderableType:
    """The terminal's view: adapters, experts, their similarity, routers."""
    parts: list[RenderableType] = [_adapters_table(found), _experts_table(found)]
    if 1 < len(found.experts) <= WIDEST_MATRIX:
        parts.append(_similarity_table(found))
    return Group(*parts, _routers_table(found))


def _table(title: str, left: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return make_table(title, left, right, rows, title_justify="left", min_width=len(title))


def _adapters_table(found: Inspection) -> Table:
    rows = [
        (
            adapter.name,
            _routing(adapter),
            "no" if adapter.position is None else "yes",
            str(adapter.num_experts),
            str(adapter.top_k_experts),
            ", ".join(map(str, adapter.ranks)),
            str(adapter.num_linears),
            f"{adapter.num_parameters:,}",
        )
        for adapter in found.adapters
    ]
    title = f"Adapters in {printable(found.folder)}"
    title += f", for {printable(found.base_model)}" if found.base_model else ""
    return _table(title, ("adapter", "routing"), ("active", "experts", "top-k", "r", "linears", "parameters"), rows)


def _routing(adapter: AdapterFacts) -> str:
    words = f"{adapter.router_type}, per {adapter.router_scope}"
    if not adapter.knows_domain:
        return words
    tokens = "whole text" if adapter.domain_window is None else f"{adapter.domain_window} tokens"
    return f"{words}, by domain ({tokens})"


def _experts_table(found: Inspection) -> Table:
    rows = [
        (
            str(expert.expert),
            expert.adapter,
            f"{expert.norm:.3f}",
            f"{expert.effective_rank:.1f}",
            "" if expert.nearest is None else f"{expert.nearest_similarity:+.2f} ({expert.nearest})",
            f"{expert.maturity:.2f}",
            f"{expert.training_share:.1%}",
        )
        for expert in found.experts
    ]
    right = ("norm of BA", "effective rank", "nearest (expert)", "maturity", "load in training")
    return _table("Experts, over all linears and routers", ("expert", "adapter"), right, rows)


def _similarity_table(found: Inspection) -> Table:
    head = [str(expert.expert) for expert in found.experts]
    rows = [
        (head[i], *("" if i == j else f"{value:+.2f}" for j, value in enumerate(row)))
        for i, row in enumerate(found.similarity)
    ]
    return _table("Similarity of experts (cosine of their products BA)", ("expert",), head, rows)


def _routers_table(found: Inspection) -> Table:
    rows = []
    for router in found.routers:
        pair = "" if router.closest_pair is None else f"{router.closest_similarity:+.2f} {router.closest_pair}"
        known = [value for value in router.maturity if not math.isnan(value)]
        shares = [value for value in router.training_share if not math.isnan(value)]
        rows.append(
            (
                router.router,
                "fixed" if router.sharpness is None else f"{router.sharpness:.3f}",
                f"{min(known):.2f} to {max(known):.2f}",
                f"{min(shares):.0%} to {max(shares):.0%}",
                pair,
            )
        )
    right = ("sharpness", "maturity", "load in training", "most alike")
    return _table("Routers", ("router",), right, rows)
