"""Libraries that patch transformers or torch, whose arms therefore run in processes of their own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from .record import Recorder, Row
from .timing import attempt, read_in_turn
from .worker import Bench, Remote, RemoteError

PACKAGES = {"liger": "liger_kernel", "unsloth": "unsloth"}  # by kit, under the name that it is imported by


def kit_of(arm: str) -> str | None:
    """The kit that an arm needs."""
    ending = arm.rpartition("-")[2]
    return ending if ending in PACKAGES else None


@contextmanager
def benches(
    args: argparse.Namespace, module: str, argv: Sequence[str] | None, here: Callable[[argparse.Namespace], Bench]
) -> Iterator[list[Bench]]:
    """The arms of --arms by process: those of this one first. An arm whose kit is missing is left out by name.

    Args:
        module: of the benchmark, with its Bench.
        argv: its command line; None for the one that this process was started with.
        here: makes the Bench of this process, while the others make theirs.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with ExitStack() as stack:
        remotes = []
        for kit, package in PACKAGES.items():
            if arms := [arm for arm in args.arms if kit_of(arm) == kit]:
                if importlib.util.find_spec(package) is None:
                    print(f"left out: {' '.join(arms)}. pip install {package.replace('_', '-')}", flush=True)
                    continue
                remotes.append(Remote(package, module, arguments, arms))
                stack.callback(remotes[-1].close)
        own = argparse.Namespace(**vars(args) | {"arms": [arm for arm in args.arms if not kit_of(arm)]})
        yield [*([here(own)] if own.arms else []), *filter(_is_ready, remotes)]


def _is_ready(remote: Remote) -> bool:
    try:
        remote.wait()
    except RemoteError as error:
        print(f"left out: {' '.join(remote.arms)}. {error}", flush=True)
        return False
    return True


def measure(
    group: Sequence[Bench],
    setting: Sequence[object],
    recorder: Recorder,
    row: Row,
    repeats: int,
    calls: int = 1,
) -> dict[str, float]:
    """Record the arms of several processes under one setting, taking turns, and peak memory first where they tell it.

    An arm that fails leaves, for whatever reason: the libraries of one must not cost the results of the others.

    Args:
        setting: what `Bench.use` takes.
        calls: how many steps one call of an arm makes.

    Returns:
        See timing.read_in_turn.
    """
    clocks = {}
    for bench in group:
        for arm in bench.arms:
            peak = attempt(partial(_peak_bytes, bench, setting, arm), recorder, row, arm, RuntimeError)
            if peak is None:
                continue
            if peak:
                recorder.add(row, arm=arm, metric="peak_bytes", value=peak)
            clocks[arm] = partial(bench.seconds, arm)
    return read_in_turn(clocks, recorder, row, repeats, calls, RuntimeError)


def _peak_bytes(bench: Bench, setting: Sequence[object], arm: str) -> int:
    bench.use(*setting)
    return bench.peak_bytes(arm)
