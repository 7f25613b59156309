"""MoELoraCallback: what the routers do, in the Trainer's own logs, while they do it."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from statistics import fmean
from traceback import walk_stack
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from ..forward.state import RoutingState
from ..forward.training_loop import TrainingLoop
from ..forward.training_stats import pop_training_stats
from ..routing.sums import RouterStats
from ..routing.training_sums import TrainingWindow
from .guards import RoutingGuard, RoutingWarning

PER_EXPERT = ("expert_load", "maturity")
PER_ROUTER = ("entropy", "top1_probability", "dropped", "balancing_loss")


class MoELoraCallback(TrainerCallback):
    """Logs what the routers do to everything the Trainer logs to: ``Trainer(..., callbacks=[MoELoraCallback()])``.

    Beside `loss`, and over the training tokens since the last log (no padding, no evaluation, all ranks together):

    - `balancing_loss`, `router_entropy` (nats), `router_top1_probability`, `dropped_assignments` (share),
      `expert_maturity`: means over routers; `dead_experts`: how many experts, counted in every router, no token chose;
      `expert_load/<expert>`: share of the assignments, mean over routers; `skipped_forwards`: how many had a NaN or an
      infinity in a router, which counts in none of these, nor in maturity.
    - `routers/<router>/...`: the same for each router. These, and the loads, stay out of the console's log lines.

    `trainer.state.log_history`, and so trainer_state.json and run.json, keep each router's values as one nested
    mapping, `routers`, from which `moelora report` draws. `loss` is what is optimised: task loss plus
    `router_aux_loss_coef` times `balancing_loss` (where a trainer computes its own, as TRL's do: the task loss alone,
    beside whose gradient the other term's comes through the model's outputs, for which this tells the mixture the
    number of micro-batches in a step, and the loss scaler).

    A step adds up a few numbers on the device; the device is read when the Trainer logs, once.

    Args:
        per_router: also send each router's values to the loggers; a mixture with hundreds of routers may not want it.
        dead_after: steps without a token after which an expert is reported as dead, with a [`RoutingWarning`].
        collapsed_after: steps of narrow choice after which a router is reported as collapsed, likewise.
        collapse_share: what counts as narrow: the share of the assignments that the busiest experts take, as many of
            them as one token uses.
    """

    def __init__(
        self,
        per_router: bool = True,
        dead_after: int = 100,
        collapsed_after: int = 100,
        collapse_share: float = 0.95,
    ) -> None:
        self.per_router = per_router
        self.guard = RoutingGuard(dead_after, collapsed_after, collapse_share)
        self.last_step = 0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See TrainerCallback. TRL makes its engine of vLLM only after this.

        Raises:
            ValueError: TRL is to hand a mixture to vLLM by merging it, which this one cannot be.
        """
        check_merge = getattr(model, "check_merge", None)  # no plain model has it
        if check_merge is not None and getattr(args, "use_vllm", False):
            check_merge()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """See TrainerCallback."""
        self.last_step = state.global_step
        if (routing := _routing_of(model)) is not None:
            routing.window = TrainingWindow()
            scaler = getattr(optimizer, "scaler", None)
            routing.loop = TrainingLoop(args.gradient_accumulation_steps, scaler and weakref.ref(scaler))
            _take_place(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See TrainerCallback."""
        if (routing := _routing_of(model)) is not None and routing.loop is not None:
            routing.loop.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See TrainerCallback."""
        if (routing := _routing_of(model)) is not None and routing.loop is not None:
            routing.loop.end_micro_batch()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """See TrainerCallback."""
        routing = _routing_of(model)
        if logs is None or "loss" not in logs or routing is None:
            return
        stats = pop_training_stats(routing)
        steps, self.last_step = state.global_step - self.last_step, state.global_step
        if not stats:
            return
        overall = overall_values(stats)
        logs |= overall | (router_values(stats) if self.per_router else {})
        if state.log_history:
            state.log_history[-1] |= overall | {"routers": history_entry(stats)}
        if state.is_world_process_zero:
            for message in self.guard.check(stats, steps, routing.config):
                warnings.warn(message, RoutingWarning, stacklevel=1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See TrainerCallback."""
        if (routing := _routing_of(model)) is not None:
            routing.window = routing.loop = None


def overall_values(stats: Mapping[str, RouterStats]) -> dict[str, float]:
    """The whole mixture in a few numbers: means over routers, and how many experts of all routers are dead.

    A router that has counted no token, because all its forwards were left out, has nothing to say.
    """
    skipped: dict[str, float] = {"skipped_forwards": max(router.non_finite for router in stats.values())}
    routers = [router for router in stats.values() if router.num_tokens]
    if not routers:
        return skipped
    values: dict[str, float] = {
        "balancing_loss": fmean(router.balancing_loss for router in routers),
        "router_entropy": fmean(router.entropy for router in routers),
        "router_top1_probability": fmean(router.top1_probability for router in routers),
        "dropped_assignments": fmean(router.dropped for router in routers),
        "expert_maturity": fmean(value for router in routers for value in router.maturity),
        "dead_experts": sum(len(router.dead_experts) for router in routers),
    } | skipped
    loads = [router.expert_load for router in routers]
    if len({len(load) for load in loads}) == 1:  # routers that serve fewer adapters have other experts
        values |= {f"expert_load/{expert}": fmean(column) for expert, column in enumerate(zip(*loads, strict=True))}
    return values


def router_values(stats: Mapping[str, RouterStats]) -> dict[str, float]:
    """Every router's numbers under names that loggers group by their slashes."""
    values: dict[str, float] = {}
    for name, router in stats.items():
        prefix = f"routers/{name or 'model'}"
        values |= {f"{prefix}/{key}": getattr(router, key) for key in PER_ROUTER}
        values[f"{prefix}/dead_experts"] = len(router.dead_experts)
        values[f"{prefix}/skipped_forwards"] = router.non_finite
        for key in PER_EXPERT:
            values |= {f"{prefix}/{key}/{expert}": value for expert, value in enumerate(getattr(router, key))}
    return values


def history_entry(stats: Mapping[str, RouterStats]) -> dict[str, dict[str, Any]]:
    """Every router's numbers as log_history keeps them: nested and rounded, for a run has thousands of such entries."""
    return {
        name: {key: _rounded(getattr(router, key)) for key in (*PER_ROUTER, *PER_EXPERT)}
        | {"dead_experts": router.dead_experts}
        for name, router in stats.items()
    }


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.4g}")


def _routing_of(model: Any) -> RoutingState | None:
    return getattr(model, "routing_or_none", None)


# ---- the order of callbacks ------------------------------------------------------------------------------------------


def _take_place(callback: TrainerCallback) -> None:
    """Move to the front of the Trainer's callbacks, and keep the details out of what the console prints.

    Loggers see what callbacks before them have added to the logs, and the Trainer puts a user's callbacks after its
    loggers. It tells a callback everything but where that stands, so the handler is found as the caller.
    """
    handler = _calling_handler()
    if handler is None:
        warnings.warn(
            "this Trainer calls its callbacks in an unknown way, so loggers may not see the routers' values; put the "
            "callback first yourself: `trainer.callback_handler.callbacks.insert(0, MoELoraCallback())`",
            RoutingWarning,
            stacklevel=2,
        )
        return
    callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
    printers = [i for i, other in enumerate(callbacks) if isinstance(other, (PrinterCallback, ProgressCallback))]
    if printers and not any(isinstance(other, _Hide) for other in callbacks):
        hide = _Hide()
        callbacks.insert(printers[-1] + 1, _Show(hide))
        callbacks.insert(printers[0], hide)
    handler.callbacks = callbacks  # a new list: the handler is in the middle of the old one


def _calling_handler() -> CallbackHandler | None:
    callers = (frame.f_locals.get("self") for frame, _ in walk_stack(sys._getframe()))
    return next((caller for caller in callers if isinstance(caller, CallbackHandler)), None)


class _Hide(TrainerCallback):
    """Stands before the callbacks that print, and takes the details out of the logs."""

    def __init__(self) -> None:
        self.hidden: dict[str, Any] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        details = [key for key in logs or {} if key.startswith(("routers/", "expert_load/"))]
        self.hidden = {key: logs.pop(key) for key in details}


class _Show(TrainerCallback):
    """Stands after them, and puts the details back for loggers that come later still."""

    def __init__(self, hide: _Hide) -> None:
        self.hide = hide

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None:
            logs |= self.hide.hidden
        self.hide.hidden = {}
