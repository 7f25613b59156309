"""Several experts of a mixture become one.

Each method combines the experts' products D_e = s_e B_e A_e, never A and B by themselves: the mean of the A's times the
mean of the B's is not the mean of the products. π_e is each expert's share of their common routing weight.

    average  Σ π_e D_e exactly: the factors side by side, at the sum of the ranks
    svd      the best approximation of Σ π_e D_e of rank r (Eckart and Young, 1936)
    ties     TIES (arXiv:2306.01708) on the D_e, entry by entry: trim, elect signs, average; then rank r
    dare     DARE (arXiv:2311.03099) on the D_e: drop entries at random, rescale the others, add; then rank r

Shapes: E experts, n those to merge, O out, D in, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from ..routing.domain_classifier import DomainStatistics, combined, distinct
from ..storage.lora_file import Factor
from ..storage.mixture_files import scaling_of
from .low_rank import truncated, truncated_product
from .parts import (
    FIXED,
    AdapterParts,
    Tensors,
    free_name,
    settle,
    with_explicit_weights,
    without_native_experts,
)

METHODS = ("average", "svd", "ties", "dare")
HIDDEN = "hidden_weight"
_FIELDS = tuple(field.name for field in fields(DomainStatistics))  # the mean first
_MEAN = f".memory_{_FIELDS[0]}"
_DOMAIN = re.compile(rf"\.(memory_({'|'.join(_FIELDS)})|gate_(weight|bias))$")
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class MergeRecipe:
    """How to merge.

    Attributes:
        method: one of METHODS.
        rank: of the merged expert; None: as its adapter's experts have (for `average`: the sum of the ranks).
        density: share of entries that `ties` and `dare` keep.
        seed: of `dare`'s choice.
    """

    method: str = "svd"
    rank: int | None = None
    density: float = 0.5
    seed: int = 42


@dataclass(frozen=True)
class _Chosen:
    """One expert to merge: the adapter that holds it, its own tensors, its share of the routing weight."""

    adapter: AdapterParts
    tensors: Tensors
    share: float

    def factors(self, linear: str) -> tuple[Tensor, Tensor]:
        """A [r, D] and s · B [O, r] in float64 of one linear."""
        lora_A, lora_B = self.tensors[linear + _A].double(), self.tensors[linear + _B].double()
        return lora_A, lora_B * scaling_of(self.adapter.config, linear.removeprefix(_PREFIX), len(lora_A))


@dataclass(frozen=True)
class Merged:
    """A mixture after merging, and which expert of it [E] each of the experts before has become."""

    adapters: list[AdapterParts]
    becomes: list[int]


def merge_experts(
    adapters: Sequence[AdapterParts], numbers: Sequence[int], shares: Sequence[float], recipe: MergeRecipe
) -> Merged:
    """The mixture with the experts of these numbers merged into one, in the place of the first.

    The merged expert's row of every router is Σ π_e row_e, so its probability is the geometric mean of theirs, not
    their sum, which no row of a router without biases could score; fixed weights add up. Where the merged rank is that
    of the first expert's adapter it stays there; else it becomes an adapter `expert_<i>`. The adapter that takes it
    gets the domain statistics of all their adapters, if each has its own ([`combined`]).

    Args:
        numbers: two experts or more of the mixture.
        shares: [n] each one's routing weight on texts; only their proportions count.

    Raises:
        ValueError: see [`check_mergeable`].
    """
    check_mergeable(adapters, numbers, recipe)
    adapters = with_explicit_weights(adapters)
    chosen = _choose(adapters, numbers, shares)
    home, rank = chosen[0].adapter, _rank(chosen, recipe)
    with torch.random.fork_rng(devices=[]):  # PEFT's DARE draws from the global generator
        torch.manual_seed(recipe.seed)
        merged = _routers(chosen) | _factors(chosen, replace(recipe, rank=rank))
    if _have_hidden_units_apart(chosen):
        hidden, rows = _hidden_units(chosen)
        merged |= rows
        adapters = [_with_hidden_units(each, hidden, chosen) if each is home else each for each in adapters]
        home = next(each for each in adapters if each.name == home.name)
    first, gone = chosen[0].tensors, {id(one.tensors) for one in chosen}
    rest = []
    for adapter in adapters:
        stays = [expert for expert in adapter.experts if id(expert) not in gone or (expert is first and rank is None)]
        left = replace(adapter, experts=[merged if expert is first else expert for expert in stays])
        rest.append(_with_domains_of_all(left, chosen) if adapter is home and rank is None else left)
        if adapter is home and rank is not None:
            own = _adapter_of_its_own(home, merged, {each.name for each in adapters})
            rest.append(_with_domains_of_all(own, chosen))
    settled = settle(rest)
    place = {id(expert): number for number, (_, expert) in enumerate(_owners(settled))}
    becomes = [place[id(merged if id(expert) in gone else expert)] for _, expert in _owners(adapters)]
    return Merged(settled, becomes)


def check_mergeable(adapters: Sequence[AdapterParts], numbers: Sequence[int], recipe: MergeRecipe) -> None:
    """Refuse what cannot be merged.

    Raises:
        ValueError: there is no such method; fewer than two experts; a rank for `average`; the first one's adapter
            lacks a linear of another; two-layer routers of several adapters, the first of which is not alone.
    """
    if recipe.method not in METHODS:
        raise ValueError(f"`method` ({recipe.method!r}) is not one of {', '.join(METHODS)}")
    if len(numbers) < 2:
        raise ValueError(f"`experts` ({', '.join(map(str, numbers))}) must name two experts or more")
    if recipe.method == "average" and recipe.rank is not None:
        raise ValueError(f"`rank` ({recipe.rank}) contradicts `average`, which keeps every rank; use `svd` to truncate")
    home, *others = _choose(adapters, numbers, [1.0] * len(numbers))
    for other in others:
        if lacking := [key for key in other.tensors if key.endswith((_A, _B)) and key not in home.tensors]:
            raise ValueError(
                f"an expert of {other.adapter.name!r} adapts `{lacking[0].removeprefix(_PREFIX).removesuffix(_A)}`, "
                f"which {home.adapter.name!r} does not; name first an expert that adapts every linear of the others"
            )
    if _have_hidden_units_apart([home, *others]) and len(home.adapter.experts) > 1:
        raise ValueError(
            f"the experts of {home.adapter.name!r} share the hidden units of a two-layer router, and those of other "
            "adapters have units of their own; name first an expert that is alone in its adapter"
        )


def _have_hidden_units_apart(chosen: Sequence[_Chosen]) -> bool:
    apart = len({one.adapter.name for one in chosen}) > 1
    return apart and any(key.endswith(HIDDEN) for one in chosen for key in one.adapter.shared)


def _hidden_units(chosen: Sequence[_Chosen]) -> tuple[Tensors, Tensors]:
    """Two-layer routers of several adapters side by side: all their hidden units, and the row that makes of them the
    mean of the scores. An adapter without a router somewhere brings units of zero."""
    hidden, rows = {}, {}
    for key, like in chosen[0].adapter.shared.items():
        if not key.endswith(HIDDEN):
            continue
        row = key.replace(HIDDEN, "weight")
        units, scores = [], []
        for one in chosen:
            width = one.adapter.config.router_hidden_size or 0
            units.append(one.adapter.shared.get(key, like.new_zeros(width, like.shape[1])))
            scores.append(one.share * one.tensors.get(row, like.new_zeros(1, width)))
        hidden[key], rows[row] = torch.cat(units), torch.cat(scores, dim=1)
    return hidden, rows


def _with_hidden_units(adapter: AdapterParts, hidden: Tensors, chosen: Sequence[_Chosen]) -> AdapterParts:
    config = deepcopy(adapter.config)
    config.router_hidden_size = sum(one.adapter.config.router_hidden_size or 0 for one in chosen)
    return replace(adapter, config=config, shared=adapter.shared | hidden)


def domain_notes(adapters: Sequence[AdapterParts], numbers: Sequence[int]) -> list[str]:
    """What merging the experts of these numbers does to the domain statistics of their adapters, for a plan."""
    owners = _adapters_of(_choose(adapters, numbers, [1.0] * len(numbers)))
    without = [owner.name for owner in owners if not owner.config.router_memory]
    if len(owners) < 2 or len(without) == len(owners):
        return []
    if without:
        return [
            f"{without[0]} has no domain statistics, so the adapter of the merged expert gets none, and no domain "
            f"classifier decides between adapters; moelora.experts.learn_domain gives {without[0]} domain statistics"
        ]
    names = ", ".join(owner.name for owner in owners)
    return [f"The adapter of the merged expert gets the domain statistics of {names}, which count alike"]


def _adapters_of(chosen: Sequence[_Chosen]) -> list[AdapterParts]:
    return list({one.adapter.name: one.adapter for one in chosen}.values())


def _with_domains_of_all(adapter: AdapterParts, chosen: Sequence[_Chosen]) -> AdapterParts:
    """The adapter that takes the merged expert, with the domain statistics of all that went into it; with none where
    one of them has none."""
    owners = _adapters_of(chosen)
    if not all(owner.config.router_memory for owner in owners):
        config = deepcopy(adapter.config)
        config.router_memory = 0
        kept = {key: tensor for key, tensor in adapter.shared.items() if not _DOMAIN.search(key)}
        return replace(adapter, config=config, shared=kept)
    shared = dict(adapter.shared)
    for key in (key for key in adapter.shared if key.endswith(_MEAN)):
        parts = [f"{key.removesuffix(_FIELDS[0])}{name}" for name in _FIELDS]
        statistics = distinct(
            [DomainStatistics(*(owner.shared[part] for part in parts)) for owner in owners if key in owner.shared]
        )
        if len(statistics) > 1:
            of_all = combined(statistics, len(statistics[0].directions))
            shared |= {part: getattr(of_all, name) for part, name in zip(parts, _FIELDS, strict=True)}
    return replace(adapter, shared=shared)


def _owners(adapters: Sequence[AdapterParts]) -> list[tuple[AdapterParts, Tensors]]:
    return [(adapter, expert) for adapter in adapters if adapter.is_active for expert in adapter.experts]


def _choose(adapters: Sequence[AdapterParts], numbers: Sequence[int], shares: Sequence[float]) -> list[_Chosen]:
    owners, total = _owners(adapters), sum(shares)
    weighed = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
    return [_Chosen(*owners[number], share) for number, share in zip(numbers, weighed, strict=True)]


def _rank(chosen: Sequence[_Chosen], recipe: MergeRecipe) -> int | None:
    """The merged expert's rank where it is not that of its adapter."""
    own = {len(tensor) for key, tensor in chosen[0].tensors.items() if key.endswith(_A)}
    if recipe.method == "average":
        linears = [key for key in chosen[0].tensors if key.endswith(_A)]
        return max(sum(len(one.tensors[key]) for one in chosen if key in one.tensors) for key in linears)
    return None if recipe.rank is None or own == {recipe.rank} else recipe.rank


