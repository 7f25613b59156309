"""Read every router's weights for every token off a model, and the loss with an expert taken away.

Shapes: B batch, S sequence, T tokens without padding, E experts of the whole mixture, R routers, H router input width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from ..data.texts import TextBlock
from ..forward.alignment import lines_up
from ..forward.state import RoutingState
from ..routing import FixedRouter
from ..routing.sums import RouterStats, RoutingTotals
from ..tuner.layer import MoELoraLayer
from ..tuner.router import MoELoraRouter

ATTACHED = "attached router"


@dataclass(frozen=True)
class ObservedBatch:
    """What one batch of blocks showed, on the CPU.

    Attributes:
        weights: for each block [R, T, E]; they sum to 1 unless they are the user's own.
        losses: for each block [T - 1], of predicting each token but the first, in nats.
    """

    weights: list[Tensor]
    losses: list[Tensor]


def routers_of(state: RoutingState) -> dict[str, Any]:
    """The routers that decide, by the names reports use: the attached one alone where there is one."""
    if state.attached is not None:
        return {ATTACHED: state.attached}
    return {name or "model": router for name, router in state.routers.items() if router.pool}


def columns_of(router: nn.Module, state: RoutingState) -> list[int]:
    """Which of the mixture's experts a router's columns are: a block may lack an adapter that others have."""
    if not isinstance(router, MoELoraRouter):
        return list(range(state.num_experts))
    here = {name for name, _ in router.pool}
    columns: list[int] = []
    start = 0
    for name, count in state.pool:
        columns += range(start, start + count) if name in here else ()
        start += count
    return columns


def reading_routers(model: PeftModel, block: TextBlock) -> list[str]:
    """The routers that decide on each token when the model reads text, by name: those of an image tower do not.
    The model must be [`undisturbed`].

    Raises:
        ValueError: none does.
    """
    state = model.base_model.routing
    seen: set[str] = set()
    count_anew(state)
    ids, mask = padded([block], 0, model.device)

    def note(name: str) -> Callable:
        return lambda router, args, weights: seen.add(name) if lines_up(weights.shape[:-1], ids.shape) else None

    with torch.no_grad(), _hooks(state, lambda name, router: note(name)):
        model(input_ids=ids, attention_mask=mask)
    layers = (module for module in model.modules() if isinstance(module, MoELoraLayer))
    seen -= {layer.link.name for layer in layers if layer.link.reads == "others"}
    names = list(routers_of(state))
    if not seen:
        raise ValueError(
            f"none of the routers ({', '.join(names[:3])}) runs when the model reads text; give `target_modules` of "
            "its language model"
        )
    return [name for name in names if name in seen]


def look(
    model: PeftModel, blocks: Sequence[TextBlock], pad: int, routers: Sequence[str] | None = None
) -> ObservedBatch:
    """Run blocks through the model in one padded batch; padding is in nothing that comes back.

    Args:
        routers: whose weights are wanted, by name; all by default.

    Raises:
        ValueError: one of them did not run.
    """
    state = model.base_model.routing
    names = list(routers_of(state)) if routers is None else routers
    lengths = [len(block.token_ids) for block in blocks]
    ids, mask = padded(blocks, pad, model.device)
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), _hooks(state, lambda name, router: _keep(seen, name, state)):
        logits = model(input_ids=ids, attention_mask=mask).logits
    if silent := [name for name in names if name not in seen]:
        raise ValueError(
            f"router {silent[0]!r} did not run for some of the texts; leave its linears out with `exclude_modules`"
        )
    weights_RBSE = torch.stack([seen[name].view(*ids.shape, -1) for name in names]).cpu()
    return ObservedBatch(
        weights=[weights_RBSE[:, row, :length] for row, length in enumerate(lengths)],
        losses=losses_of(logits, ids, lengths),
    )


def losses_without(model: PeftModel, blocks: Sequence[TextBlock], pad: int, expert: int) -> list[Tensor]:
    """For each block [T - 1] losses with one expert removed from every router."""
    state = model.base_model.routing
    lengths = [len(block.token_ids) for block in blocks]
    ids, mask = padded(blocks, pad, model.device)
    with torch.no_grad(), _hooks(state, lambda name, router: _remove(router, state, expert)):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return losses_of(logits, ids, lengths)


def padded(blocks: Sequence[TextBlock], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, S], padded on the right."""
    width = max(len(block.token_ids) for block in blocks)
    ids = torch.tensor([block.token_ids + [pad] * (width - len(block.token_ids)) for block in blocks])
    mask = torch.tensor([[1] * len(block.token_ids) + [0] * (width - len(block.token_ids)) for block in blocks])
    return ids.to(device), mask.to(device)


