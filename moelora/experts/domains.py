"""Statistics of an adapter's domain, by which a mixture of several tells whose domain a text is of.

Shapes: T tokens, H router input width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..report.observe import before, count_anew, undisturbed
from ..routing import Router, rms_norm
from ..routing.domain_classifier import FIRST_TOKENS, DomainStatistics, InputSketch, combined, discriminants, distinct
from ..tuner.router import MoELoraRouter

RANK = 128
TOKENS = 32_768
"""So many tokens show a domain; of a fourth of them, about twice as many prompts are taken for another task's
(docs/continual.md, "How well tasks are told")."""


def learn_domain(
    model: PeftModel,
    adapter_name: str,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_tokens: int = TOKENS,
    rank: int = RANK,
) -> int:
    """Run texts of an adapter's domain through the model, under that adapter alone, and keep statistics of what its
    routers read. Call it again after training: hidden states change with the experts.

    Each router of the adapter keeps the mean and covariance of its normalised inputs (H numbers times `rank` + 3), in
    buffers that are saved with the adapter; no text. The covariance is made for the adapter's `domain_window`. The
    first tokens of rows count as one in 16, however long the rows are. As soon as every active adapter has them, a
    classifier decides between adapters (docs/maths.md, "Domain classifier"): scores of one adapter no longer take from
    another. An adapter of one expert counts as mature from then on: it acts on its own domain alone, and a token costs
    one expert however many adapters there are.

    Args:
        batches: arguments of the model's forward (`input_ids`, `attention_mask`), enough for max_tokens or fewer.
        max_tokens: tokens to read, padding excluded.
        rank: directions of the covariance to keep, 1 or more; no more are kept than the inputs are wide.

    Returns:
        The number of tokens read.

    Raises:
        ValueError: there is no such adapter, its routing is fixed, a router is attached, the batches are empty, what a
            router reads is not finite, or `rank` is no integer of 1 or more; nothing has changed then.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`rank` ({rank!r}) is not valid; pass an integer of 1 or more, or call `forget_domain`")
    routers = _routers_of(model, adapter_name)
    device = next(iter(routers.values())).maturity.device
    window = model.peft_config[adapter_name].domain_window
    sketches = {name: _Sketches(router.hidden_size, rank, window, device) for name, router in routers.items()}
    with undisturbed(model), alone(model, adapter_name):
        tokens = _read(model, batches, sketches, max_tokens)
    if tokens < 2:
        raise ValueError(f"the batches for adapter {adapter_name!r} hold {tokens} tokens; give texts of its domain")
    if broken := [name for name, each in sketches.items() if not each.is_finite]:
        raise ValueError(
            f"what router {broken[0]!r} reads of the texts for adapter {adapter_name!r} is not finite (NaN or "
            "infinity); mend the model's weights, or compute in bfloat16 or float32; nothing has changed"
        )
    found = {name: each.finish() for name, each in sketches.items()}
    for name, router in routers.items():
        _keep(router, found[name], rank)
        if router.num_experts == 1:  # nobody beside it had to learn from its tokens
            router.maturity.fill_(1.0)
    model.peft_config[adapter_name].router_memory = rank
    refresh_domain_classifier(model)
    return tokens


def forget_domain(model: PeftModel, adapter_name: str) -> None:
    """Drop the statistics of an adapter's domain; domains then decide no more while it is active.

    Raises:
        ValueError: there is no such adapter, or its routing is fixed.
    """
    for router in _routers_of(model, adapter_name).values():
        router.make_domain(0)
    model.peft_config[adapter_name].router_memory = 0
    refresh_domain_classifier(model)


