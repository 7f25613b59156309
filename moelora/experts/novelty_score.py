"""How new a text is to a mixture: whether any of its experts knows this kind of text.

Of every text three numbers are taken, each the mean over its tokens:

    loss       nats per predicted token
    entropy    of the routing probabilities, in nats, mean over routers: undecided routers know neither domain
    distance   of a router's inputs from the nearest adapter's domain (squared, Mahalanobis, per dimension), mean over
               routers: only where adapters remember their domains

Each becomes a z-score over calibration texts, which the mixture knows; the mean of the z-scores is the text's score.

Shapes: N texts, F numbers, B batch, S sequence, T tokens, H router input width, A adapters, K directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from ..data.texts import Block
from ..report.observe import count_anew, losses_of, padded, undisturbed
from ..routing import FixedRouter, Router, rms_norm
from ..routing.domain_classifier import RIDGE, Memory
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
        scores: [N] mean z-scores; 0 is like the calibration texts, more is newer.
        threshold: the calibration texts' 95th percentile.
        names: [F] of the numbers behind the scores.
        z_scores: [N, F] of each.
    """

    scores: Array
    threshold: float
    names: tuple[str, ...]
    z_scores: Array

    @property
    def is_new(self) -> NDArray[np.bool_]:
        """[N] whether a text's score exceeds the threshold."""
        return self.scores > self.threshold

    @property
    def share_new(self) -> float:
        """Share of the texts that count as new."""
        return float(self.is_new.mean())


@dataclass(frozen=True)
class Calibration:
    """What the numbers are for texts that the mixture knows: [F] means and deviations, and the threshold they imply."""

    names: tuple[str, ...]
    mean: Array
    deviation: Array
    threshold: float

    @classmethod
    def of(cls, names: tuple[str, ...], numbers: Array) -> Calibration:
        """From the numbers [N, F] of N calibration texts.

        Raises:
            ValueError: there are too few texts.
        """
        if len(numbers) < FEWEST:
            raise ValueError(f"{len(numbers)} calibration texts say too little; give {FEWEST} or more")
        mean, deviation = numbers.mean(0), numbers.std(0, ddof=1).clip(min=1e-9)
        scores = ((numbers - mean) / deviation).mean(1)
        return cls(names, mean, deviation, float(np.quantile(scores, QUANTILE)))

    def judge(self, numbers: Array) -> Novelty:
        """How new texts with these numbers [N, F] are."""
        z_scores = (numbers - self.mean) / self.deviation
        return Novelty(z_scores.mean(1), self.threshold, self.names, z_scores)


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
    names, known = measure(model, calibration, pad=pad, batch_size=batch_size)
    return Calibration.of(names, known).judge(measure(model, texts, pad=pad, batch_size=batch_size)[1])


def measure(
    model: PeftModel, texts: Sequence[Sequence[int]], *, pad: int = 0, batch_size: int = 8
) -> tuple[tuple[str, ...], Array]:
    """The names of the numbers and their values [N, F] for each text; see [`novelty`]."""
    routers = _learned_routers(model)
    if not texts:
        raise ValueError("there are no texts; give one or more")
    if short := [len(text) for text in texts if len(text) < 2]:
        raise ValueError(f"a text has {short[0]} tokens; a loss needs 2 or more")
    domains = {name: _domains_of(router, model.device) for name, router in routers.items()}
    names = ("loss", "entropy", "distance") if all(domains.values()) else ("loss", "entropy")
    rows = []
    with torch.no_grad(), undisturbed(model):
        count_anew(model.base_model.routing)
        for start in range(0, len(texts), batch_size):
            blocks = [Block(0, 0, 0, list(text)) for text in texts[start : start + batch_size]]
            ids, mask = padded(blocks, pad, model.device)
            seen: dict[str, list[Tensor]] = {"entropy": [], "distance": []}
            with _watching(routers, domains, mask.bool(), seen):
                logits = model(input_ids=ids, attention_mask=mask).logits
            losses = losses_of(logits, ids, [len(block.token_ids) for block in blocks])
            columns = [torch.stack([loss.mean() for loss in losses])]
            columns += [torch.stack(seen[name]).mean(0).cpu() for name in names[1:]]
            rows.append(torch.stack(columns, dim=1).double().numpy())
    return names, np.concatenate(rows)


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
    """An adapter's domain as squared distances want it: covariance U^T U + D, inverted by Woodbury's identity."""

    mean: Tensor  # [H]
    inverse_H: Tensor  # 1 / D
    whitening_KH: Tensor  # (I + U D^-1 U^T)^-1/2 U D^-1

    @classmethod
    def of(cls, memory: Memory, device: torch.device) -> _Domain:
        directions, variance = memory.directions.double(), memory.variance.double()
        variance = variance + RIDGE * (variance + directions.square().sum(0)).mean()
        scaled = directions / variance
        root = torch.linalg.cholesky(torch.eye(len(directions)).double() + scaled @ directions.t())
        whitening = torch.linalg.solve_triangular(root, scaled, upper=False)
        return cls(memory.mean.to(device), (1 / variance).float().to(device), whitening.float().to(device))

    def distance(self, normed: Tensor) -> Tensor:
        """[...] squared Mahalanobis distances of normed [..., H], per dimension."""
        moved = normed - self.mean
        squared = (moved.square() * self.inverse_H).sum(-1) - (moved @ self.whitening_KH.t()).square().sum(-1)
        return squared / normed.shape[-1]


def _domains_of(router: MoELoraRouter, device: torch.device) -> list[_Domain]:
    """Of the adapters that a router serves; none unless all remember theirs."""
    learned = cast("list[Router]", router.active_routers())
    return [_Domain.of(r.memory, device) for r in learned] if all(r.remembers for r in learned) else []


@contextmanager
def _watching(
    routers: dict[str, MoELoraRouter],
    domains: dict[str, list[_Domain]],
    mask_BS: Tensor,
    seen: dict[str, list[Tensor]],
) -> Iterator[None]:
    """Within, every router leaves its means over each text's tokens in seen."""
    with ExitStack() as hooks:
        for name, router in routers.items():
            hooks.callback(router.register_forward_pre_hook(_look(domains[name], mask_BS, seen)).remove)
        yield


def _look(domains: list[_Domain], mask_BS: Tensor, seen: dict[str, list[Tensor]]) -> Callable[..., None]:
    def hook(router: MoELoraRouter, args: tuple[Any, ...]) -> None:
        hidden = args[0].reshape(*mask_BS.shape, -1)
        logits = router.logits(hidden) / router.state.config.router_temperature
        mask = mask_BS.to(hidden.device)
        tokens = mask.sum(1)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1).view(mask.shape)
        seen["entropy"].append((entropy * mask).sum(1) / tokens)
        if domains:
            normed = rms_norm(hidden)
            nearest = torch.stack([domain.distance(normed) for domain in domains]).amin(0)
            seen["distance"].append((nearest * mask).sum(1) / tokens)

    return hook