def _routers(chosen: Sequence[_Chosen]) -> Tensors:
    """Rows and maturity: means by share. Counters and fixed weights: sums."""
    merged = {}
    for key, tensor in chosen[0].tensors.items():
        if key.endswith((_A, _B)):
            continue
        if key.endswith(".weight") and _have_hidden_units_apart(chosen):
            continue  # rows over different units: see _hidden_units
        pieces = torch.stack([one.tensors.get(key, torch.zeros_like(tensor)) for one in chosen])
        if key.endswith((FIXED, "tokens_per_expert")):
            merged[key] = pieces.sum(0)
        else:
            share = torch.tensor([one.share for one in chosen], dtype=torch.float64, device=tensor.device)
            merged[key] = torch.einsum("n,n...->...", share, pieces.double()).to(tensor)
    return merged


def _factors(chosen: Sequence[_Chosen], recipe: MergeRecipe) -> Tensors:
    merged: Tensors = {}
    for key in (key for key in chosen[0].tensors if key.endswith(_A)):
        tensor = chosen[0].tensors[key]
        linear = key.removesuffix(_A)
        here = [one for one in chosen if key in one.tensors]
        scaling = scaling_of(chosen[0].adapter.config, linear.removeprefix(_PREFIX), len(tensor))
        lora_A, lora_B = _combined(
            [one.factors(linear) for one in here], [one.share for one in here], recipe, recipe.rank or len(tensor)
        )
        merged[linear + _A] = lora_A.to(tensor)
        merged[linear + _B] = (lora_B if recipe.rank is not None else lora_B / scaling).to(tensor)
    return merged


