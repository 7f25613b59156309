"""Held-out loss of each domain, and which experts each domain used."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from ..console import track
from ..data.preparation import DomainBlocks
from ..schema import UserError

Collator = Callable[[list[dict[str, Any]]], Any]


@dataclass(frozen=True)
class DomainResult:
    """What one domain's held-out blocks say about a model.

    Attributes:
        loss: mean negative log-likelihood per predicted token, in nats.
        tokens: how many tokens were predicted.
        expert_load: fraction of assignments per expert, the mean over routers; None without a mixture.
        expert_load_by_router: the same for each router.
    """

    loss: float
    tokens: int
    expert_load: list[float] | None
    expert_load_by_router: dict[str, list[float]]

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate(
    model: PeftModel, domains: Sequence[DomainBlocks], collator: Collator, batch_size: int, title: str
) -> dict[str, DomainResult]:
    """Measure every domain with the model as it stands, in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return {
                domain.name: _evaluate_domain(model, domain.held_out, collator, batch_size, f"{title}: {domain.name}")
                for domain in domains
            }
    finally:
        model.train(was_training)


def check_converged(results: Mapping[str, DomainResult], fix: str) -> None:
    """Refuse what training has made of a model if its losses are no numbers.

    Args:
        results: after training, by domain.
        fix: what to do about it.

    Raises:
        UserError: naming the domains.
    """
    bad = [f"{name} ({result.loss})" for name, result in results.items() if not math.isfinite(result.loss)]
    if bad:
        raise UserError(f"training diverged: the loss after it is not a number on {', '.join(bad)}; {fix}")


def _evaluate_domain(
    model: PeftModel, blocks: datasets.Dataset, collator: Collator, batch_size: int, title: str
) -> DomainResult:
    routed = getattr(model, "routing_or_none", None) is not None  # a plain LoRA has none
    if routed:
        model.routing_stats(reset=True)
    loss_sum, tokens = 0.0, 0
    batches = DataLoader(blocks, batch_size=batch_size, collate_fn=collator)
    for batch in track(batches, title):
        batch = batch.to(model.device)
        # The model's loss is a mean over the predicted tokens of a batch, which differ in number between batches.
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        loss_sum += float(model(**batch).loss) * predicted
        tokens += predicted
    stats = model.routing_stats(reset=True) if routed else {}
    loads = {name: list(router.expert_load) for name, router in stats.items()}
    return DomainResult(loss_sum / tokens, tokens, _mean(list(loads.values())), loads)


def _mean(rows: Sequence[Sequence[float]]) -> list[float] | None:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None
