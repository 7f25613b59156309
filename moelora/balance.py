"""The end of a training forward: balancing loss, maturity and statistics.

Shapes: E experts, R routers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .stats import RoutingSums

if TYPE_CHECKING:
    from .state import ForwardContext


def finish_forward(context: ForwardContext, model: nn.Module, output: Any) -> Any:
    """Count what the routers did and, in training, add the balancing loss to the output's loss."""
    state = context.state
    is_training_step = context.training and torch.is_grad_enabled()
    flats = [sums.flat() for _, sums in context.records]
    for (router, _), flat in zip(context.records, flats, strict=True):
        router.totals.add(flat)
    if not (is_training_step and context.records):
        return output
    all_sums, targets, world_size = _over_ranks([sums for _, sums in context.records], _num_targets(context, model))
    for (router, _), sums in zip(context.records, all_sums, strict=True):
        router.grow(sums, commit=GradientState().sync_gradients)
    loss_type = state.config.load_balance_loss_type
    losses = [sums.balancing_loss(loss_type) for sums in all_sums]
    losses_R = torch.stack([loss.to(losses[0].device) for loss in losses])
    if state.window is not None:
        state.window.add([router.name for router, _ in context.records], flats, losses_R)
    state.balancing_loss = losses_R.mean()
    share = _accumulation_share(context, targets, world_size)
    return _add_to_output(output, state.balancing_loss, state.config.router_aux_loss_coef, share, context)


def _over_ranks(all_sums: list[RoutingSums], num_targets: Tensor) -> tuple[list[RoutingSums], Tensor, int]:
    """Sum counts over data-parallel ranks in one collective; probabilities stay local, scaled for averaged gradients.

    DDP averages gradients over ranks, so the local part of a global mean has to count once per rank.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        return all_sums, num_targets, 1
    device = all_sums[0].mass.device
    counts = ("num_tokens", "assignments", "top1", "mass")
    flat = [getattr(sums, name).to(device, torch.float32).reshape(-1) for sums in all_sums for name in counts]
    flat.append(num_targets.to(device, torch.float32).reshape(1))
    total = torch.cat(flat)
    dist.all_reduce(total)
    pieces = iter(total.split([piece.numel() for piece in flat]))
    reduced = []
    for sums in all_sums:
        values = {name: next(pieces).view(getattr(sums, name).shape).to(sums.mass.device) for name in counts}
        local = {"probs": sums.probs * world_size, "squared_lse": sums.squared_lse * world_size}
        reduced.append(RoutingSums(**(vars(sums) | values | local)))
    return reduced, next(pieces).squeeze(0), world_size


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
        output["balancing_loss"] = loss
        return output
    if isinstance(output, tuple) and has_labels:
        return (_plus(output[0], weighted * share), *output[1:])
    return output


def _plus(task_loss: Tensor, addend: Tensor) -> Tensor:
    return task_loss + addend.to(task_loss.device, task_loss.dtype)
