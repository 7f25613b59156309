"""A mixture that grew, brought down to a number of experts: the experts of its adapters are merged, least loss first.

Experts belong to adapters, and an adapter is what the domain classifier decides for. So experts of one adapter are
merged with each other, and the classifier stays as it was. Only where every adapter has one expert left are two
adapters merged: they are one domain from then on, of both their statistics. No text is needed: how experts are weighed
follows from domain statistics (`remembered.py`), and what a merge loses is the share of an adapter's delta W(x) =
sum_e w_e D_e (squared) that it changes, by routing (the merged experts had different weights) and by rank:

    E |sum_g (w_e - s p_e) D_e|^2  +  E s^2 |M - M_r|^2,      s = sum_g w_e,  M = sum_g p_e D_e,  p_e = E w_e / E s

for a group g of experts. After a merge each expert is scaled so that its mean weight times its size is what it was.
Shapes: T inputs drawn, E experts of an adapter, r rank of one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from peft import PeftModel
from torch import Tensor

from ..ops.pool import ExpertPool
from ..storage.mixture_files import StoredAdapter, stored_adapter
from .evaluation import Evaluation, Texts
from .merging import Merged, MergeRecipe, check_mergeable, merge_experts
from .parts import AdapterParts, put_together, take_apart
from .remembered import energy, products, remembered_weights, weights_of

_PREFIX, _B = "base_model.model.", ".lora_B.weight"
_RECIPE = MergeRecipe("svd")


@dataclass(frozen=True)
class Merge:
    """Experts that became one.

    Attributes:
        adapters: whose they were; the first has the result. Several are one domain from then on.
        experts: their places in these adapters, as those were at the time.
        loss: share of the adapters' deltas (squared) that the merge changes, the mean over the adapters.
    """

    adapters: tuple[str, ...]
    experts: tuple[int, ...]
    loss: float

    def __str__(self) -> str:
        lost = f"changes {self.loss:.1%} of what they add there, by domain statistics"
        if len(self.adapters) > 1:
            return f"the experts of {' and '.join(self.adapters)} become one, of {self.adapters[0]}: {lost}"
        return f"experts {', '.join(map(str, self.experts))} of {self.adapters[0]} become one: {lost}"


@dataclass(frozen=True)
class Consolidated:
    """The smaller mixture, what was merged in which order, and what both lose on texts, where some were given."""

    model: PeftModel
    merges: list[Merge]
    before: Evaluation | None = None
    after: Evaluation | None = None


def consolidate(
    model: PeftModel, max_experts: int, *, keep: Collection[str] = (), texts: Texts | None = None
) -> Consolidated:
    """Merge experts of the active adapters until there are max_experts or fewer.

    Within adapters first, least loss first; two adapters that become one are one domain from then on.

    Args:
        model: the mixture; it loses its adapters to the result, unless it is small enough already.
        keep: adapters that stay as they are, such as the newest.
        texts: to measure the loss on before and after; nothing is chosen by them.

    Raises:
        ValueError: adapters lack domain statistics, or there is no way to so few experts; nothing has changed then.
    """
    adapters = take_apart(model)
    _check(adapters, max_experts, keep)
    before = None if texts is None else texts.read(model)
    merges: list[Merge] = []
    known: dict[str, list[Merge]] = {}
    while sum(len(adapter.experts) for adapter in adapters if adapter.is_active) > max_experts:
        best = _best(adapters, keep, known)
        adapters = _merged(adapters, best)
        known = {name: found for name, found in known.items() if name not in best.adapters}
        merges.append(best)
    result = put_together(model, adapters) if merges else model
    return Consolidated(result, merges, before, None if texts is None else texts.read(result))


def _check(adapters: Sequence[AdapterParts], max_experts: int, keep: Collection[str]) -> None:
    active = [adapter for adapter in adapters if adapter.is_active]
    if unknown := sorted(set(keep) - {adapter.name for adapter in active}):
        raise ValueError(f"`keep` ({unknown[0]!r}) is no active adapter; there are {', '.join(a.name for a in active)}")
    kept = sum(len(adapter.experts) for adapter in active if adapter.name in keep)
    least = kept + any(adapter.name not in keep for adapter in active)
    if max_experts < least:
        raise ValueError(
            f"`max_experts` ({max_experts}) is too few: {least} are left when all that may be merged are one"
        )
    without = [adapter.name for adapter in active if not adapter.config.router_memory and adapter.name not in keep]
    if without and sum(len(adapter.experts) for adapter in active) > max_experts:
        raise ValueError(
            f"adapter {without[0]!r} has no domain statistics, by which to tell what a merge loses; call "
            "`moelora.experts.learn_domain` with texts of it first"
        )


def _best(adapters: Sequence[AdapterParts], keep: Collection[str], known: dict[str, list[Merge]]) -> Merge:
    """The merge that loses least for each expert that it saves. known: those of adapters that did not change."""
    free = [adapter for adapter in adapters if adapter.is_active and adapter.name not in keep]
    for adapter in free:
        if adapter.name not in known:
            known[adapter.name] = _within(adapter)
    found = [merge for adapter in free for merge in known[adapter.name]] or _across(free)
    if not found:
        raise ValueError(
            "the adapters that are left adapt different linears, so none of them can take another's expert"
        )
    return min(found, key=lambda merge: merge.loss / (len(merge.experts) - 1))


# ---- what a merge loses ----------------------------------------------------------------------------------------------


def _stored(adapter: AdapterParts) -> StoredAdapter:
    return stored_adapter(adapter.name, adapter.config, 0, adapter.tensors())


def _groups(adapter: AdapterParts) -> list[tuple[int, ...]]:
    """Experts that may become one: any two, or all where an adapter cannot have one fewer, as top-k needs more."""
    count = len(adapter.experts)
    if count > max(2, adapter.config.top_k_experts) or count == 2:
        return list(combinations(range(count), 2))
    return [tuple(range(count))] if count > 1 else []


def _within(adapter: AdapterParts) -> list[Merge]:
    groups = _groups(adapter)
    if not groups:
        return []
    stored = _stored(adapter)
    weights = remembered_weights(stored)
    assert weights is not None  # `_check` has seen to that
    shares = _shares(weights)
    lost, whole = dict.fromkeys(groups, 0.0), 0.0
    for linear, pool in stored.pools.items():
        weights_TE, products_EE = weights_of(linear, weights), products(pool)
        whole += energy(weights_TE, products_EE)
        cores = _cores(pool)
        for group in groups:
            lost[group] += _loss(group, shares, weights_TE, products_EE, cores, pool)
    return [Merge((adapter.name,), group, loss / whole if whole else 0.0) for group, loss in lost.items()]


def _shares(weights: Mapping[str, Tensor]) -> Tensor:
    """[E] mean weights over an adapter's domain and routers."""
    return torch.stack([weights_TE.mean(0) for weights_TE in weights.values()]).mean(0)


