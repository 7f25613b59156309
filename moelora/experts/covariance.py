"""What a mixture's experts did to data, summed up per linear: enough to fit any single map to them, and no token kept.

Shapes: T tokens, D in, O out, N ranks of all experts of a linear together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor

from ..report.observe import before, count_anew, undisturbed
from ..tuner.layer import MoELoraLayer

ModelInputs = Mapping[str, Tensor]  # input_ids and attention_mask


@dataclass
class InputCovariance:
    """Of one linear over T tokens, in float64. A token's delta is y = left · c with c = w ∘ (lora_A x), w its weights.

    Attributes:
        lora_A: [N, D]; left: [O, N] scaling · B.
        cross: [N, D] Σ c xᵀ, so that Σ y xᵀ = left · cross; unweighted: [N, D] Σ (lora_A x) xᵀ; energy: [N, N] Σ c cᵀ.
        weight: [N] Σ w, each expert's repeated for its ranks.
        second: [D, D] Σ x xᵀ, one tensor for all linears that read the same x; tokens: T.
    """

    lora_A: Tensor
    left: Tensor
    cross: Tensor
    unweighted: Tensor
    energy: Tensor
    weight: Tensor
    second: Tensor
    tokens: int = 0

    def add(self, x_TD: Tensor, weights_TE: Tensor, ranks: Sequence[int], is_first: bool) -> None:
        """Count tokens; of several linears that read the same x only the first adds to the second moment."""
        w_TN = weights_TE.repeat_interleave(torch.tensor(ranks, device=weights_TE.device), dim=-1).double()
        h_TN = x_TD.double() @ self.lora_A.T
        c_TN = w_TN * h_TN
        self.cross += c_TN.T @ x_TD.double()
        self.unweighted += h_TN.T @ x_TD.double()
        self.energy += c_TN.T @ c_TN
        self.weight += w_TN.sum(0)
        self.tokens += len(x_TD)
        if is_first:
            x_TD = x_TD.float()  # products of float32 are exact enough; their sum over all tokens is not
            self.second += (x_TD.T @ x_TD).double()

    def error(self, lora_A: Tensor, lora_B: Tensor) -> float:
        """Σ |y - lora_B lora_A x|² as a share of Σ |y|²."""
        total = ((self.left.T @ self.left) * self.energy).sum()
        common = ((self.left.T @ lora_B) * (self.cross @ lora_A.T)).sum()
        own = ((lora_B.T @ lora_B) * (lora_A @ self.second @ lora_A.T)).sum()
        return max(float((total - 2 * common + own) / total), 0.0) if total > 0 else 0.0


def linears_of(model: PeftModel) -> dict[str, MoELoraLayer]:
    """The linears that the mixture adapts, by their names in the base model."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, MoELoraLayer) and module.expert_pools()}


def readers(model: PeftModel, batch: ModelInputs) -> list[list[str]]:
    """The linears, those that read one and the same tensor together (q, k, v; gate, up), as one forward shows."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.__setitem__(name, args[0])

    layers = linears_of(model)
    with torch.no_grad(), undisturbed(model), before((layer, keep(name)) for name, layer in layers.items()):
        model(**batch)
    groups: dict[int, list[str]] = {}
    for name, x in inputs.items():  # all are alive, so an id is one tensor
        groups.setdefault(id(x), []).append(name)
    return list(groups.values())


def in_passes(model: PeftModel, groups: Iterable[list[str]], limit: float) -> list[list[list[str]]]:
    """The groups of [`readers`] divided so that the second moments of one pass over the data take at most limit bytes
    (one group always fits)."""
    layers, used = linears_of(model), limit
    passes: list[list[list[str]]] = []
    for group in groups:
        size = 8 * layers[group[0]].in_features ** 2
        if used + size > limit or not passes:
            passes.append([])
            used = 0.0
        passes[-1].append(group)
        used += size
    return passes


def gather(
    model: PeftModel, batches: Iterable[ModelInputs], groups: Sequence[Sequence[str]]
) -> dict[str, InputCovariance]:
    """Run the mixture over the batches and sum up the linears of these groups; padding is in no sum."""
    layers = linears_of(model)
    found = {name: covariance for group in groups for name, covariance in _zeros(layers, group).items()}
    collectors = [
        _Collector(layers[name], found[name], is_first=place == 0)
        for group in groups
        for place, name in enumerate(group)
    ]
    with torch.no_grad(), undisturbed(model), before((each.layer, each.before) for each in collectors):
        count_anew(model.base_model.routing)  # a router in each linear is asked twice
        for batch in batches:
            for collector in collectors:
                collector.mask_T = batch["attention_mask"].flatten().bool()
            model(**batch)
    return found


def _zeros(layers: Mapping[str, MoELoraLayer], group: Sequence[str]) -> dict[str, InputCovariance]:
    second: Tensor | None = None
    found = {}
    for name in group:
        pools = layers[name].expert_pools()
        left = torch.cat([pool.lora_B.detach().double() * pool.scaling for pool in pools], dim=1)
        lora_A = torch.cat([pool.lora_A.detach().double() for pool in pools])
        rank, width = lora_A.shape
        second = left.new_zeros(width, width) if second is None else second
        cross, unweighted = left.new_zeros(2, rank, width)
        energy, weight = left.new_zeros(rank, rank), left.new_zeros(rank)
        found[name] = InputCovariance(lora_A, left, cross, unweighted, energy, weight, second)
    return found


@dataclass
class _Collector:
    """A hook before one linear."""

    layer: MoELoraLayer
    covariance: InputCovariance
    is_first: bool
    mask_T: Tensor = field(default_factory=lambda: torch.empty(0))  # of the batch at hand

    def before(self, layer: MoELoraLayer, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: by now the block has routed the tokens."""
        x, weights = args[0].flatten(0, -2), layer.weights_for(args[0]).flatten(0, -2)
        keep_T = self.mask_T.to(x.device)
        ranks = [pool.rank for pool in layer.expert_pools() for _ in range(pool.num_experts)]
        self.covariance.add(x[keep_T], weights[keep_T], ranks, self.is_first)
