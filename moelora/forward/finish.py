"""The end of a training forward: balancing loss, maturity and statistics.

Shapes: E experts, L routers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import is_dataclass, make_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import MoELoraConfig
from ..ops.data_parallel import num_ranks
from ..routing import ExpertRouter
from ..routing.loss_free import bias_steps
from ..routing.sums import RoutingSums, RoutingTotals, counting_alone, without_non_finite
from .delivery import carry, check_can_carry, deliver, has_labels, is_last_micro_batch, num_targets, share_of_targets
from .interfaces import MixtureRouter
from .overflow import StepRollback, may_be_scaled
from .state import ForwardContext


def finish_forward(context: ForwardContext, model: nn.Module, output: Any) -> Any:
    """Count what the routers did and, in training, add the balancing loss to the output's loss."""
    is_training_step = context.training and torch.is_grad_enabled()
    groups = _alike(context.records)
    for group in groups:
        RoutingTotals.add_each([router.totals for router in group.routers], group.counted, is_training_step)
    if not (is_training_step and groups):
        return output
    state = context.state
    reads = state.config.balancing.reads
    stacked = [group.stacked(reads) for group in groups]
    all_sums, targets, world_size = _over_ranks(stacked, num_targets(context, model))
    rollback = _advance_all(context, model, groups, all_sums)
    losses_L = _balancing_losses(groups, all_sums, state.config.load_balance_loss_type)
    if state.window is not None:
        names = [router.name for group in groups for router in group.routers]
        state.window.add(names, [row for group in groups for row in group.counted.unbind(0)], losses_L)
    state.balancing_loss, token = deliver(context, model, losses_L.mean(), targets)
    share = _own_share(context, targets, world_size)
    output = _add_to_output(output, state.balancing_loss, share, token, context)
    if rollback is not None:
        rollback.watch(output)
    return output


def _advance_all(
    context: ForwardContext, model: nn.Module, groups: Sequence[_Group], all_sums: Sequence[RoutingSums]
) -> StepRollback | None:
    """Advance maturity and counters; returns what undoes that where a loss scaler may skip the step."""
    state, rollback = context.state, None
    is_last = is_last_micro_batch()
    # A compiled graph has no place for hooks on its own backward.
    if is_last and not torch.compiler.is_compiling() and may_be_scaled(model, all_sums[0].packed.device):
        learning = [
            router for group in groups for r in group.routers for router in r.active_routers() if _learns(router)
        ]
        buffers = [b for r in learning for b in (r.maturity, r.tokens_per_expert, r.selection_bias) if b is not None]
        parameters = [parameter for router in learning for parameter in router.parameters()]
        rollback = state.rollback = StepRollback(model, buffers, parameters, state.rollback) if buffers else None
    for group, sums in zip(groups, all_sums, strict=True):
        advance(group.routers, sums, state.config, commit=is_last)
    return rollback


def _learns(router: ExpertRouter) -> bool:
    return not router.is_frozen


class _Group:
    """Routers with equally many experts on one device, and what they report: as a rule, all of them. L is their number.

    Attributes:
        packed: [L, F], their sums, zero for those that are left out because theirs are not finite.
        left_out: [L, 1] bool.
        counted: [L, F + 1], both.
    """

    def __init__(self, records: Sequence[tuple[MixtureRouter, RoutingSums]]) -> None:
        self.routers = [router for router, _ in records]
        self._sums = [sums for _, sums in records]
        self.packed, self.left_out = without_non_finite(torch.stack([sums.packed for sums in self._sums]))
        self.counted = torch.cat([self.packed, self.left_out], dim=-1)

    def stacked(self, reads: Collection[str]) -> RoutingSums:
        """[L, ...], with gradients: of the squared logsumexp only where the balancing loss reads it."""
        probs = torch.stack([sums.probs for sums in self._sums])
        if "squared_lse" in reads:
            return RoutingSums(self.packed, probs, torch.stack([sums.squared_lse for sums in self._sums]))
        return RoutingSums(self.packed, probs, self.packed[:, -1])


