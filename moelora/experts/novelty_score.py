"""How new a text is to a mixture: whether any of its experts knows this kind of text.

Of every text one number is taken:

    distance   of the mean of a router's inputs from the nearest adapter's domain (squared, Mahalanobis, per dimension)
               times the root of the text's tokens, mean over routers, where adapters have statistics of their domains
    loss       nats per predicted token, where they do not

The variance of a text's mean falls with its tokens, but more slowly than that of tokens from anywhere: between texts of
24 to 256 tokens the root told new from known best.

Its z-score over calibration texts, which the mixture knows, is the text's score; docs/experts-novelty.md compares these
numbers.

Shapes: N texts, B batch, S sequence, H router input width, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from ..data.texts import TextBlock
from ..report.observe import before, count_anew, losses_of, padded, undisturbed
from ..routing import FixedRouter, Router, rms_norm
from ..routing.domain_classifier import RIDGE, DomainStatistics
from ..tuner.router import MoELoraRouter

Array = NDArray[np.float64]
QUANTILE = 0.95
"""Of the calibration texts' scores: above lies what counts as new, and one in twenty texts that are not."""
FEWEST = 8
"""Calibration texts without which a mean and a deviation mean nothing."""


@dataclass(frozen=True)
class Novelty:
    """How new some texts are.

    Attributes:
        scores: [N] z-scores; 0 is like the calibration texts, more is newer.
        threshold: the calibration texts' 95th percentile.
        number: what the scores are of: `distance` or `loss`.
    """

    scores: Array
    threshold: float
    number: str

    @property
    def names(self) -> tuple[str, ...]:
        """[1] the number behind the scores, which were the mean of several once."""
        return (self.number,)

    @property
    def z_scores(self) -> Array:
        """[N, 1] of the number."""
        return self.scores[:, None]

    @property
    def is_new(self) -> NDArray[np.bool_]:
        """[N] whether a text's score exceeds the threshold."""
        return self.scores > self.threshold

    @property
    def share_new(self) -> float:
        """Share of the texts that count as new."""
        return float(self.is_new.mean())


def judge(number: str, known: Array, values: Array) -> Novelty:
    """How new texts are.

    Args:
        number: what was measured.
        known: its values for the calibration texts.
        values: [N] its values for the texts.

    Raises:
        ValueError: there are too few calibration texts.
    """
    if len(known) < FEWEST:
        raise ValueError(f"{len(known)} calibration texts say too little; give {FEWEST} or more")
    mean, deviation = known.mean(), known.std(ddof=1).clip(min=1e-9)
    threshold = np.quantile((known - mean) / deviation, QUANTILE)
    return Novelty((values - mean) / deviation, float(threshold), number)


def novelty(
    model: PeftModel,
    calibration: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    pad: int = 0,
    batch_size: int = 8,
) -> Novelty:
    """Score how new texts are to a mixture.

    Args:
        model: a causal language model with a mixture whose routers learned.
        calibration: token ids of texts of the kinds it was trained on, best held out from training; 8 or more.
        texts: token ids of the texts to judge.
        pad: id of the padding token.

    Raises:
        ValueError: there are too few calibration texts or no others, a text has fewer than two tokens, or routing is
            not learned.
    """
    number, known = measure(model, calibration, pad=pad, batch_size=batch_size)
    return judge(number, known, measure(model, texts, pad=pad, batch_size=batch_size)[1])


