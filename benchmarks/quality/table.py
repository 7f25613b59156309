"""Tables and a picture from the rows that `python -m benchmarks.quality` wrote."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import make_parser
from .methods import METHODS, method_of
from .sweep import Row, loss_of, read_rows

MODULE = "benchmarks.quality.table"
EXAMPLES = ("benchmarks/results/quality/rows.jsonl", "first.jsonl second.jsonl --out docs/quality --split validation")
BASELINE = "lora"
SUMMARY = ("method", "steps", "lr", "seeds", "mean loss", f"minus {BASELINE}", "parameters", "seconds", "peak MiB")
# Two-sided 95% quantiles of Student's t by degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean with its half-width of 95% confidence; nan from one value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t interval of independent values.

        Example:
            >>> Interval.of([1.0, 2.0, 3.0])
            Interval(mean=2.0, half=2.484...)
        """
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, math.nan)
        quantile = T_95[min(len(values) - 2, len(T_95) - 1)]
        return cls(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"


class Entry:
    """A method with a number of steps, at its best learning rate."""

    def __init__(self, method: str, steps: int, rows: Sequence[Row], split: str) -> None:
        self.method, self.steps = method, steps
        swept = [row for row in rows if row["split"] == "validation" and row["seed"] == 0]
        self.sweep = {row["lr"]: loss_of(row) for row in sorted(swept, key=lambda row: row["lr"])}
        self.errors = list(dict.fromkeys(row["error"] for row in rows if "error" in row))
        self.lr = min(self.sweep, key=lambda lr: self.sweep[lr], default=math.nan)
        best = [r for r in rows if r["split"] == split and r["lr"] == self.lr and math.isfinite(loss_of(r))]
        self.runs: dict[int, Row] = {row["seed"]: row for row in best}
        # Of all rates and splits, which need the same: what a process kept of earlier runs comes on top.
        self.peak_mib = min((row["peak_mib"] for row in rows if "peak_mib" in row), default=0)

    @property
    def first(self) -> Row:
        """One of the runs, for what is the same in all."""
        return next(iter(self.runs.values()))

    def loss(self) -> Interval:
        """Mean loss over domains."""
        return Interval.of([row["loss"] for row in self.runs.values()])

    def of_domain(self, domain: str, metric: str) -> Interval:
        """Loss or accuracy on one domain."""
        return Interval.of([row["scores"][domain][metric] for row in self.runs.values()])

    def difference(self, other: Entry) -> Interval | None:
        """Loss minus the other's, seed by seed: both saw the same batches in the same order."""
        pairs = [row["loss"] - other.runs[seed]["loss"] for seed, row in self.runs.items() if seed in other.runs]
        return Interval.of(pairs) if pairs else None

    def seconds(self) -> float:
        """Median time of the training steps."""
        return statistics.median(row["seconds"] for row in self.runs.values())


def entries(rows: Iterable[Row], suite: str, split: str) -> list[Entry]:
    """The methods of a suite in the order of METHODS; a row that was measured again replaces the older one."""
    latest = {(r["method"], r["steps"], r["split"], r["lr"], r["seed"]): r for r in rows if r["suite"] == suite}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in latest.values():
        groups.setdefault((row["method"], row["steps"]), []).append(row)
    order = {name: number for number, name in enumerate(METHODS)}
    keys = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key[1]))
    return [Entry(*key, groups[key], split) for key in keys]


def markdown(found: Sequence[Entry], suite: str, split: str) -> str:
    """The tables of one suite."""
    done = [entry for entry in found if entry.runs]
    if not done:
        return ""
    lines = [f"## {suite}, {split} data", ""]
    lines += _table(SUMMARY, [summary(entry, baseline_of(entry, done)) for entry in done])
    domains = list(done[0].first["scores"])
    lines += ["Loss by domain:", "", *_by_domain(done, domains, "loss")]
    if "accuracy" in done[0].first["scores"][domains[0]]:
        lines += ["Accuracy by task:", "", *_by_domain(done, domains, "accuracy")]
    lines += ["Learning rates tried (validation loss, seed 0):", ""]
    sweeps = [[_name(e), "; ".join(f"{lr:g}: {loss:.4f}" for lr, loss in e.sweep.items())] for e in found]
    lines += _table(["method", "sweep"], sweeps)
    failures = [f"- {_name(entry)}: {error}" for entry in found for error in entry.errors]
    return "\n".join([*lines, *(["Failures:", "", *failures, ""] if failures else [])])


def baseline_of(entry: Entry, done: Sequence[Entry]) -> Entry | None:
    """The LoRA of equal total parameters trained for as many steps; where there is none, for the nearest time."""
    baselines = [other for other in done if other.method == BASELINE]
    if entry.method == BASELINE:
        return None
    same = [other for other in baselines if other.steps == entry.steps]
    return min(same or baselines, key=lambda other: abs(other.seconds() - entry.seconds()), default=None)