def _alike(records: Sequence[tuple[MixtureRouter, RoutingSums]]) -> list[_Group]:
    """The routers that ran, in groups; one that ran twice (encoders called again) is in two groups, for what is added
    to it is added in place."""
    groups: dict[Any, list[tuple[MixtureRouter, RoutingSums]]] = {}
    turns: dict[MixtureRouter, int] = {}
    for router, sums in records:
        turns[router] = turns.get(router, -1) + 1
        groups.setdefault((sums.packed.shape, sums.packed.device, turns[router]), []).append((router, sums))
    return [_Group(group) for group in groups.values()]


def _balancing_losses(groups: Sequence[_Group], all_sums: Sequence[RoutingSums], loss_type: str) -> Tensor:
    """[L] of all groups' routers; zero, with no gradient, for one that is left out, so that others' stay finite."""
    losses = [
        sums.balancing_loss(loss_type).masked_fill(group.left_out.squeeze(-1), 0.0)
        for group, sums in zip(groups, all_sums, strict=True)
    ]
    return losses[0] if len(losses) == 1 else torch.cat([loss.to(losses[0].device) for loss in losses])


def advance(routers: Sequence[MixtureRouter], sums: RoutingSums, config: MoELoraConfig, commit: bool) -> None:
    """Add a training forward's routing mass and assignments; commit adds them to maturity and counters, and moves the
    biases that balance the load.

    Maturity must not move between the micro-batches of one optimizer step, or accumulated gradients would differ from
    those of one large batch. A few operations serve all routers.

    Args:
        sums: of all routers, stacked, and finite.
    """
    with counting_alone():
        _advance(routers, sums, config, commit)


def _advance(routers: Sequence[MixtureRouter], sums: RoutingSums, config: MoELoraConfig, commit: bool) -> None:
    gained = torch.stack([sums.mass, sums.assignments], dim=1)  # [L, 2, E]
    if any(router.pending is not None for router in routers):
        zero = torch.zeros_like(gained[0])
        gained = gained + torch.stack([zero if r.pending is None else r.pending.to(zero.device) for r in routers])
    for router, row in zip(routers, gained.unbind(0), strict=True):
        router.pending = None if commit else row
    if not commit:
        return
    if config.balancing.moves_bias:
        _move_biases(routers, gained[:, 1], config.bias_update_speed)
    masses, counts = gained[:, 0].unbind(0), gained[:, 1].to(torch.int64).unbind(0)
    parts = [part for router, *rows in zip(routers, masses, counts, strict=True) for part in _by_adapter(router, *rows)]
    parts = [part for part in parts if _learns(part[0])]
    if not parts:
        return
    maturities = [expert_router.maturity for expert_router, _, _ in parts]
    torch._foreach_add_(
        maturities,
        [mass.to(m.device) for (_, mass, _), m in zip(parts, maturities, strict=True)],
        alpha=1 / config.maturity_tokens,
    )
    torch._foreach_clamp_max_(maturities, 1.0)
    counters = [expert_router.tokens_per_expert for expert_router, _, _ in parts]
    torch._foreach_add_(counters, [taken.to(c.device) for (_, _, taken), c in zip(parts, counters, strict=True)])


def _move_biases(routers: Sequence[MixtureRouter], counts_LE: Tensor, speed: float) -> None:
    """Where domains decide between adapters, the load is balanced within each adapter."""
    biases, moves = [], []
    for router, counts_E in zip(routers, counts_LE, strict=True):
        sizes = [count for _, count in router.pool]
        steps = bias_steps(counts_E[None], speed, sizes if router.routes_by_domain else None)[0].split(sizes)
        for expert_router, step in zip(router.active_routers(), steps, strict=True):
            if expert_router.selection_bias is not None and _learns(expert_router):
                biases.append(expert_router.selection_bias)
                moves.append(step.to(expert_router.selection_bias.device))
    if biases:
        torch._foreach_add_(biases, moves)


def _by_adapter(router: MixtureRouter, mass_E: Tensor, counts_E: Tensor) -> list[tuple[ExpertRouter, Tensor, Tensor]]:
    routers = router.active_routers()
    if len(routers) == 1:
        return [(routers[0], mass_E, counts_E)]
    sizes = [count for _, count in router.pool]
    return list(zip(routers, mass_E.split(sizes), counts_E.split(sizes), strict=True))


