"""The tables and pictures of the benchmark, from its rows alone."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..options import make_parser
from ..quality.sweep import read_rows
from ..quality.table import Interval
from ..record import RESULTS
from .costs import COSTS_FILE
from .methods import METHODS
from .metrics import Summary, average_performance
from .results import ROWS_FILE
from .run import Row

MODULE = "benchmarks.continual.table"
TABLE_FILE = "table.md"
SHOWN = ("lora", "moelora")  # whose matrices are drawn
BY_TASK = ("joint", "oracle", "moelora")  # whose scores are shown task by task
COLUMNS = ("average_performance", "forgetting", "backward_transfer", "forward_transfer")
SHARED = ("base", "steps", "rows", "rank")  # by runs and what is measured of their costs
Group = tuple[str, str, int, int, int]  # base, sequence, steps, rows, rank
Costs = dict[tuple[Any, ...], Row]  # by method and SHARED


def groups(rows: Iterable[Row]) -> dict[Group, dict[str, list[Row]]]:
    """Runs on test data that succeeded, by what they share and by method; of several rates that with most seeds."""
    found: dict[Group, dict[str, dict[float, list[Row]]]] = {}
    for row in rows:
        if row["split"] == "test" and "error" not in row:
            group = (row["base"], row["sequence"], row["steps"], row["rows"], row["rank"])
            by_rate = found.setdefault(group, {}).setdefault(row["method"], {})
            by_rate.setdefault(row["rate"], []).append(row)
    return {
        group: {method: max(by_rate.values(), key=len) for method, by_rate in methods.items()}
        for group, methods in sorted(found.items())
    }


def render(rows: Sequence[Row], costs: Iterable[Row] = ()) -> str:
    """Markdown: a table for each base and sequence.

    Args:
        costs: of methods that were alone on their machine, the newest last (`benchmarks.continual.costs`).
    """
    found = groups(rows)
    if not found and not any(_is_held_out(row) for row in rows):
        return "no run is complete yet"
    known = {(cost["method"], *(cost[name] for name in SHARED)): cost for cost in costs}
    tables = [(*_table(group, methods, known), "", *_by_task(methods)) for group, methods in found.items()]
    return "\n".join(line for table in (*tables, *_held_out(rows)) for line in table)


def _table(group: Group, methods: dict[str, list[Row]], costs: Costs) -> Iterator[str]:
    base, sequence, steps, batch, rank = group
    tasks = next(iter(methods.values()))[0]["tasks"]
    yield f"**{base}, {sequence}** ({len(tasks)} tasks, each {steps} steps of {batch} rows; LoRA rank {rank})"
    yield ""
    yield "| method | told the task | seeds | rate | AP | FT | BWT | FWT | trainable | stored | s a task | ms a token |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    alone = learned_alone(methods.get("oracle", []))
    for method in [name for name in METHODS if name in methods]:
        cost = costs.get((method, base, steps, batch, rank), {})
        yield _line(method, methods[method], alone, cost)
        if told := [statistics.fmean(row["told"]) for row in methods[method] if "told" in row]:
            yield f"| {method} | yes | {len(told)} | | {_interval(told)} | | | | | | | |"


def _by_task(methods: dict[str, list[Row]]) -> Iterator[str]:
    """Scores after the last task, mean over seeds: where one method is ahead of another."""
    shown = [name for name in BY_TASK if name in methods]
    if not shown:
        return
    yield f"| after the last task | {' | '.join(_task_names(methods[shown[0]]))} |"
    yield f"|---{'|---' * len(methods[shown[0]][0]['tasks'])}|"
    for name in shown:
        by_task = zip(*(row["matrix"][-1] for row in methods[name]), strict=True)
        yield f"| {name} | {' | '.join(f'{statistics.fmean(scores):.1f}' for scores in by_task)} |"
    yield ""


def _task_names(rows: Sequence[Row]) -> list[str]:
    """Short ones."""
    return [name.split("_")[0] for name in rows[0]["tasks"]]


def _is_held_out(row: Row) -> bool:
    return row["split"] == "held-out" and "error" not in row


def _held_out(rows: Iterable[Row]) -> Iterator[Sequence[str]]:
    """For each base and sequence, every method and rate that was compared on held-out rows."""
    found: dict[tuple[str, str], dict[tuple[str, float], list[Row]]] = {}
    for row in filter(_is_held_out, rows):
        arms = found.setdefault((row["base"], row["sequence"]), {})
        arms.setdefault((row["method"], row["rate"]), []).append(row)
    for (base, sequence), arms in sorted(found.items()):
        lines = [f"**{base}, {sequence}, held-out rows**", ""]
        lines += ["| method | rate | seeds | AP | right after learning |", "|---|---|---|---|---|"]
        for method, rate in sorted(arms, key=lambda arm: (list(METHODS).index(arm[0]), arm[1])):
            matrices = [row["matrix"] for row in arms[method, rate]]
            after = [statistics.fmean(row[-1] for row in matrix) for matrix in matrices if len(matrix) > 1]
            performance = _interval([average_performance(matrix) for matrix in matrices])
            lines.append(
                f"| {method} | {rate:g} | {len(matrices)} | {performance} | {_interval(after) if after else ''} |"
            )
        yield (*lines, "")


def learned_alone(rows: Sequence[Row]) -> list[float] | None:
    """Each task's score after learning nothing else, mean over seeds: the oracle's, right after learning it."""
    if not rows:
        return None
    return [statistics.fmean(row["matrix"][task][task] for row in rows) for task in range(len(rows[0]["tasks"]))]


def _line(method: str, rows: Sequence[Row], alone: Sequence[float] | None, cost: Row) -> str:
    is_joint = len(rows[0]["matrix"]) == 1
    summaries = [Summary.of(row["matrix"], None if is_joint else alone) for row in rows]
    cells = []
    for name in COLUMNS:
        values = [value for each in summaries if (value := getattr(each, name)) is not None]
        cells.append("" if not values or (is_joint and name != "average_performance") else _interval(values))
    last = rows[0]
    told = "yes" if METHODS[method].is_told else "no"
    cells += [f"{last['trainable']:,}", f"{last['stored']:,}"]
    cells += [f"{cost['learning']:.1f}", f"{cost['ms_a_token']:.2f}"] if cost else ["", ""]
    return f"| {method} | {told} | {len(rows)} | {last['rate']:g} | {' | '.join(cells)} |"


def _interval(values: Sequence[float]) -> str:
    """Mean and half the width of its 95% confidence interval."""
    found = Interval.of(values)
    return f"{found.mean:.1f}" if math.isnan(found.half) else f"{found.mean:.1f} ± {found.half:.1f}"


def mean_matrix(rows: Sequence[Row]) -> list[list[float]]:
    """T x T scores, mean over seeds; nan above the diagonal."""
    size = len(rows[0]["tasks"])
    return [
        [statistics.fmean(row["matrix"][i][j] for row in rows) if j <= i else math.nan for j in range(size)]
        for i in range(size)
    ]


def draw(group: Group, methods: dict[str, list[Row]], out: Path) -> None:
    """Heat maps of the matrices: row i after learning task i, column j the score on task j."""
    from matplotlib.figure import Figure

    shown = [name for name in SHOWN if name in methods]
    figure = Figure(figsize=(5.2 * len(shown), 4.8), layout="constrained")
    image: Any = None
    for panel, method in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        tasks = _task_names(methods[method])
        image = panel.imshow(mean_matrix(methods[method]), vmin=0, vmax=100, cmap="cividis")
        panel.set(title=method, xlabel="score on", ylabel="after learning")
        panel.set_xticks(range(len(tasks)), tasks, rotation=90)
        panel.set_yticks(range(len(tasks)), tasks)
    figure.colorbar(image, ax=figure.axes, label="score, %", shrink=0.8)
    figure.savefig(out, dpi=100)


def write(folder: Path) -> str:
    """Write the tables beside the rows, and pictures where matplotlib is there; the tables are returned."""
    rows, costs = (
        list(read_rows([path])) if (path := folder / name).exists() else [] for name in (ROWS_FILE, COSTS_FILE)
    )
    text = render(rows, costs)
    (folder / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        print('no pictures are drawn: pip install -e ".[bench]" brings matplotlib', flush=True)
        return text
    for group, methods in groups(rows).items():
        if any(name in methods for name in SHOWN):
            draw(group, methods, folder / f"{group[0]}-{group[1]}.png")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Write and print the tables."""
    parser: argparse.ArgumentParser = make_parser(MODULE, __doc__, ("", "--out benchmarks/results/continual"))
    parser.add_argument("--out", type=Path, default=RESULTS / "continual", help=f"folder of {ROWS_FILE}")
    print(write(parser.parse_args(argv).out))


if __name__ == "__main__":
    main()