def _name(entry: Entry) -> str:
    return f"{entry.method} ({entry.steps} steps)"


def summary(entry: Entry, baseline: Entry | None) -> list[str]:
    """The cells of one method under the headings SUMMARY."""
    row = entry.first
    eager = "" if row["captured"] or not row["seconds"] else " (eager)"
    return [
        f"**{entry.method}**: {method_of(entry.method).about}",
        str(entry.steps),
        f"{entry.lr:g}",
        str(len(entry.runs)),
        str(entry.loss()),
        _minus(entry, baseline),
        f"{row['parameters']:,}",
        f"{entry.seconds():.1f}{eager}",
        f"{entry.peak_mib:,}",
    ]


def _minus(entry: Entry, baseline: Entry | None) -> str:
    difference = None if baseline is None else entry.difference(baseline)
    if baseline is None or difference is None:
        return ""
    at = "" if baseline.steps == entry.steps else f" ({BASELINE}, {baseline.steps} steps)"
    return f"{'+' if difference.mean > 0 else ''}{difference}{at}"


def _by_domain(done: Sequence[Entry], domains: Sequence[str], metric: str) -> list[str]:
    best = min if metric == "loss" else max
    means = {d: best(round(entry.of_domain(d, metric).mean, 4) for entry in done) for d in domains}
    rows = []
    for entry in done:
        cells = []
        for domain in domains:
            interval = entry.of_domain(domain, metric)
            cells.append(f"**{interval}**" if round(interval.mean, 4) == means[domain] else str(interval))
        rows.append([_name(entry), *cells])
    if metric == "accuracy":
        majority = done[0].first["majority"]
        rows.insert(0, ["always the most frequent answer", *(f"{majority[domain]:.4f}" for domain in domains)])
    return _table(["method", *domains], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)] + [""]


def write_csv(found: Sequence[Entry], suite: str, path: Path) -> None:
    """One line for each run that the tables use."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["suite", "method", "steps", "lr", "seed", "domain", "loss", "accuracy", "seconds"])
        for entry in found:
            for seed, row in entry.runs.items():
                for domain, scores in row["scores"].items():
                    values = [scores["loss"], scores.get("accuracy", ""), row["seconds"]]
                    writer.writerow([suite, entry.method, entry.steps, entry.lr, seed, domain, *values])


def draw(found: Sequence[Entry], suite: str, split: str, path: Path) -> None:
    """Mean loss with its interval, best at the top; the frozen model, far away, is left out."""
    from matplotlib.figure import Figure

    done = [entry for entry in found if entry.runs and method_of(entry.method).kind != "frozen"]
    done.sort(key=lambda entry: -entry.loss().mean)
    if not done:
        return
    figure = Figure(figsize=(7, 1 + 0.28 * len(done)), layout="constrained")
    panel: Any = figure.subplots()
    for height, entry in enumerate(done):
        interval = entry.loss()
        is_ours = method_of(entry.method).about.startswith("ours")
        half = 0 if math.isnan(interval.half) else interval.half
        face = "black" if is_ours else "white"
        style = {"color": "black", "marker": "o", "markerfacecolor": face, "markersize": 5, "linestyle": ""}
        panel.errorbar(interval.mean, height, xerr=half, capsize=2, **style)
    panel.set_yticks(range(len(done)), [_name(entry) for entry in done], fontsize="small")
    panel.set_xlabel(f"mean {split} loss over the domains of {suite},\n95% interval over seeds (filled: ours)")
    panel.grid(axis="x", color="0.9")
    figure.savefig(path, dpi=160)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    parser.add_argument("rows", type=Path, nargs="+", help="files of rows; later ones replace earlier ones")
    parser.add_argument("--out", type=Path, help="folder (default: that of the first file)")
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="default: test")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write `<split>.md`, `<split>.csv` and `<suite>-<split>.png`."""
    args = parse(argv)
    out = args.out or args.rows[0].parent
    out.mkdir(parents=True, exist_ok=True)
    rows = list(read_rows(args.rows))
    (out / f"{args.split}.csv").unlink(missing_ok=True)
    texts = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        found = entries(rows, suite, args.split)
        texts.append(markdown(found, suite, args.split))
        write_csv(found, suite, out / f"{args.split}.csv")
        draw(found, suite, args.split, out / f"{suite}-{args.split}.png")
    (out / f"{args.split}.md").write_text("\n".join(texts), encoding="utf-8")
    print(f"written: {out}/{args.split}.md", flush=True)


if __name__ == "__main__":
    main()
