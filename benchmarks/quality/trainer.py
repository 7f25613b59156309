"""One training loop for every method: AdamW, warm-up and cosine, clipping, the whole step in one CUDA graph.

A step of a 135M model is some thousand small kernels: launched one by one they take longer than they run. Captured once
and replayed, a step costs what its kernels cost, for every method alike.

Adapters are float32, as PEFT makes them, and computed in bfloat16 under autocast, as the Trainer's `bf16=True` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .batches import Batches

Group = tuple[list[nn.Parameter], float]  # parameters, and the factor on the learning rate
WARM_UP = 0.1  # of the steps
MAX_NORM = 1.0


def autocast(device: str) -> AbstractContextManager:
    """bfloat16 on a GPU. Without its cache of cast weights: one that a graph made would be stale when replayed."""
    if device != "cuda":
        return nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)


@lru_cache(maxsize=1)
def _capture_stream() -> torch.cuda.Stream:
    """One for all runs of a process, which uses one GPU.

    cuBLAS keeps a workspace for every stream as long as the process lives: with a stream a run, each would leave some
    60 MiB behind, and peak memory would depend on how many came before.
    """
    return torch.cuda.Stream()


def now(device: str) -> float:
    """Seconds on a clock, when all that the device was told to do is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rate_at(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to 0.

    Example:
        >>> [round(rate_at(step, 20), 2) for step in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def logits_kept(ids: Tensor, labels: Tensor) -> dict[str, int]:
    """An argument of the forward: where labels [B, K] are those of the last K tokens alone, so are the logits."""
    return {"logits_to_keep": labels.shape[1]} if labels.shape != ids.shape else {}


@dataclass(frozen=True)
class Run:
    """What a run cost."""

    seconds: float  # of the steps, without building and capturing
    peak_bytes: int  # 0 on a CPU
    captured: bool


class Training:
    """A model ready to be trained, any number of times, from the state it is in now.

    Args:
        model: with the parameters to train requiring gradients.
        like: batches of the shape to come.
        device: "cuda" or "cpu".
        groups: parameters with a factor on their learning rate; default: all trainable ones with factor 1.
        capture: whether the step can be captured (it must not synchronise with the host).
        penalty: a further term of the loss, anew for each step.
        after_backward: called between the gradients and the optimizer's step, to change gradients.

    Raises:
        ValueError: nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        like: Batches,
        device: str,
        groups: Sequence[Group] | None = None,
        capture: bool = True,
        penalty: Callable[[], Tensor] | None = None,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.device = model.train(), device
        self.penalty, self.after_backward = penalty, after_backward
        groups = groups or [([p for p in model.parameters() if p.requires_grad], 1.0)]
        self.parameters = [parameter for members, _ in groups for parameter in members]
        if not self.parameters:
            raise ValueError("the model has no trainable parameters; nothing to train")
        is_cuda = device == "cuda"
        # The rate is a tensor, so that a graph reads it anew at every replay.
        options = [{"params": members, "lr": torch.zeros((), device=device)} for members, _ in groups]
        self.factors = [factor for _, factor in groups]
        self.optimizer = torch.optim.AdamW(options, weight_decay=0.0, fused=is_cuda, capturable=is_cuda)
        self.ids, self.labels, self.mask = (None if t is None else t.clone() for t in like.batch(0))
        self.kept = logits_kept(self.ids, self.labels)
        self.initial = [(tensor, tensor.detach().clone()) for tensor in (*self.parameters, *model.buffers())]
        if is_cuda:
            # cuDNN's gives NaN gradients where a query sees nothing, as one on padding on the left does (torch 2.11).
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.cuda.reset_peak_memory_stats()
        self.captured = capture and is_cuda
        self.call: Callable[[], object] = self._capture() if self.captured else self._step

    def _step(self) -> Tensor:
        self.optimizer.zero_grad()
        with autocast(self.device):
            output = self.model(
                input_ids=self.ids, labels=self.labels, attention_mask=self.mask, use_cache=False, **self.kept
            )
        loss = output.loss if self.penalty is None else output.loss + self.penalty()
        loss.backward()
        if self.after_backward is not None:
            self.after_backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        return loss

    def _capture(self) -> Callable[[], object]:
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled, gradients and optimizer states allocated
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self.reset()
        return graph.replay

    @torch.no_grad()
    def reset(self) -> None:
        """Back to where the model was, with an optimizer that has seen nothing."""
        for tensor, value in self.initial:
            tensor.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def run(self, batches: Batches, learning_rate: float) -> Run:
        """Train on all batches."""
        self.model.train()
        started = now(self.device)
        for step in range(len(batches)):
            rate = learning_rate * rate_at(step, len(batches))
            for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
                group["lr"].fill_(rate * factor)
            for static, fresh in zip((self.ids, self.labels, self.mask), batches.batch(step), strict=True):
                if static is not None and fresh is not None:
                    static.copy_(fresh)
            self.call()
        seconds = now(self.device) - started
        return Run(seconds, torch.cuda.max_memory_allocated() if self.device == "cuda" else 0, self.captured)
