"""What the engines must compute as one process does: tiny mixtures, their batches, and the loop to hold them to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import GradientState
from engines import WORLD
from helpers import LLAMA_TARGETS, awaken, llama
from peft import get_peft_model
from torch import Tensor, nn

from moelora import MoELoraConfig

LR = 0.5  # plain SGD: what a parameter has moved by is its gradients, times this
ROWS, LENGTH, SHORT, STEPS = 4, 7, 4, 2


@dataclass(frozen=True)
class Case:
    """A mixture and how it is trained.

    Attributes:
        idle: the first process's tokens all choose the same expert.
        own_loss: the task's loss is computed from the logits, and the model is given no labels.
    """

    options: dict[str, Any] = field(default_factory=dict)
    accumulation: int = 1
    checkpointing: dict[str, Any] | None = None
    idle: bool = False
    own_loss: bool = False
    experts: bool = False  # adapter by adapter
    base: str = ""  # a kind of quantised base


CASES = {
    "aux_loss": Case({"load_balance_loss_type": "aux_loss"}),
    "switch": Case({"load_balance_loss_type": "switch", "router_hidden_size": 5}),
    "z_loss": Case({"load_balance_loss_type": "z_loss"}, accumulation=2),
    "capacity": Case({"router_type": "learned", "expert_capacity_factor": 0.6}),
    "capacity_maturity": Case({"expert_capacity_factor": 0.6, "maturity_tokens": 40}, experts=True),
    "idle": Case({"router_type": "learned", "top_k_experts": 1}, idle=True),
    "model": Case({"router_scope": "model"}),
    "module": Case({"router_scope": "module", "expert_capacity_factor": 0.6}),
    "accumulation": Case({"maturity_tokens": 60, "load_balance_loss_type": "z_loss"}, accumulation=2),
    "non_reentrant": Case({"expert_capacity_factor": 0.6}, checkpointing={"use_reentrant": False}),
    "non_reentrant_module": Case(
        {"router_scope": "module", "expert_capacity_factor": 0.6}, checkpointing={"use_reentrant": False}
    ),
    "reentrant": Case({"expert_capacity_factor": 0.6}, checkpointing={"use_reentrant": True}),
    "fixed": Case({"router_type": "fixed"}),
    "sigmoid": Case({"router_type": "sigmoid", "expert_capacity_factor": 0.6}),
    "loss_free": Case(
        {"router_type": "sigmoid", "load_balance_loss_type": "loss_free", "bias_update_speed": 0.2}, accumulation=2
    ),
    "module_bf16": Case({"router_scope": "module"}),
    "own_loss": Case(own_loss=True),
    "own_loss_accumulated": Case({"load_balance_loss_type": "z_loss"}, accumulation=2, own_loss=True),
}
QUANTISED = {
    kind: Case({"expert_capacity_factor": 0.6}, base=kind)
    for kind in ("bnb-nf4", "bnb-int8", "hqq", "quanto-int8", "quanto-int4")
}


def _base(kind: str) -> nn.Module:
    if not kind:
        return llama()
    from bases import prepared_base  # only workers have the packages

    base = prepared_base(Path(os.environ["MOELORA_TEST_BASE"]), kind, torch.float32)
    assert type(base.model.layers[0].mlp.up_proj) is not nn.Linear, "the base is not quantised"
    return base


def build(case: Case) -> nn.Module:
    defaults = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": LLAMA_TARGETS,
        "num_experts": 3,
        "task_type": "CAUSAL_LM",
        "router_aux_loss_coef": 0.5,
        "expert_capacity_factor": None,
        "maturity_tokens": 100,
    }
    config = MoELoraConfig(**(defaults | case.options))
    torch.manual_seed(1)
    if case.experts:
        model = get_peft_model(_base(case.base), config, adapter_name="expert_0")
        for index in range(1, config.num_experts):
            model.add_adapter(f"expert_{index}", config)
    else:
        model = get_peft_model(_base(case.base), config)
    awaken(model)
    if case.checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=case.checkpointing)
    return model.train()


def batch(case: Case, index: int) -> dict[str, Tensor]:
    """All ranks' rows. The first half is shorter and padded, so the first process has a third of the tokens.

    No token occurs twice where capacity is limited: equal tokens tie in the first block, and which of them fits would
    hang on the rounding of matrix products of different sizes.
    """
    generator = torch.Generator().manual_seed(index + 1)
    ids = (torch.randperm(62, generator=generator)[: ROWS * LENGTH] + 2).view(ROWS, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    mask[1, SHORT:] = 0
    if case.idle:
        ids[: ROWS // WORLD] = 5
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def share(rows: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """One process's rows, cut to their longest as a collator does: ranks see tensors of different shapes."""
    rows = {name: tensor.chunk(WORLD)[rank] for name, tensor in rows.items()}
    length = int(rows["attention_mask"].sum(-1).max())
    return {name: tensor[:, :length] for name, tensor in rows.items()}


def steps_of(case: Case) -> Iterator[tuple[list[dict[str, Tensor]], Tensor]]:
    """Per optimizer step: its micro-batches and the number of targets in all of them."""
    for step in range(STEPS):
        micros = [batch(case, step * case.accumulation + index) for index in range(case.accumulation)]
        yield micros, torch.stack([(rows["labels"][:, 1:] != -100).sum() for rows in micros]).sum()


def loss_from_logits(model: nn.Module, rows: dict[str, Tensor], num_items: Tensor) -> tuple[Tensor, Any]:
    """What the model would compute from labels, without the balancing loss; and the output."""
    output = model(**{name: tensor for name, tensor in rows.items() if name != "labels"})
    scores, targets = output.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(scores.float(), targets, ignore_index=-100, reduction="sum") / num_items, output


def routing_state(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the routers: maturity and counters."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "moe_router" in name}


def reference(case: Case) -> dict[str, Any]:
    """One process and plain torch on the whole batch."""
    model = build(case)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses, gradients = [], []
    for micros, num_items in steps_of(case):
        optimizer.zero_grad()
        step = [_backward(case, model, rows, num_items, is_last=rows is micros[-1]) for rows in micros]
        losses.append(torch.stack(step))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        "buffers": routing_state(model),
    }


def _backward(case: Case, model: nn.Module, rows: dict[str, Tensor], num_items: Tensor, is_last: bool) -> Tensor:
    GradientState()._set_sync_gradients(is_last)
    if case.own_loss:
        loss, output = loss_from_logits(model, rows, num_items)
        (loss + 0.5 / case.accumulation * output.balancing_loss).backward()
        return loss.detach()
    loss = model(**rows, num_items_in_batch=num_items).loss
    loss.backward()
    return loss.detach()
