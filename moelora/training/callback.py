"""MoELoraCallback: the balancing loss in the Trainer's logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class MoELoraCallback(TrainerCallback):
    """Adds `balancing_loss`, the mean since the last log, beside the Trainer's `loss`.

    `loss` is what is optimised: task loss plus `router_aux_loss_coef` times `balancing_loss` (TRL >= 1.15: the task
    loss alone, whose gradient carries the other term).

    Reporters see what callbacks before them added, so put it first:
    ``trainer.callback_handler.callbacks.insert(0, MoELoraCallback())``. Passed as ``Trainer(callbacks=[...])`` it
    reaches the progress bar and `trainer.state.log_history`, not TensorBoard or W&B, which come before.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """See TrainerCallback."""
        if logs is None or "loss" not in logs:
            return
        routing = getattr(model, "routing_or_none", None)
        value = routing.pop_logged_loss() if routing is not None else None
        if value is not None:
            logs["balancing_loss"] = value
            if state.log_history:
                state.log_history[-1]["balancing_loss"] = value
