"""The end of a training forward: balancing loss, maturity and statistics.

Shapes: E experts, L routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass, make_dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..config import MoELoraConfig
from ..ops.ranks import num_ranks
from ..routing import ExpertRouter
from ..routing.loss_free import bias_steps
from ..routing.sums import RoutingSums, RoutingTotals, counting_alone, without_non_finite
from .interfaces import MixtureRouter
from .overflow import Growth, may_be_scaled
from .state import ForwardContext

# Made here, because torch before 2.13 cannot trace its making; every one reads what accelerate's last Accelerator set.
_GRADIENTS = GradientState()


def finish_forward(context: ForwardContext, model: nn.Module, output: Any) -> Any:
    """Count what the routers did and, in training, add the balancing loss to the output's loss."""
    is_training_step = context.training and torch.is_grad_enabled()
    groups = _alike(context.records)
    for group in groups:
        RoutingTotals.add_each([router.totals for router in group.routers], group.counted, is_training_step)
    if not (is_training_step and groups):
        return output
    state = context.state
    all_sums, targets, world_size = _over_ranks([group.stacked() for group in groups], _num_targets(context, model))
    growth = _grow_all(context, model, groups, all_sums)
    losses_L = _balancing_losses(groups, all_sums, state.config.load_balance_loss_type)
    if state.window is not None:
        names = [router.name for group in groups for router in group.routers]
        state.window.add(names, [row for group in groups for row in group.counted.unbind(0)], losses_L)
    state.balancing_loss = losses_L.mean()
    share = _accumulation_share(context, targets, world_size)
    output = _add_to_output(output, state.balancing_loss, state.config.balancing_coef, share, context)
    if growth is not None:
        growth.watch(output)
    return output


def _grow_all(
    context: ForwardContext, model: nn.Module, groups: Sequence[_Group], all_sums: Sequence[RoutingSums]
) -> Growth | None:
    """Let maturity and counters grow; the growth is returned where a loss scaler may have it taken back."""
    state, growth = context.state, None
    is_last_micro_batch = getattr(_GRADIENTS, "sync_gradients", True)  # unset where accelerate was reset
    # A compiled graph has no place for hooks on its own backward.
    if is_last_micro_batch and not torch.compiler.is_compiling() and may_be_scaled(model, all_sums[0].packed.device):
        growing = [router for group in groups for r in group.routers for router in r.active_routers() if _grows(router)]
        buffers = [b for r in growing for b in (r.maturity, r.tokens_per_expert, r.selection_bias) if b is not None]
        parameters = [parameter for router in growing for parameter in router.parameters()]
        growth = state.growth = Growth(model, buffers, parameters, state.growth) if buffers else None
    for group, sums in zip(groups, all_sums, strict=True):
        grow(group.routers, sums, state.config, commit=is_last_micro_batch)
    return growth


def _grows(router: ExpertRouter) -> bool:
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

    def stacked(self) -> RoutingSums:
        """[L, ...], with gradients."""
        probs = torch.stack([sums.probs for sums in self._sums])
        return RoutingSums(self.packed, probs, torch.stack([sums.squared_lse for sums in self._sums]))


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
    return torch.cat([loss.to(losses[0].device) for loss in losses])


def grow(routers: Sequence[MixtureRouter], sums: RoutingSums, config: MoELoraConfig, commit: bool) -> None:
    """Add a training forward's routing mass and assignments; commit adds them to maturity and counters, and moves the
    biases that balance the load.

    Maturity must not move between the micro-batches of one optimizer step, or accumulated gradients would differ from
    those of one large batch. A few operations serve all routers.

    Args:
        sums: of all routers, stacked, and finite.
    """
    with counting_alone():
        _grow(routers, sums, config, commit)


