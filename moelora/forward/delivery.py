"""How the balancing loss comes to the routers' gradient, whoever computes the loss of the task.

Where the model computes it, from labels, the balancing loss is added. A trainer that computes its own (label smoothing,
preferences, rewards) goes by other outputs, so these carry it: each passes through an identity whose backward says that
the step came this way. Autograd waits for all ways of a backward pass before it goes on to the balancing loss. So that
knows whether it is asked for through the output's loss, or by its name, and then comes as often as it is asked for; or
else by what carries it alone, and then comes once, as much as its coefficient says.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .overflow import may_be_scaled
from .state import ForwardContext, RoutingState
from .training_loop import TrainingLoop

# Made here, because torch before 2.13 cannot trace its making; every one reads what accelerate's last Accelerator set.
_GRADIENTS = GradientState()
_CACHES = ("past_key_values", "cache")  # what an output holds that is not computed with
_BY_HAND = "or add `router_aux_loss_coef * output.aux_loss` to your loss yourself, which is not counted twice"
_CALLBACK = "Pass callbacks=[moelora.MoELoraCallback()] to the Trainer"
_UNSCALED = (
    "the balancing loss may come to the routers too small: the model is in float16, so that a scaler may multiply the "
    "loss, and where the loss is not the model's own the model cannot see by how much. "
    f"{_CALLBACK}, or train in bfloat16, or pass `labels` and use `output.loss`, {_BY_HAND}"
)
_LAST_ONLY = (
    "gradients accumulate over several forwards, and the model cannot see over how many, so only the last one of each "
    f"step carries the balancing loss. {_CALLBACK}, so that all do, or pass `labels` and use `output.loss`, {_BY_HAND}"
)
_REPEATED = (
    "gradients accumulate over several forwards, of which the model is not told, so each of them adds the whole "
    "balancing loss. Accumulate by accelerate's `accumulate`, or pass `labels` and use `output.loss`, "
    f"{_BY_HAND}"
)
_NOWHERE = (
    "the balancing loss cannot reach the routers: the model's output is a {kind}, which has no tensor that could carry "
    "it. Return a tensor, a tuple or a dict, or add `router_aux_loss_coef * model.balancing_loss` to your loss"
)


# ---- how much --------------------------------------------------------------------------------------------------------


def is_last_micro_batch() -> bool:
    """Whether the optimizer steps after this forward, as accelerate and the Trainer say; True where nobody does."""
    return getattr(_GRADIENTS, "sync_gradients", True)  # unset where accelerate was reset


def num_targets(context: ForwardContext, model: nn.Module) -> Tensor:
    """Number of tokens that the task loss predicts in this batch, as the Trainer counts them; 0 without labels."""
    labels = context.inputs.get("shift_labels")
    if labels is None:
        labels = context.inputs.get("labels")
        shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
        is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if isinstance(labels, Tensor) and shifts and not is_encoder_decoder:
            labels = labels[..., 1:]
    # DETR's are a list, of boxes, in which the Trainer counts nothing either.
    return (labels != -100).sum() if isinstance(labels, Tensor) else torch.zeros(())


def share_of_targets(targets: Tensor, num_items: Any) -> Tensor:
    """[], a micro-batch's part of its optimizer step by the targets of all ranks.

    Args:
        num_items: the step's, a number or a tensor.
    """
    return targets / torch.as_tensor(num_items, device=targets.device).clamp(min=1)


def has_labels(context: ForwardContext) -> bool:
    """Whether the model computes a loss of its own."""
    return context.inputs.get("labels") is not None or context.inputs.get("shift_labels") is not None


def _carried_share(context: ForwardContext, targets: Tensor) -> tuple[Tensor | float, bool]:
    """This micro-batch's part of its step where the loss is not the model's own, and whether it is a mere count."""
    if has_labels(context):
        num_items = context.inputs.get("num_items_in_batch")
        num_items = _trainers_num_items() if num_items is None else num_items
        if num_items is not None:
            return share_of_targets(targets, num_items), False
    return _share_by_count(context.state.loop), True


def _trainers_num_items() -> Any:
    """What the Trainer whose `compute_loss` calls the model knows and may not have passed on, as TRL's do from 1.15."""
    if torch.compiler.is_compiling():
        return None
    frame = inspect.currentframe()
    while frame is not None:
        is_told = "num_items_in_batch" in frame.f_code.co_varnames
        if is_told and (num_items := frame.f_locals.get("num_items_in_batch")) is not None:
            return num_items
        frame = frame.f_back
    return None


def _share_by_count(loop: TrainingLoop | None) -> float:
    num_steps = _num_steps()
    if num_steps > 1:
        return 1 / num_steps  # by which accelerate divides the task's loss too, also in a shorter last step
    is_last = is_last_micro_batch()
    return loop.share(is_last) if loop is not None else float(is_last)


