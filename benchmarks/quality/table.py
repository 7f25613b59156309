"""Tables and a picture from the rows that `python -m benchmarks.quality` wrote."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..options import make_parser
from .methods import METHODS, method_of
from .sweep import Row, loss_of, read_rows

MODULE = "benchmarks.quality.table"
EXAMPLES = (
    "benchmarks/results/quality/rows.jsonl",
    "first.jsonl second.jsonl --out build/tables --split validation --baseline dense-8",
    "benchmarks/results/quality/rows.jsonl --out build/tables --baseline dense-16+temperature-1@350",
)
BASELINE = "lora"
SUMMARY = ("method", "steps", "lr", "seeds", "mean loss", "difference", "parameters", "seconds", "peak MiB")
# Two-sided 95% quantiles of Student's t by degrees of freedom.
T_95 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)


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

    def seconds(self) -> dict[str, float]:
        """Median time of the training steps, by hardware."""
        by_hardware: dict[str, list[float]] = {}
        for row in self.runs.values():
            by_hardware.setdefault(row["hardware"], []).append(row["seconds"])
        return {name: statistics.median(times) for name, times in sorted(by_hardware.items())}


def entries(rows: Iterable[Row], suite: str, split: str) -> list[Entry]:
    """The methods of a suite in the order of METHODS; a row that was measured again replaces the older one."""
    latest = {(r["method"], r["steps"], r["split"], r["lr"], r["seed"]): r for r in rows if r["suite"] == suite}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in latest.values():
        groups.setdefault((row["method"], row["steps"]), []).append(row)
    order = {name: number for number, name in enumerate(METHODS)}
    keys = sorted(groups, key=lambda key: (order.get(key[0], len(order)), key[1]))
    return [Entry(*key, groups[key], split) for key in keys]


def markdown(found: Sequence[Entry], suite: str, split: str, baseline: str = BASELINE) -> str:
    """The tables of one suite; differences are from the baseline, as baseline_of takes it."""
    done = [entry for entry in found if entry.runs]
    if not done:
        return ""
    lines = [f"## {suite}, {split} data", ""]
    heads = [f"minus {baseline}" if head == "difference" else head for head in SUMMARY]
    lines += _table(heads, [summary(entry, baseline_of(entry, done, baseline)) for entry in done])
    domains = list(done[0].first["scores"])
    lines += ["Loss by domain:", "", *_by_domain(done, domains, "loss")]
    if "accuracy" in done[0].first["scores"][domains[0]]:
        lines += ["Accuracy by task:", "", *_by_domain(done, domains, "accuracy")]
    lines += ["Learning rates tried (validation loss, seed 0):", ""]
    sweeps = [[_name(e), "; ".join(f"{lr:g}: {loss:.4f}" for lr, loss in e.sweep.items())] for e in found]
    lines += _table(["method", "sweep"], sweeps)
    failures = [f"- {_name(entry)}: {error}" for entry in found for error in entry.errors]
    return "\n".join([*lines, *(["Failures:", "", *failures, ""] if failures else [])])


def baseline_of(entry: Entry, done: Sequence[Entry], baseline: str = BASELINE) -> Entry | None:
    """What a method is compared with: the baseline trained for as many steps; without one, for the nearest time.

    Times are compared on the same hardware.

    Args:
        baseline: the name of a method, or NAME@STEPS for one with as many steps whatever the others have.
    """
    name, _, steps = baseline.partition("@")
    baselines = [other for other in done if other.method == name and steps in ("", str(other.steps))]
    if entry in baselines:
        return None
    same = [other for other in baselines if other.steps == entry.steps]
    return min(same or baselines, key=partial(_time_apart, entry.seconds()), default=None)


def _time_apart(seconds: dict[str, float], other: Entry) -> float:
    theirs = other.seconds()
    return min((abs(seconds[name] - theirs[name]) for name in seconds if name in theirs), default=math.inf)


def _name(entry: Entry) -> str:
    return f"{entry.method} ({entry.steps} steps)"


def summary(entry: Entry, baseline: Entry | None) -> list[str]:
    """The cells of one method under the headings SUMMARY."""
    row = entry.first
    eager = "" if row["captured"] or not row["seconds"] else " (eager)"
    seconds = ", ".join(f"{time:.1f} {short_name(name)}" for name, time in entry.seconds().items())
    return [
        f"**{entry.method}**: {method_of(entry.method).about}",
        str(entry.steps),
        f"{entry.lr:g}",
        str(len(entry.runs)),
        str(entry.loss()),
        _minus(entry, baseline),
        f"{row['parameters']:,}",
        f"{seconds}{eager}",
        f"{entry.peak_mib:,}",
    ]


def short_name(hardware: str) -> str:
    """The word that tells it apart.

    Example:
        >>> short_name("NVIDIA H100 80GB HBM3"), short_name("AMD EPYC 9V74 80-Core Processor, 2 threads")
        ('H100', 'AMD')
    """
    return hardware.removeprefix("NVIDIA ").split()[0]


def _minus(entry: Entry, baseline: Entry | None) -> str:
    difference = None if baseline is None else entry.difference(baseline)
    if baseline is None or difference is None:
        return ""
    at = "" if baseline.steps == entry.steps else f" ({_name(baseline)})"
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
            writer.writerow(
                ["suite", "method", "steps", "lr", "seed", "domain", "loss", "accuracy", "seconds", "hardware"]
            )
        for entry in found:
            for seed, row in entry.runs.items():
                for domain, scores in row["scores"].items():
                    values = [scores["loss"], scores.get("accuracy", ""), row["seconds"], row["hardware"]]
                    writer.writerow([suite, entry.method, entry.steps, entry.lr, seed, domain, *values])


def draw(found: Sequence[Entry], suite: str, split: str, path: Path) -> None:
    """Mean loss with its interval, best at the top; what is not trained, far away, is left out."""
    from matplotlib.figure import Figure

    done = [entry for entry in found if entry.runs and method_of(entry.method).kind not in ("frozen", "arrow")]
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
    parser.add_argument(
        "--baseline",
        default=BASELINE,
        metavar="NAME[@STEPS]",
        help=f"method to take differences from, in a file of its own (default: {BASELINE})",
    )
    parser.add_argument("--split", default="test", choices=["test", "validation"], help="default: test")
    args = parser.parse_args(argv)
    if lost := [str(path) for path in args.rows if not path.is_file()]:
        parser.error(f"{', '.join(lost)}: no such file; give rows.jsonl of python -m benchmarks.quality")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write `<split>.md` (`<split>-minus-<baseline>.md`), `<split>.csv` and `<suite>-<split>.png`.

    Raises:
        SystemExit: the rows hold no such baseline.
    """
    args = parse(argv)
    rows = list(read_rows(args.rows))
    known = {name for row in rows for name in (row["method"], f"{row['method']}@{row['steps']}")}
    if args.baseline not in {BASELINE, *known}:
        raise SystemExit(
            f"--baseline {args.baseline}: the rows hold none of that name; they hold {', '.join(sorted(known))}"
        )
    out = args.out or args.rows[0].parent
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.split}.csv").unlink(missing_ok=True)
    texts = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        found = entries(rows, suite, args.split)
        texts.append(markdown(found, suite, args.split, args.baseline))
        write_csv(found, suite, out / f"{args.split}.csv")
        draw(found, suite, args.split, out / f"{suite}-{args.split}.png")
    name = args.split if args.baseline == BASELINE else f"{args.split}-minus-{args.baseline}"
    (out / f"{name}.md").write_text("\n".join(texts), encoding="utf-8")
    print(f"written: {out / name}.md", flush=True)


if __name__ == "__main__":
    main()
