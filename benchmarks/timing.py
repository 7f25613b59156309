"""Timing arms in turn.

Nothing flushes the L2 cache between calls: a step of the sizes measured here streams far more than it holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from .record import Recorder, Row, clock_mhz

Arms = dict[str, Callable[[], object]]
Result = TypeVar("Result")


def seconds(function: Callable[[], object], device: str, min_time: float) -> float:
    """Mean seconds of one call, over at least min_time, after calls that take as long.

    The warm-up is as long as the measurement because a GPU's clock follows the power that was drawn just before: what
    comes after an arm that waits for memory would run faster than what comes after one that computes.
    """
    per_call = _elapsed(function, 1, device)
    for _ in range(2):
        count = max(1, math.ceil(min_time / max(per_call, 1e-5)))
        per_call = _elapsed(function, count, device) / count
    return per_call


def _elapsed(function: Callable[[], object], count: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(
    arms: Arms, recorder: Recorder, row: Row, device: str, repeats: int, min_time: float, calls: int = 1
) -> None:
    """Record the seconds of each arm, `repeats` times, the arms taking turns; an arm that runs out of memory leaves.

    Args:
        row: what all arms have in common.
        calls: how many steps one call of an arm makes.
    """
    clocks = {arm: partial(seconds, function, device, min_time) for arm, function in arms.items()}
    latest = read_in_turn(clocks, recorder, row, repeats, calls)
    if device == "cuda" and latest:
        arm = next(iter(latest))
        record_clock(arms[arm], latest[arm], recorder, row)


def read_in_turn(
    clocks: Mapping[str, Callable[[], float]],
    recorder: Recorder,
    row: Row,
    repeats: int,
    calls: int = 1,
    errors: type[Exception] = torch.OutOfMemoryError,
) -> dict[str, float]:
    """The same of arms that measure themselves, wherever they run.

    Args:
        clocks: by arm, what returns the seconds of one call.
        errors: with which an arm leaves.

    Returns:
        The latest seconds of the arms that did not fail.
    """
    latest: dict[str, float] = {}
    clocks = dict(clocks)
    for repeat in range(repeats):
        for arm, clock in list(clocks.items()):
            result = attempt(clock, recorder, row, arm, errors)
            if result is None:
                del clocks[arm]
                latest.pop(arm, None)
            else:
                latest[arm] = result
                recorder.add(row, arm=arm, repeat=repeat, value=result / calls)
    return latest


def record_clock(function: Callable[[], object], duration: float, recorder: Recorder, row: Row) -> None:
    """Record the GPU's clock under the load of a call that lasts `duration` seconds."""
    for _ in range(math.ceil(0.5 / duration)):  # queued, so that the GPU is busy while it is asked
        function()
    if clock := clock_mhz():
        recorder.add(row, metric="clock_mhz", value=clock)
    torch.cuda.synchronize()


def attempt(
    function: Callable[[], Result],
    recorder: Recorder,
    row: Row,
    arm: str,
    errors: type[Exception] = torch.OutOfMemoryError,
) -> Result | None:
    """What the function returns; None, with the reason recorded, if it raises `errors`."""
    try:
        return function()
    except errors as error:
        recorder.add(row, arm=arm, metric="failed", note=_cause(error))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _cause(error: BaseException) -> str:
    """The first error's text: ending a CUDA graph's capture raises another one over it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes that a call on the GPU allocates beyond what was there, at the worst moment."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes that are still allocated while the result of a call on the GPU is held."""
    before = torch.cuda.memory_allocated()
    result = function()
    kept = torch.cuda.memory_allocated() - before
    del result
    return kept