def measure(
    model: PeftModel,
    texts: Sequence[Sequence[int]],
    *,
    pad: int = 0,
    batch_size: int = 8,
    number: str | None = None,
) -> tuple[str, Array]:
    """The name of the number and its value [N] for each text; see [`novelty`].

    Args:
        number: `distance` or `loss`; by default distance where the adapters have domain statistics.
    """
    routers = _learned_routers(model)
    if not texts:
        raise ValueError("there are no texts; give one or more")
    if short := [len(text) for text in texts if len(text) < 2]:
        raise ValueError(f"a text has {short[0]} tokens; a loss needs 2 or more")
    domains = {name: _domains_of(router) for name, router in routers.items()}
    number = number or ("distance" if all(domains.values()) else "loss")
    found: list[float] = []
    with torch.no_grad(), undisturbed(model):
        count_anew(model.base_model.routing)
        for start in range(0, len(texts), batch_size):
            blocks = [TextBlock(0, 0, 0, list(text)) for text in texts[start : start + batch_size]]
            ids, mask = padded(blocks, pad, model.device)
            seen: list[Tensor] = []
            watched = routers if number == "distance" else {}
            with before((router, _look(domains[name], mask.bool(), seen)) for name, router in watched.items()):
                logits = model(input_ids=ids, attention_mask=mask).logits
            losses = losses_of(logits, ids, [len(block.token_ids) for block in blocks])
            found += torch.stack(seen).mean(0).tolist() if seen else [float(loss.mean()) for loss in losses]
    return number, np.array(found)


def auc(known: Array, new: Array) -> float:
    """Area under the ROC curve: the chance that a new text scores above a known one, ties counting half.

    Example:
        >>> auc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
        0.875
    """
    difference = new[:, None] - known[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _learned_routers(model: PeftModel) -> dict[str, MoELoraRouter]:
    state = model.base_model.routing
    if state.attached is not None:
        raise ValueError("an attached router decides, not the adapters' own; call `detach_router()` first")
    routers = {name: router for name, router in state.routers.items() if router.pool}
    if any(isinstance(r, FixedRouter) for router in routers.values() for r in router.active_routers()):
        raise ValueError("router_type='fixed' weighs experts alike for every text: its routers know nothing")
    return routers


# ---- looking at routers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Domain:
    """An adapter's domain as squared distances want it: covariance U^T U + D, inverted by Woodbury's identity. In
    float64 on the CPU: a distance is the small difference of two large numbers."""

    mean: Tensor  # [H]
    inverse_H: Tensor  # 1 / D
    whitening_KH: Tensor  # (I + U D^-1 U^T)^-1/2 U D^-1

    @classmethod
    def of(cls, statistics: DomainStatistics) -> _Domain:
        directions, variance = statistics.directions.double(), statistics.variance.double()
        variance = variance + RIDGE * (variance + directions.square().sum(0)).mean()
        scaled = directions / variance
        root = torch.linalg.cholesky(torch.eye(len(directions)).double() + scaled @ directions.t())
        whitening = torch.linalg.solve_triangular(root, scaled, upper=False)
        return cls(statistics.mean.double(), 1 / variance, whitening)

    def distance(self, normed: Tensor) -> Tensor:
        """[...] squared Mahalanobis distances of normed [..., H], per dimension."""
        moved = normed.cpu().double() - self.mean
        squared = (moved.square() * self.inverse_H).sum(-1) - (moved @ self.whitening_KH.t()).square().sum(-1)
        return squared / normed.shape[-1]


def _domains_of(router: MoELoraRouter) -> list[_Domain]:
    """Of the adapters that a router serves; none unless all have statistics of theirs."""
    learned = cast("list[Router]", router.active_routers())
    return [_Domain.of(r.domain) for r in learned] if all(r.has_domain for r in learned) else []


def _look(domains: list[_Domain], mask_BS: Tensor, seen: list[Tensor]) -> Callable[..., None]:
    """A hook before a router that leaves each text's distance in seen."""

    def hook(router: MoELoraRouter, args: tuple[Any, ...]) -> None:
        hidden = args[0].reshape(*mask_BS.shape, -1)
        mask_BS1 = mask_BS.to(hidden.device)[..., None]
        tokens_B1 = mask_BS1.sum(1)
        mean_BH = rms_norm(hidden).masked_fill(~mask_BS1, 0).sum(1) / tokens_B1
        nearest_B = torch.stack([domain.distance(mean_BH) for domain in domains]).amin(0)
        seen.append(nearest_B * tokens_B1[:, 0].cpu().sqrt())

    return hook