def knows_domain(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter has statistics of its domain."""
    return model.peft_config[adapter_name].router_memory > 0


def refresh_domain_classifier(model: PeftModel) -> None:
    """Solve for the classifier anew; needed only after loading adapters into a mixture that they did not grow in.

    Adapters of equal domains, as the parts of one that was split, stand for one domain.
    """
    for router in model.base_model.routing.routers.values():
        learned = [r for r in router.lora_router.values() if isinstance(r, Router) and r.has_domain]
        domains = distinct([expert_router.domain for expert_router in learned])
        if len(domains) < 2:
            continue
        solved = list(zip(*discriminants(domains), strict=True))
        for expert_router in learned:
            own = expert_router.domain
            weight, bias = next(pair for pair, domain in zip(solved, domains, strict=True) if domain.equals(own))
            expert_router.gate_weight.copy_(weight[None])
            expert_router.gate_bias.copy_(bias[None])


def _routers_of(model: PeftModel, adapter_name: str) -> dict[str, Router]:
    """An adapter's routers by name."""
    state = model.base_model.routing
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter {adapter_name!r} does not exist; there are {', '.join(model.peft_config)}")
    if model.peft_config[adapter_name].router_kind.is_constant:
        raise ValueError(
            f"adapter {adapter_name!r} is routed by constant weights (router_type='fixed'), whatever its domain"
        )
    if state.attached is not None:
        raise ValueError("an attached router decides, not the adapters' own; call `detach_router()` first")
    return {
        name: cast(Router, router[adapter_name])
        for name, router in state.routers.items()
        if adapter_name in router.lora_router
    }


@contextmanager
def alone(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Within, this adapter is the whole mixture; what is trainable stays so."""
    active = list(model.active_adapters)
    with model.base_model.keep_trainability():
        count_anew(model.base_model.routing)
        model.set_adapter([adapter_name])
        try:
            yield
        finally:
            model.set_adapter(active)


def _keep(router: Router, statistics: DomainStatistics, rank: int) -> None:
    router.make_domain(rank)
    router.memory_mean.copy_(statistics.mean)
    router.memory_directions.copy_(statistics.directions)
    router.memory_variance.copy_(statistics.variance)


class _Sketches:
    """Sketches what a router reads, the first tokens of texts apart from the others.

    The classifier adds up what the tokens of a window say, and tokens of one text say much the same: summed, they vary
    by more than so many tokens from anywhere would. So the covariance is that of sums over windows, which needs as many
    windows as the inputs are wide; the fewer there are, the more of that of single tokens is mixed in.

    Args:
        window: tokens that the classifier adds up; None: a whole text's.
    """

    def __init__(self, hidden_size: int, rank: int, window: int | None, device: torch.device) -> None:
        self.first, self.others, self.windows = (InputSketch(hidden_size, rank, device) for _ in range(3))
        self.window, self.device = window, device

    def add(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Add a forward's hidden states [..., H]; mask [...]: False on padding, which may be on either side."""
        here = torch.ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask
        is_first = here & (here.cumsum(-1) == 1) if here.dim() == 2 else torch.zeros_like(here)
        others = here & ~is_first
        self.first.add(self._normed(hidden, is_first))
        normed_TH = self._normed(hidden, others)
        self.others.add(normed_TH)
        # Of shapes that are no rows of text nobody knows which tokens belong together.
        piece_T = _windows_of(others, self.window).to(self.device) if others.dim() == 2 else None
        self.windows.add(normed_TH, piece_T)

    def _normed(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        """[T, H]."""
        return rms_norm(hidden[chosen.to(hidden.device)]).to(self.device)

    @property
    def is_finite(self) -> bool:
        """Whether all that was added is."""
        return all(bool(sketch.squares_H.isfinite().all()) for sketch in (self.first, self.others))

    def finish(self) -> DomainStatistics:
        """Of all tokens, first ones at their fixed share where there are others."""
        if not self.others.tokens:
            return self.first.finish()
        of_windows = self.windows.pieces / (self.windows.pieces + len(self.windows.sum_H))
        seen = [self.others.finish(), self.windows.finish()]
        of_others = combined(seen, self.others.rank, [1 - of_windows, of_windows])
        if not self.first.tokens:
            return of_others
        return combined([of_others, self.first.finish()], self.others.rank, [1 - FIRST_TOKENS, FIRST_TOKENS])


def _windows_of(chosen_BS: Tensor, window: int | None) -> Tensor:
    """[T]: for the chosen tokens of rows, the number of the window that each lies in, of those that follow one another.

    Example:
        >>> _windows_of(torch.tensor([[True, True, True], [False, True, True]]), 2).tolist()
        [0, 0, 1, 3, 3]
    """
    rows, length = chosen_BS.shape
    place_BS = (chosen_BS.cumsum(1) - 1) // (window or length)
    return (place_BS + length * torch.arange(rows, device=chosen_BS.device)[:, None])[chosen_BS]


def _read(
    model: PeftModel, batches: Iterable[Mapping[str, Tensor]], sketches: Mapping[str, _Sketches], max_tokens: int
) -> int:
    tokens = 0
    routers = model.base_model.routing.routers
    takes = inspect.signature(model.get_base_model().forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # nobody reads them
    readers = {name: _Reader(sketch) for name, sketch in sketches.items()}
    with torch.no_grad(), before((routers[name], reader) for name, reader in readers.items()):
        for batch in batches:
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            with suppress(_AllRead):
                model(**inputs | few)
            mask = inputs.get("attention_mask")
            tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            if tokens >= max_tokens:
                break
            only = next(iter(readers.values()))
            only.may_end |= len(readers) == only.calls == 1 and _may_be_left(model)
    return tokens


class _AllRead(Exception):  # noqa: N818 - no error
    """Ends a forward whose one router has read all that it reads: blocks that follow, most of the work, do not run."""


class _Reader:
    """A hook before a router: what it reads goes into its sketches. What another thread lets it read does not.

    Attributes:
        may_end: whether the forward may end here, as the router was called but once in a whole one.
    """

    def __init__(self, sketches: _Sketches) -> None:
        self.sketches, self.calls, self.may_end, self.thread = sketches, 0, False, get_ident()

    def __call__(self, router: MoELoraRouter, args: tuple[Any, ...]) -> None:
        if get_ident() != self.thread:
            return
        self.calls += 1
        hidden, _, mask, *counts = args
        if counts == [False]:  # padding may be among the tokens, and nobody knows where
            return
        self.sketches.add(hidden, mask)
        if self.may_end:
            raise _AllRead


def _may_be_left(model: nn.Module) -> bool:
    """Whether a forward may end in the middle: not where accelerate or FSDP2 brings weights and takes them away."""
    is_brought = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not is_brought and not any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