def _num_steps() -> int:
    return getattr(_GRADIENTS, "num_steps", 1)  # unset where accelerate was reset


# ---- the way ---------------------------------------------------------------------------------------------------------


class _Deliver(torch.autograd.Function):
    """The loss for the output, and a token for what carries it; backward waits for both."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor, pending: _PendingWarnings | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.pending, ctx.has_arrived = pending, False
        return loss.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_token: Tensor | None) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        if not torch.compiler.is_compiling():  # a compiled graph keeps nothing between backward passes
            if ctx.has_arrived:
                grad_token = None
            ctx.has_arrived |= grad_loss is not None or grad_token is not None
            if grad_loss is None and grad_token is not None and ctx.pending is not None:
                ctx.pending.give()
        if grad_token is None:
            return grad_loss, None, None
        own = torch.where(grad_token != 0, weight, 0.0)  # a compiled graph has zeros in place of None
        return own if grad_loss is None else torch.where(grad_loss != 0, grad_loss, own), None, None


class _Carry(torch.autograd.Function):
    """An identity. The same tensor would forbid changes in place after it, as some trainers make them to logits."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.device, ctx.dtype = token.device, token.dtype
        return carrier.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return grad, None if grad is None else torch.ones((), device=ctx.device, dtype=ctx.dtype)


def deliver(context: ForwardContext, model: nn.Module, loss: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """The balancing loss as the output shall hold it, and the token for what else shall carry it; None: nothing shall.

    Args:
        loss: [], that of the forward.
        targets: [], of all ranks; see [`num_targets`].
    """
    coef = context.state.config.balancing_coef
    if coef == 0 or not loss.requires_grad:
        return loss, None
    loop = context.state.loop
    share, is_counted = _carried_share(context, targets)
    weight = loss.new_full((), coef) * (share.to(loss.device) if isinstance(share, Tensor) else share)
    scaler = loop.scaler() if loop is not None and loop.scaler is not None else None
    if scaler is not None:
        weight = scaler.scale(weight)
    pending = None
    if not torch.compiler.is_compiling():
        pending = _PendingWarnings(context, scaler is None and may_be_scaled(model, loss.device), is_counted)
    return _Deliver.apply(loss, weight, pending)


def carry(value: Any, token: Tensor | None, without: tuple[str, ...] = ()) -> Any:
    """An output, or a part of one, whose tensors with a gradient carry the token; what holds none is the same object.

    Args:
        without: names in a dict that carry nothing.
    """
    if token is None:
        return value
    if isinstance(value, Tensor):
        return _Carry.apply(value, token) if value.requires_grad else value
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in without and name not in _CACHES and (carrying := carry(item, token)) is not item:
                value[name] = carrying
    elif type(value) in (tuple, list) or hasattr(value, "_make"):  # others may be made otherwise than of their items
        items = [carry(item, token) for item in value]
        if any(carrying is not item for carrying, item in zip(items, value, strict=True)):
            return value._make(items) if hasattr(value, "_make") else type(value)(items)
    return value


# ---- where it may come wrong -----------------------------------------------------------------------------------------


class _PendingWarnings:
    """What to warn of if nobody asks for the loss, which shows in backward; each once for a model.

    Args:
        is_unscaled: a loss scaler may be at work that is not known.
        is_counted: the share of the step is by the number of its micro-batches.
    """

    def __init__(self, context: ForwardContext, is_unscaled: bool, is_counted: bool) -> None:
        state = context.state
        self.state = weakref.ref(state)  # which holds the loss, and so this
        self.texts = [_UNSCALED] if is_unscaled else []
        self.version: int | None = None
        if is_counted and state.loop is None and _num_steps() == 1:
            if not is_last_micro_batch():
                self.texts.append(_LAST_ONLY)
            elif not is_unscaled and (parameter := _first_trained(context)) is not None:  # whose step may be skipped
                self.version = parameter._version
                if parameter.grad is not None and self.version == state.delivered_at:
                    self.texts.append(_REPEATED)

    def give(self) -> None:
        """Warn of them."""
        state = self.state()
        if state is None:
            return
        state.delivered_at = self.version
        for text in self.texts:
            warn_once(state, text)


def _first_trained(context: ForwardContext) -> nn.Parameter | None:
    routers = (router for router, _ in context.records)
    return next((p for router in routers for p in router.parameters() if p.requires_grad), None)


def check_can_carry(state: RoutingState, output: Any) -> None:
    """Warn once where an output is nothing that could carry the loss."""
    if not isinstance(output, dict | tuple | list | Tensor):
        warn_once(state, _NOWHERE.format(kind=type(output).__name__))


def warn_once(state: RoutingState, text: str) -> None:
    """Warn of it unless this model has."""
    if text not in state.warned:
        state.warned.add(text)
        warnings.warn(text, stacklevel=2)
