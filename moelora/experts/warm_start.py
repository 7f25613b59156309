"""New experts that begin where old ones are: copies of the experts of the adapter that knows the new texts best.

An old adapter of m experts makes n new ones. Under even routing the copy does what the adapter does: new expert i gets

    n = m   expert i as it is, to the last bit, with its row in every router
    n > m   a part of expert i mod m: every c-th singular direction of s B A for the c that share it, times n / m
    n < m   the best approximation of n / m times the sum of the experts j with j mod n = i, and the mean of their rows

A rank that is greater than what there is to copy is filled up with fresh rows of A and zeros in B, as a new expert
starts; a lower rank keeps the largest singular directions. Shapes: m, n experts, r rank of one, D in, O out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from ..report.observe import undisturbed
from ..storage.lora_file import Factor
from ..storage.mixture_files import scaling_of
from .domains import alone
from .low_rank import truncated_product
from .parts import AdapterParts, Tensors, take_apart

NEW, NEAREST = "new", "nearest"
TOKENS = 4_096
"""So many tokens of the new texts tell the nearest adapter: adapters differ by far more than such a mean varies."""
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_ROW, _HIDDEN = "lora_router.weight", "lora_router.hidden_weight"

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Nearest:
    """Where new experts should start.

    Attributes:
        start_from: the adapter with the least loss on the new texts; "new" where the base model has less.
        base_loss: of the base model alone, in nats per token.
        losses: of each active adapter alone, by name.
    """

    start_from: str
    base_loss: float
    losses: dict[str, float]


def nearest_adapter(model: PeftModel, batches: Iterable[Batch], *, max_tokens: int = TOKENS) -> Nearest:
    """The active adapter that alone has the least loss on the first new texts.

    The loss, not the domain classifier, decides: the classifier tells which old domain the texts look like, and cannot
    say that none of its adapters helps with them. It takes a pass over max_tokens for each adapter, and one for the
    base model.

    Args:
        batches: arguments of the model's forward; with `labels` the loss is theirs, else that of every token.
        max_tokens: predicted tokens to read, or a few more.

    Raises:
        ValueError: the batches hold no token to predict.
    """
    taken = _first(batches, max_tokens)
    if not taken:
        raise ValueError("`batches` hold no token to predict; give texts of the new domain")
    with undisturbed(model), torch.no_grad():
        with model.disable_adapter():
            base = _loss(model, taken)
        losses = {}
        for name in list(model.active_adapters):
            with alone(model, name):
                losses[name] = _loss(model, taken)
    best = min(losses, key=lambda name: losses[name])
    return Nearest(best if losses[best] < base else NEW, base, losses)


def _first(batches: Iterable[Batch], max_tokens: int) -> list[tuple[dict[str, Tensor], int]]:
    """The first batches with labels, and how many tokens each predicts."""
    taken: list[tuple[dict[str, Tensor], int]] = []
    for batch in batches:
        inputs = dict(batch)
        if "labels" not in inputs:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
        if predicted := int((inputs["labels"][:, 1:] != -100).sum()):
            taken.append((inputs, predicted))
        if sum(count for _, count in taken) >= max_tokens:
            break
    return taken


def _loss(model: PeftModel, taken: Sequence[tuple[dict[str, Tensor], int]]) -> float:
    losses = [
        float(model(**{key: value.to(model.device) for key, value in inputs.items()}).loss) * predicted
        for inputs, predicted in taken
    ]
    return sum(losses) / sum(predicted for _, predicted in taken)


@torch.no_grad()
def copy_experts(model: PeftModel, source: str, target: str) -> None:
    """Let the experts of one adapter, new still, be those of another. Maturity and counters stay.

    As many experts are copied to the last bit; more share the singular directions of one, fewer are the best
    approximation of several. Under even routing both adapters do the same, as far as the rank allows.

    Raises:
        ValueError: the source adapts a linear that the target does not, or has routers of another form.
    """
    adapters = {adapter.name: adapter for adapter in take_apart(model)}
    old, new = adapters[source], adapters[target]
    _check_takes(old, new)
    for key, tensor in new.shared.items():
        if key.endswith(_HIDDEN) and key in old.shared:
            tensor.copy_(old.shared[key])
    for number, expert in enumerate(new.experts):
        shared_by, part, parts = _share(number, len(new.experts), len(old.experts))
        olds = [old.experts[j] for j in shared_by]
        for key, tensor in expert.items():
            if key.endswith(_ROW) and key in olds[0]:
                tensor.copy_(torch.stack([one[key] for one in olds]).mean(0))
        for linear in (key.removesuffix(_A) for key in expert if key.endswith(_A) and key in olds[0]):
            _copy_linear(linear, olds, old, expert, new, part, parts)


def _check_takes(old: AdapterParts, new: AdapterParts) -> None:
    linears = {key for key in old.experts[0] if key.endswith(_A)}
    if lacking := sorted(linears - new.experts[0].keys()):
        linear = lacking[0].removeprefix(_PREFIX).removesuffix(_A)
        raise ValueError(
            f"`start_from` ({old.name!r}): it adapts `{linear}`, which the new experts do not; give them its "
            "`target_modules`, or start them from 'new'"
        )
    widths = [each.config.router_hidden_size for each in (old, new)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"`start_from` ({old.name!r}): its routers have `router_hidden_size` {widths[0]}, those of the new experts "
            f"{widths[1]}; give them the same, or start them from 'new'"
        )


def _share(number: int, n: int, m: int) -> tuple[list[int], int, int]:
    """What new expert `number` of n gets of m old ones: of which, and which part of how many.

    >>> [_share(i, 4, 3) for i in range(4)]
    [([0], 0, 2), ([1], 0, 1), ([2], 0, 1), ([0], 1, 2)]
    >>> [_share(i, 2, 3) for i in range(2)]
    [([0, 2], 0, 1), ([1], 0, 1)]
    """
    if n < m:
        return list(range(number, m, n)), 0, 1
    return [number % m], number // m, len(range(number % m, n, m))


def _copy_linear(
    linear: str, olds: Sequence[Tensors], old: AdapterParts, expert: Tensors, new: AdapterParts, part: int, parts: int
) -> None:
    to_A, to_B = expert[linear + _A], expert[linear + _B]
    rank, name = len(to_A), linear.removeprefix(_PREFIX)
    to_B.zero_()
    old_rank = len(olds[0][linear + _A])
    is_whole = len(olds) == parts == 1
    scale = scaling_of(old.config, name, old_rank) / scaling_of(new.config, name, rank)
    scale *= len(new.experts) / len(old.experts)
    if is_whole and old_rank <= rank:
        to_A[:old_rank] = olds[0][linear + _A]
        to_B[:, :old_rank] = olds[0][linear + _B] * scale
        return
    lora_A = torch.cat([one[linear + _A].double() for one in olds])
    lora_B = torch.cat([one[linear + _B].double() for one in olds], dim=1) * scale
    lora_A, lora_B = _directions(lora_A, lora_B, part, parts, rank)
    lora_A, lora_B = _as_large_as(to_A[: len(lora_A)].double(), lora_A, lora_B)
    to_A[: len(lora_A)] = lora_A.to(to_A)
    to_B[:, : len(lora_A)] = lora_B.to(to_B)


def _directions(lora_A: Tensor, lora_B: Tensor, part: int, parts: int, rank: int) -> Factor:
    """Every parts-th singular direction of B A from number `part` on, at most `rank`, without those of nothing."""
    wanted = min(len(lora_A), lora_A.shape[1], len(lora_B), part + parts * rank)
    low_A, low_B = truncated_product(lora_A, lora_B, wanted)
    low_A, low_B = low_A[part::parts][:rank], low_B[:, part::parts][:, :rank]
    found = low_A.norm(dim=1) > 0
    return low_A[found], low_B[:, found]


def _as_large_as(fresh: Tensor, lora_A: Tensor, lora_B: Tensor) -> Factor:
    """The same product with rows of A as long as fresh ones: B learns by them as fast as in a new expert."""
    lengths = fresh.norm(dim=1, keepdim=True)
    return F.normalize(lora_A, dim=1) * lengths, lora_B * (lora_A.norm(dim=1, keepdim=True) / lengths).t()