def _cores(pool: ExpertPool) -> tuple[Tensor, Tensor]:
    """A A^T and B^T B [E * r, E * r], float64, the scaling in B."""
    lora_A, lora_B = pool.lora_A.detach().cpu().double(), pool.lora_B.detach().cpu().double() * pool.scaling
    return lora_A @ lora_A.t(), lora_B.t() @ lora_B


def _loss(
    group: Sequence[int],
    shares: Tensor,
    weights_TE: Tensor,
    products_EE: Tensor,
    cores: tuple[Tensor, Tensor],
    pool: ExpertPool,
) -> float:
    chosen = list(group)
    used = shares[chosen] if shares[chosen].any() else torch.ones(len(chosen), dtype=torch.float64)
    own = used / used.sum()
    together_T1 = weights_TE[:, chosen].sum(-1, keepdim=True)
    by_routing = energy(weights_TE[:, chosen] - together_T1 * own, products_EE[chosen][:, chosen])
    rows = torch.cat([torch.arange(e * pool.rank, (e + 1) * pool.rank) for e in chosen])
    each = own.repeat_interleave(pool.rank)
    tail = _tail(cores[0][rows][:, rows], cores[1][rows][:, rows] * each[:, None] * each, pool.rank)
    return by_routing + float(together_T1.square().mean()) * tail


