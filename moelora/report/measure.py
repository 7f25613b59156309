"""Run a mixture over blocks of tokens and add up what its routers decide and what its experts are worth.

Shapes: D domains, R routers, E experts, U units (documents, or blocks where those are few), B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from rich.progress import Progress
from torch import Tensor

from ..console import printable
from ..data.texts import Domain, TextBlock, sample
from ..routing.decision import top_k_mask
from .observe import count_anew, look, losses_without, reading_routers, stats_by_name

Array = NDArray[np.float64]

TOKENS_AT_ONCE = {"cpu": 1024}
"""So many rows of logits over a large vocabulary still fit beside the model."""
TOKENS_AT_ONCE_ELSEWHERE = 8192
LEVELS = 255


@dataclass(frozen=True)
class TokenView:
    """Every token of one domain.

    Attributes:
        pieces: [T] the text of each token.
        documents: [T] the document it belongs to.
        weights: [R, T, E] uint8: routing weights in 255ths of the token's total.
        losses: [T] float32 nats; NaN for a token that opens a block, which nothing predicts.
    """

    pieces: list[str]
    documents: NDArray[np.int32]
    weights: NDArray[np.uint8]
    losses: NDArray[np.float32]


@dataclass(frozen=True)
class Routed:
    """Sums over tokens.

    Attributes:
        routers: [R] names of those that run when the model reads text.
        weight, assigned: [U, R, E] routing weight and top-k assignments.
        domain_of_unit: [U].
        losses: [B] summed nats; predicted: [B] number of tokens they are of.
        entropy, top1_probability: [D, R] means; NaN where a router has no probabilities (attached, fixed).
    """

    routers: list[str]
    weight: Array
    assigned: Array
    domain_of_unit: NDArray[np.int64]
    losses: Array
    predicted: Array
    entropy: Array
    top1_probability: Array
    views: list[TokenView]

    def by_domain(self, sums_URE: Array) -> Array:
        """[D, R, E]: each expert's share, of unit sums [U, R, E]."""
        totals = np.zeros((len(self.entropy), *sums_URE.shape[1:]))
        np.add.at(totals, self.domain_of_unit, sums_URE)
        return totals / np.maximum(totals.sum(-1, keepdims=True), 1e-300)

    def loss_by_domain(self, blocks: Sequence[TextBlock]) -> Array:
        """[D] nats per predicted token; NaN where no token is predicted."""
        domain_B = np.array([block.domain for block in blocks])
        summed = (np.bincount(domain_B, values, len(self.entropy)) for values in (self.losses, self.predicted))
        losses, predicted = summed
        return np.where(predicted > 0, losses / np.maximum(predicted, 1), np.nan)


def watch(
    model: PeftModel, domains: Sequence[Domain], blocks: Sequence[TextBlock], pad: int, progress: Progress
) -> Routed:
    """Read every block once. The model must be [`undisturbed`]."""
    state = model.base_model.routing
    names = reading_routers(model, blocks[0])
    units = max(block.unit for block in blocks) + 1
    sums = np.zeros((2, units, len(names), state.num_experts))
    losses, predicted = np.zeros((2, len(blocks)))
    entropy, top1 = np.full((2, len(domains), len(names)), np.nan)
    views = []
    for index, domain in enumerate(domains):
        own = [i for i, block in enumerate(blocks) if block.domain == index]
        bar = progress.add_task(f"Routing {printable(domain.name)}", total=len(own))
        count_anew(state)
        pages = _Pages()
        for chosen in batches(blocks, own, model.device):
            batch = look(model, [blocks[i] for i in chosen], pad, names)
            for i, weights_RTE, loss in zip(chosen, batch.weights, batch.losses, strict=True):
                sums[0, blocks[i].unit] += weights_RTE.sum(1).double().numpy()
                sums[1, blocks[i].unit] += assigned(weights_RTE, state.config.top_k_experts).sum(1).numpy()
                losses[i], predicted[i] = float(loss.double().sum()), len(loss)
                pages.add(blocks[i], weights_RTE, loss)
            progress.advance(bar, len(chosen))
        for name, stats in stats_by_name(model).items():
            if name in names:
                entropy[index, names.index(name)] = stats.entropy
                top1[index, names.index(name)] = stats.top1_probability
        views.append(pages.view(domain))
    domain_U = np.zeros(units, dtype=np.int64)
    for block in blocks:
        domain_U[block.unit] = block.domain
    return Routed(names, sums[0], sums[1], domain_U, losses, predicted, entropy, top1, views)