def _combined(
    factors: Sequence[Factor], shares: Sequence[float], recipe: MergeRecipe, rank: int
) -> tuple[Tensor, Tensor]:
    """A [r, D] and B [O, r] that the method makes of each expert's A and s · B."""
    lora_A = torch.cat([A for A, _ in factors])
    lora_B = torch.cat([share * B for (_, B), share in zip(factors, shares, strict=True)], dim=1)
    if recipe.method == "average":  # an expert that lacks this linear leaves ranks of zero
        missing = rank - len(lora_A)
        return F.pad(lora_A, (0, 0, 0, missing)), F.pad(lora_B, (0, missing))
    if recipe.method == "svd":
        return truncated_product(lora_A, lora_B, rank)
    products = [(B @ A).float() for A, B in factors]
    weights = torch.tensor(shares, device=products[0].device)
    if recipe.method == "ties":  # means over those that agree: weights around 1 leave their size as it is
        return truncated(ties(products, weights * len(shares), recipe.density).double(), rank)
    return truncated(dare_linear(products, weights, recipe.density).double(), rank)


def _adapter_of_its_own(home: AdapterParts, expert: Tensors, taken: set[str]) -> AdapterParts:
    """An adapter for an expert of another rank; its scaling is 1, for it lies in B."""
    home = without_native_experts(home)
    config = deepcopy(home.config)
    config.r = config.lora_alpha = len(next(tensor for key, tensor in expert.items() if key.endswith(_A)))
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    return replace(home, name=free_name(set(taken)), config=config, experts=[expert])