def _over_ranks(all_sums: list[RoutingSums], num_targets: Tensor) -> tuple[list[RoutingSums], Tensor, int]:
    """Sum counts over data-parallel ranks in one collective; probabilities stay local, scaled for averaged gradients.

    DDP averages gradients over ranks, so the local part of a global mean has to count once per rank.
    """
    world_size = num_ranks()
    if world_size == 1:
        return all_sums, num_targets, 1
    device = all_sums[0].packed.device
    flat = [sums.packed.to(device, torch.float32).flatten() for sums in all_sums]
    flat.append(num_targets.to(device, torch.float32).reshape(1))
    total = torch.cat(flat)
    dist.all_reduce(total)
    *pieces, num_targets = total.split([piece.numel() for piece in flat])
    reduced = [
        RoutingSums(
            piece.view_as(sums.packed).to(sums.packed.device), sums.probs * world_size, sums.squared_lse * world_size
        )
        for piece, sums in zip(pieces, all_sums, strict=True)
    ]
    return reduced, num_targets.squeeze(0), world_size


def _own_share(context: ForwardContext, targets: Tensor, world_size: int) -> Tensor | None:
    """This micro-batch's part of its step in the model's own loss: None, all of it, unless that is normalised by
    `num_items_in_batch`.

    The Trainer multiplies such a loss by the number of ranks, over which gradients are averaged.
    """
    num_items = context.inputs.get("num_items_in_batch")
    return None if num_items is None else share_of_targets(targets, num_items) / world_size


def _add_to_output(
    output: Any, loss: Tensor, share: Tensor | None, token: Tensor | None, context: ForwardContext
) -> Any:
    """The output, to whose own loss the balancing loss is added; all else carries the token."""
    has_loss = has_labels(context)
    if isinstance(output, dict):
        has_loss = has_loss and output.get("loss") is not None
        output = carry(output, token, without=("loss",) if has_loss else ())
        if has_loss:
            output["loss"] = _plus(output["loss"], _part_of_step(loss, share, context))
        return _with_balancing_loss(output, loss)
    if isinstance(output, tuple) and has_loss:
        return (_plus(output[0], _part_of_step(loss, share, context)), *carry(output[1:], token))
    if token is not None and not torch.compiler.is_compiling():
        check_can_carry(context.state, output)
    return carry(output, token)


def _part_of_step(loss: Tensor, share: Tensor | None, context: ForwardContext) -> Tensor:
    """What the model's own loss is increased by."""
    weighed = loss * context.state.config.balancing_coef
    return weighed if share is None else weighed * share


def _with_balancing_loss(output: dict[str, Any], loss: Tensor) -> dict[str, Any]:
    """The output with the loss under both its names, in a class that knows them: DDP takes outputs apart and makes them
    anew. A base that has an `aux_loss` of its own keeps it."""
    cls = type(output)
    extended = _output_class(cls)
    entries = dict.fromkeys(_names(cls), loss)
    is_made_of_fields = all(hasattr(cls, name) for name in output)  # they have defaults; other entries do not
    if extended is not None and is_made_of_fields:
        return extended(**output, **entries)
    for name, value in entries.items():
        if name == "balancing_loss" or name not in output:
            output[name] = value
    return output


def _names(cls: type) -> list[str]:
    """What an output of this class does not call something else already."""
    return ["balancing_loss"] if hasattr(cls, "aux_loss") else ["balancing_loss", "aux_loss"]


@torch.compiler.assume_constant_result
def _output_class(cls: type) -> Any:
    """The subclass of an output class that has the names of the loss, made once; None where it is no dataclass."""
    name = f"MoELora{cls.__name__}"
    if not is_dataclass(cls):
        return None
    if getattr(globals().get(name), "__base__", None) is not cls:
        namespace = {
            "__module__": __name__,
            "__doc__": f"A {cls.__name__} of a training forward, with `balancing_loss`.",
        }
        fields = [(field, Tensor | None, None) for field in _names(cls)]
        globals()[name] = make_dataclass(name, fields, bases=(cls,), namespace=namespace)
    return globals()[name]  # importable, so that outputs can be pickled


def _plus(task_loss: Tensor, addend: Tensor) -> Tensor:
    return task_loss + addend.to(task_loss.device, task_loss.dtype)