def assigned(weights: Tensor, top_k: int) -> Tensor:
    """[..., E] bool: the top-k assignments behind routing weights [..., E].

    An unselected expert never outweighs a selected one (it weighs in with p_e (1 - maturity_e)), so the k largest
    weights are the selection.
    """
    return top_k_mask(weights, min(top_k, weights.shape[-1])) & (weights > 0)


def batches(blocks: Sequence[TextBlock], chosen: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Positions of blocks to read together: as many as fit once padded to the longest."""
    limit = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE_ELSEWHERE)
    batch: list[int] = []
    width = 0
    for i in chosen:
        width = max(width, len(blocks[i].token_ids))
        if batch and width * (len(batch) + 1) > limit:
            yield batch
            batch, width = [], len(blocks[i].token_ids)
        batch.append(i)
    if batch:
        yield batch


@dataclass
class _Pages:
    """Collects a domain's tokens block by block."""

    documents: list[NDArray[np.int32]] = field(default_factory=list)
    weights: list[NDArray[np.uint8]] = field(default_factory=list)
    losses: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, block: TextBlock, weights_RTE: Tensor, loss: Tensor) -> None:
        total = weights_RTE.sum(-1, keepdim=True).clamp(min=1e-9)
        self.weights.append((weights_RTE / total * LEVELS).round().clamp(0, LEVELS).to(torch.uint8).numpy())
        self.documents.append(np.full(len(block.token_ids), block.document, dtype=np.int32))
        self.losses.append(np.append(np.float32(np.nan), loss.float().numpy()).astype(np.float32))

    def view(self, domain: Domain) -> TokenView:
        return TokenView(
            pieces=[piece for document in domain.documents for piece in document.pieces],
            documents=np.concatenate(self.documents),
            weights=np.concatenate(self.weights, axis=1),
            losses=np.concatenate(self.losses),
        )


# ---- worth -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """What removing each expert adds to the loss.

    Attributes:
        worth, error: [D, E] nats per token and its standard error over units; NaN where a domain has too few.
        tokens: [D] tokens that it was measured on.
    """

    worth: Array
    error: Array
    tokens: list[int]


def measure_worth(
    model: PeftModel,
    domains: Sequence[Domain],
    blocks: Sequence[TextBlock],
    routed: Routed,
    max_tokens: int,
    pad: int,
    progress: Progress,
) -> Worth:
    """Read a sample of each domain once per expert, without that expert; the rest is routed as if it had never been."""
    num_experts = model.base_model.routing.num_experts
    chosen = [sample(blocks, domain, max_tokens) for domain in range(len(domains))]
    worth, error = np.full((2, len(domains), num_experts), np.nan)
    bar = progress.add_task("Removing each expert", total=num_experts * sum(map(len, chosen)))
    for expert in range(num_experts):
        for domain, own in enumerate(chosen):
            added = []
            for some in batches(blocks, own, model.device):
                losses = losses_without(model, [blocks[i] for i in some], pad, expert)
                added += [float(loss.double().sum()) - routed.losses[i] for i, loss in zip(some, losses, strict=True)]
                progress.advance(bar, len(some))
            units = [blocks[i].unit for i in own]
            worth[domain, expert], error[domain, expert] = mean_and_error(added, routed.predicted[own], units)
    return Worth(worth, error, [sum(len(blocks[i].token_ids) for i in own) for own in chosen])


def mean_and_error(added: ArrayLike, counts: ArrayLike, units: Sequence[int]) -> tuple[float, float]:
    """Mean per token of sums over blocks, and its standard error, with whole units as the independent draws.

    Args:
        added: [B] sums; counts: [B] tokens each is of; units: [B] the unit each belongs to.

    Example:
        >>> mean_and_error([1.0, 3.0], [1, 1], [0, 1])
        (2.0, 1.0)
    """
    if not len(units):
        return np.nan, np.nan
    _, place = np.unique(units, return_inverse=True)
    sums, sizes = np.bincount(place, added), np.bincount(place, counts)
    mean, number = sums.sum() / sizes.sum(), len(sums)
    if number < 2:
        return float(mean), np.nan
    spread = np.square(sums - mean * sizes).sum() * number / (number - 1)
    return float(mean), float(np.sqrt(spread) / sizes.sum())
