"""The tables of the benchmark on growing, from its rows alone."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..options import make_parser
from ..quality.sweep import read_rows
from ..quality.table import Interval
from ..record import RESULTS
from .learners import LEARNERS

MODULE = "benchmarks.growing.table"
TABLE_FILE = "table.md"
Row = dict[str, Any]
Run = dict[int, Row]  # by stage


def chosen_runs(rows: Sequence[Row]) -> dict[str, dict[int, Run]]:
    """Complete runs by method and seed, each method at the rate that seed 0 does best with on validation data."""
    runs: dict[tuple[str, float, int], Run] = {}
    for row in rows:
        runs.setdefault((row["method"], row["rate"], row["seed"]), {})[row["stage"]] = row
    complete = {key: run for key, run in runs.items() if max(run) == len(run[max(run)]["order"]) - 1}
    best: dict[str, tuple[float, float]] = {}
    for (method, rate, seed), run in complete.items():
        if seed == 0:
            found = statistics.fmean(run[max(run)]["validation"].values()), rate
            best[method] = min(best.get(method, found), found)
    chosen: dict[str, dict[int, Run]] = {}
    for (method, rate, seed), run in complete.items():
        if method in best and best[method][1] == rate:
            chosen.setdefault(method, {})[seed] = run
    return chosen


def forgetting(run: Run) -> float | None:
    """Mean over earlier domains of test loss after the last stage minus right after learning; None without stages.

    Example:
        >>> rows = {s: {"order": ["a", "b"], "test": test} for s, test in enumerate([{"a": 1.0}, {"a": 1.5, "b": 2.0}])}
        >>> forgetting(rows)
        0.5
    """
    final = max(run)
    if len(run) <= final:
        return None
    earlier = run[final]["order"][:final]
    return statistics.fmean(
        run[final]["test"][domain] - run[stage]["test"][domain] for stage, domain in enumerate(earlier)
    )


def final_loss(run: Run, key: str = "test") -> float:
    """Mean over all domains after the last stage."""
    return statistics.fmean(run[max(run)][key].values())


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95% confidence interval."""
    found = Interval.of(values)
    return f"{found.mean:.3f}" if math.isnan(found.half) else f"{found.mean:.3f} ± {found.half:.3f}"


def render(rows: Sequence[Row]) -> str:
    """Markdown: one line a method, then losses by domain."""
    chosen = chosen_runs(rows)
    if not chosen:
        return "no run is complete yet"
    reference = [value for run in chosen.get("lora", {}).values() if (value := forgetting(run)) is not None]
    lines = [
        "| method | seeds | rate | parameters | final mean loss | forgetting | of LoRA's | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in [name for name in LEARNERS if name in chosen]:
        runs = [chosen[method][seed] for seed in sorted(chosen[method])]
        last = runs[0][max(runs[0])]
        lost = [value for run in runs if (value := forgetting(run)) is not None]
        share = f"{statistics.fmean(lost) / statistics.fmean(reference):.1%}" if lost and reference else ""
        seconds = statistics.fmean(sum(row["seconds"] for row in run.values()) for run in runs)
        cells = [
            *(method, str(len(runs)), f"{last['rate']:g}", f"{last['parameters']:,}"),
            *(interval([final_loss(run) for run in runs]), interval(lost) if lost else "", share, f"{seconds:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_by_domain(chosen), "", *(f"- {name}: {LEARNERS[name][0]}" for name in LEARNERS if name in chosen)]
    return "\n".join(lines)


def _by_domain(chosen: dict[str, dict[int, Run]]) -> list[str]:
    order = next(run[max(run)]["order"] for runs in chosen.values() for run in runs.values())
    lines = [
        "Test loss right after learning → after the last stage, mean over seeds:",
        "",
        f"| method | {' | '.join(order)} |",
        "|---|" + "---|" * len(order),
    ]
    for method in [name for name in LEARNERS if name in chosen]:
        runs = list(chosen[method].values())
        cells = []
        for stage, domain in enumerate(order):
            final = statistics.fmean(run[max(run)]["test"][domain] for run in runs)
            learned = [run[stage]["test"][domain] for run in runs if stage in run]
            cells.append(f"{statistics.fmean(learned):.3f} → {final:.3f}" if learned else f"{final:.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
        if known := [run[max(run)]["known"] for run in runs if "known" in run[max(run)]]:
            cells = [f"{statistics.fmean(losses[domain] for losses in known):.3f}" for domain in order]
            lines.append(f"| {method}, domain known | {' | '.join(cells)} |")
    return lines


def write(folder: Path) -> str:
    """Write the tables beside the rows, and return them."""
    text = render(list(read_rows([folder / "rows.jsonl"]) if (folder / "rows.jsonl").exists() else ()))
    (folder / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Write and print the tables."""
    parser: argparse.ArgumentParser = make_parser(MODULE, __doc__, ("", "--out benchmarks/results/growing"))
    parser.add_argument("--out", type=Path, default=RESULTS / "growing", help="folder of rows.jsonl")
    print(write(parser.parse_args(argv).out))


if __name__ == "__main__":
    main()
