"""Timing arms in turn, and saying on what they ran."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch


def environment(device: str) -> str:
    """Hardware, versions and commit in one line."""
    import peft
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{name}; {versions}; commit {commit.stdout.strip() or 'unknown'}"


def seconds(function: Callable[[], None], device: str, min_time: float) -> float:
    """Mean seconds of one call, over at least min_time after one warm-up call."""
    function()
    if device != "cuda":
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < min_time:
            function()
            count += 1
        return (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    count = max(3, int(min_time / max(begin.elapsed_time(end) / 1e3, 1e-5)))
    begin.record()
    for _ in range(count):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def interleaved(
    arms: dict[str, Callable[[], None]], device: str, repeats: int = 5, min_time: float = 0.1
) -> dict[str, list[float]]:
    """Seconds of each arm, `repeats` times, the arms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, function in arms.items():
            times[name].append(seconds(function, device, min_time))
    return times


def ratio(times: dict[str, list[float]], arm: str, to: str) -> tuple[float, float]:
    """Median and half-spread of arm / to over the repeats."""
    ratios = [a / b for a, b in zip(times[arm], times[to], strict=True)]
    return statistics.median(ratios), (max(ratios) - min(ratios)) / 2