def _tail(core_A: Tensor, core_B: Tensor, rank: int) -> float:
    """The squared size of what a product B A, of these Gram matrices, has beyond a rank."""
    values, vectors = torch.linalg.eigh(core_A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    squared = torch.linalg.eigvalsh(root @ core_B @ root).clamp(min=0)  # ascending: the squared singular values of B A
    return float(squared[: len(squared) - rank].sum())


def _across(adapters: Sequence[AdapterParts]) -> list[Merge]:
    """Pairs of adapters of one expert each, the one that adapts all linears of the other first."""
    found = []
    for pair in combinations(adapters, 2):
        for order in (pair, pair[::-1]):
            try:
                check_mergeable(order, [0, 1], _RECIPE)
            except ValueError:
                continue
            found.append(Merge(tuple(adapter.name for adapter in order), (0, 0), _loss_across(order)))
            break
    return found


def _loss_across(pair: Sequence[AdapterParts]) -> float:
    """What each of two adapters of one expert loses by having half of both, the mean of the two shares."""
    home, other = (_stored(adapter) for adapter in pair)
    lost, sizes = 0.0, [0.0, 0.0]
    for linear, pool in home.pools.items():
        pools = [pool, *([other.pools[linear]] if linear in other.pools else [])]
        lora_A = torch.cat([each.lora_A.detach().cpu().double() for each in pools])
        lora_B = torch.cat([each.lora_B.detach().cpu().double() * each.scaling for each in pools], dim=1)
        core_A, core_B = lora_A @ lora_A.t(), lora_B.t() @ lora_B
        signs = torch.ones(len(lora_A), dtype=torch.float64)
        signs[pool.rank :] = -1
        lost += 0.25 * float((core_A * core_B * signs[:, None] * signs).sum()) + _tail(core_A, core_B / 4, pool.rank)
        for place, each in enumerate(pools):
            sizes[place] += float(products(each).sum())
    return sum(lost / size if size else 0.0 for size in sizes) / 2


# ---- the merge -------------------------------------------------------------------------------------------------------


def _merged(adapters: Sequence[AdapterParts], merge: Merge) -> list[AdapterParts]:
    if len(merge.adapters) > 1:
        return _merge(adapters, merge, [1.0, 1.0]).adapters
    name = merge.adapters[0]
    before = next(adapter for adapter in adapters if adapter.name == name)
    old = remembered_weights(_stored(before))
    assert old is not None
    if len(merge.experts) == len(before.experts):  # it keeps its name
        config = deepcopy(before.config)
        config.single_expert = True
        adapters = [replace(each, config=config) if each is before else each for each in adapters]
    merged = _merge(adapters, merge, _shares(old)[list(merge.experts)].tolist()).adapters
    return [_as_loud(each, old, merge.experts) if each.name == name else each for each in merged]


def _merge(adapters: Sequence[AdapterParts], merge: Merge, shares: Sequence[float]) -> Merged:
    starts, start = {}, 0
    for adapter in adapters:
        if adapter.is_active:
            starts[adapter.name] = start
            start += len(adapter.experts)
    owners = merge.adapters if len(merge.adapters) > 1 else merge.adapters * len(merge.experts)
    numbers = [starts[name] + expert for name, expert in zip(owners, merge.experts, strict=True)]
    return merge_experts(adapters, numbers, shares, _RECIPE)


def _as_loud(adapter: AdapterParts, old: Mapping[str, Tensor], merged: Sequence[int]) -> AdapterParts:
    """The adapter with B scaled by how much less, or more, its experts are weighed than what they were made of."""
    new = remembered_weights(_stored(adapter))
    assert new is not None
    factors = {}
    for router, weights_TE in old.items():
        means = weights_TE.mean(0)
        means[merged[0]] = means[list(merged)].sum()
        left = [place for place in range(len(means)) if place not in merged[1:]]
        now = new[router].mean(0)
        factors[router] = torch.where(now > 0, means[left] / now, 1.0)  # an expert of no weight may stay as it is
    experts = []
    for place, expert in enumerate(adapter.experts):
        scaled = dict(expert)
        for key in (key for key in expert if key.endswith(_B)):
            factor = weights_of(key.removeprefix(_PREFIX).removesuffix(_B), factors)[place]
            scaled[key] = expert[key] * float(factor)
        experts.append(scaled)
    return replace(adapter, experts=experts)