def _grow(routers: Sequence[MixtureRouter], sums: RoutingSums, config: MoELoraConfig, commit: bool) -> None:
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
    parts = [part for part in parts if _grows(part[0])]
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
        steps = bias_steps(counts_E[None], speed, sizes if router.is_gated else None)[0].split(sizes)
        for expert_router, step in zip(router.active_routers(), steps, strict=True):
            if expert_router.selection_bias is not None and _grows(expert_router):
                biases.append(expert_router.selection_bias)
                moves.append(step.to(expert_router.selection_bias.device))
    if biases:
        torch._foreach_add_(biases, moves)


def _by_adapter(router: MixtureRouter, mass_E: Tensor, counts_E: Tensor) -> list[tuple[ExpertRouter, Tensor, Tensor]]:
    sizes = [count for _, count in router.pool]
    return list(zip(router.active_routers(), mass_E.split(sizes), counts_E.split(sizes), strict=True))


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


def _num_targets(context: ForwardContext, model: nn.Module) -> Tensor:
    """Number of tokens that the task loss predicts in this batch, counted as the Trainer counts them."""
    labels = context.inputs.get("shift_labels")
    if labels is None:
        labels = context.inputs.get("labels")
        shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if labels is not None and shifts and not is_encoder_decoder:
            labels = labels[..., 1:]
    return torch.zeros(()) if labels is None else (labels != -100).sum()


def _accumulation_share(context: ForwardContext, num_targets: Tensor, world_size: int) -> Tensor | float:
    """This micro-batch's part of its optimizer step: 1 unless the loss is normalised by `num_items_in_batch`."""
    num_items = context.inputs.get("num_items_in_batch")
    if num_items is None:
        return 1.0
    return num_targets / torch.as_tensor(num_items, device=num_targets.device).clamp(min=1) / world_size


def _add_to_output(output: Any, loss: Tensor, coef: float, share: Tensor | float, context: ForwardContext) -> Any:
    has_labels = context.inputs.get("labels") is not None or context.inputs.get("shift_labels") is not None
    weighted = loss * coef
    if isinstance(output, dict):
        if has_labels and output.get("loss") is not None:
            output["loss"] = _plus(output["loss"], weighted * share)
        if has_labels and output.get("log_probs") is not None and output.get("label_mask") is not None:
            # TRL >= 1.15 computes its loss from log_probs and ignores `loss`. The term's value is zero and its
            # gradient, summed over the targets and divided by their number as TRL does, that of `weighted`.
            straight_through = (weighted - weighted.detach()).to(output["log_probs"].device)
            output["log_probs"] = output["log_probs"] - straight_through * output["label_mask"]
        return _with_balancing_loss(output, loss)
    if isinstance(output, tuple) and has_labels:
        return (_plus(output[0], weighted * share), *output[1:])
    return output


def _with_balancing_loss(output: dict[str, Any], loss: Tensor) -> dict[str, Any]:
    """The output with one more entry, in a class that knows it: DDP takes outputs apart and makes them anew."""
    cls = type(output)
    extended = _output_class(cls)
    if extended is not None and all(
        hasattr(cls, name) for name in output
    ):  # fields have defaults; other entries do not
        return extended(**output, balancing_loss=loss)
    output["balancing_loss"] = loss
    return output


@torch.compiler.assume_constant_result
def _output_class(cls: type) -> Any:
    """The subclass of an output class that has a `balancing_loss`, made once; None where it is no dataclass."""
    name = f"MoELora{cls.__name__}"
    if not is_dataclass(cls):
        return None
    if getattr(globals().get(name), "__base__", None) is not cls:
        namespace = {
            "__module__": __name__,
            "__doc__": f"A {cls.__name__} of a training forward, with `balancing_loss`.",
        }
        fields = [("balancing_loss", Tensor | None, None)]
        globals()[name] = make_dataclass(name, fields, bases=(cls,), namespace=namespace)
    return globals()[name]  # importable, so that outputs can be pickled


def _plus(task_loss: Tensor, addend: Tensor) -> Tensor:
    return task_loss + addend.to(task_loss.device, task_loss.dtype)
