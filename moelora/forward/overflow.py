"""A step that a loss scaler skips changes nothing: what its forwards had counted is taken back.

Maturity and counters move at the end of a forward; whether gradients overflowed shows at the end of backward, and the
scaler keeps to itself what it makes of that. So the values from before the step are kept, and put back where a
gradient is not finite: on the device, without the host waiting for it. Only float16 needs loss scaling, so only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.data_parallel import num_ranks


class StepRollback:
    """Maturity and counters as they were before a forward, put back if its step overflows.

    Args:
        buffers: the maturity and the counters, before this forward adds to them.
        parameters: some that the step changes. Where they hold gradients and have not changed since the earlier
            forward, this one is of the same step, whose beginning is what counts.
        earlier: the rollback of the forward before.
    """

    def __init__(
        self, model: nn.Module, buffers: list[Tensor], parameters: Sequence[nn.Parameter], earlier: StepRollback | None
    ) -> None:
        self.model = model
        self.buffers = buffers
        self.versions = [parameter._version for parameter in parameters]
        accumulates = any(parameter.grad is not None for parameter in parameters)
        is_same_step = earlier is not None and accumulates and earlier._is_alike(self)
        self.before: list[Tensor] = earlier.before if earlier and is_same_step else [b.clone() for b in buffers]
        self._task = -1

    def _is_alike(self, other: StepRollback) -> bool:
        are_same = [id(buffer) for buffer in self.buffers] == [id(buffer) for buffer in other.buffers]
        return are_same and self.versions == other.versions

    def watch(self, output: Any) -> None:
        """Look at the gradients whenever a backward pass through this output has ended."""
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._on_backward)

    def _on_backward(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:  # once in a backward pass, whatever it comes through
            self._task = task
            _at_end_of_backward(self._go_behind)

    def _go_behind(self) -> None:
        # Of what is queued at the end of backward, DDP's and FSDP2's own come first: they bring the gradients.
        _at_end_of_backward(self._take_back)

    @torch.no_grad()
    def _take_back(self) -> None:
        # Gradients come to the earlier of two forwards last, so that it has the last word on what is put back.
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        overflows = _overflows(grads, self.buffers[0].device)
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(torch.where(overflows.to(buffer.device), before, buffer))


def may_be_scaled(model: nn.Module, device: torch.device) -> bool:
    """Whether gradients can overflow, so that losses are scaled: model is, or computes, in float16."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type) == torch.float16
    return next(model.parameters()).dtype == torch.float16


def _overflows(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """[] bool on device: whether a gradient is not finite, on any rank, which may hold a shard only."""
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
    norms = torch._foreach_norm([grad for grad in local if grad.numel()], float("inf")) if local else []
    flag = torch.zeros((), device=device)
    if norms:
        flag = (~torch.stack([norm.to(device, torch.float32) for norm in norms]).isfinite()).any().float()
    if num_ranks() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag > 0


def _tensors(output: Any) -> Iterator[Tensor]:
    """However deep: a loss may come from a hidden state alone."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _tensors(item)


def _at_end_of_backward(function: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)