def losses_of(logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """For each row [T - 1] nats of predicting each token but the first, on the CPU; padding is left out."""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none").cpu()
    return [losses[row, : length - 1] for row, length in enumerate(lengths)]


@contextmanager
def before(hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within, each of these modules calls its hook before its forward."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def _hooks(state: RoutingState, make: Callable[[str, nn.Module], Callable]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, router in routers_of(state).items():
            stack.callback(router.register_forward_hook(make(name, router)).remove)
        yield


def _keep(seen: dict[str, Tensor], name: str, state: RoutingState) -> Callable:
    def hook(router: nn.Module, args: tuple, weights: Tensor) -> None:
        is_built_in = isinstance(router, MoELoraRouter)
        unscaled = weights.float() / (state.config.routing_scale if is_built_in else 1.0)
        whole = unscaled.new_zeros(*weights.shape[:-1], state.num_experts)
        whole[..., columns_of(router, state)] = unscaled
        seen[name] = whole

    return hook


def _remove(router: nn.Module, state: RoutingState, expert: int) -> Callable:
    columns = columns_of(router, state)
    position = columns.index(expert) if expert in columns else None

    def hook(module: nn.Module, args: tuple, weights: Tensor) -> Tensor:
        if position is None:
            return weights
        if isinstance(module, MoELoraRouter) and not state.config.router_kind.is_constant:
            return weights_without(module, args[0], position).to(weights) * state.config.routing_scale
        # Weights given from outside have no scores behind them: the others take over in proportion.
        rest = weights.index_fill(-1, torch.tensor([position], device=weights.device), 0)
        return rest * (weights.sum(-1, keepdim=True) / rest.sum(-1, keepdim=True).clamp(min=1e-9))

    return hook


def weights_without(router: MoELoraRouter, hidden: Tensor, position: int | None) -> Tensor:
    """Weights [..., E] for hidden [..., H] had this expert never been: its logit is -inf before softmax and top-k.

    A lone expert leaves nothing behind: weights of zero. None removes nobody.
    """
    if router.out_features == 1 and position is not None:
        return hidden.new_zeros(*hidden.shape[:-1], 1, dtype=torch.float32)
    return router.decide(hidden, without=position)


@contextmanager
def undisturbed(model: PeftModel) -> Iterator[None]:
    """Put the model in evaluation mode, and its mode and statistics back as they were."""
    state = model.base_model.routing
    modes = {module: module.training for module in model.modules()}
    totals = {router: router.totals for router in state.routers.values()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for router, before in totals.items():
            router.totals = before


def count_anew(state: RoutingState) -> None:
    """Let every router start new totals; within [`undisturbed`], which keeps the old ones."""
    for router in state.routers.values():
        router.totals = RoutingTotals()


def stats_by_name(model: PeftModel) -> dict[str, RouterStats]:
    """`routing_stats` by the names reports use."""
    return {name or "model": stats for name, stats in cast(Any, model).routing_stats().items()}


def maturity_of(router: nn.Module, state: RoutingState) -> list[float]:
    """[E], NaN for experts that a router does not serve and for an attached router."""
    values = [float("nan")] * state.num_experts
    if isinstance(router, MoELoraRouter):
        for column, value in zip(columns_of(router, state), router.maturity().tolist(), strict=True):
            values[column] = value
    return values


def is_learned(router: nn.Module) -> bool:
    """Whether a router has scores of its own, whose sharpness can be told from its weights."""
    return isinstance(router, MoELoraRouter) and not any(isinstance(r, FixedRouter) for r in router.active_routers())
