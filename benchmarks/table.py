"""Markdown tables from recorded measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .arms import ARMS
from .options import make_parser
from .record import Row, read

MODULE = "benchmarks.table"
EXAMPLES = ("benchmarks/results/*/results.csv", "part-1.csv part-2.csv --out results.md")
SWEEPS = ("growth", "crossover")
KEY_FIELDS = ("benchmark", "case", "tokens", "experts", "rank", "top_k", "dtype")
MEBIBYTE = 2**20


class Comparison:
    """The measurements of all arms under one setting."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.setting = rows[0]
        self.arms = list(dict.fromkeys(row.arm for row in rows if row.arm))
        self.rows = rows

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """By repeat; the latest where one was measured again."""
        return {row.repeat: row.value for row in self.rows if (row.arm, row.metric) == (arm, metric)}

    def single(self, arm: str, metric: str) -> float | None:
        """A value that is measured once."""
        return self.values(arm, metric).get(0)

    def failure(self, arm: str) -> str | None:
        """Why an arm failed, if it did."""
        return next((row.note for row in self.rows if (row.arm, row.metric) == (arm, "failed")), None)

    def ratio(self, arm: str, to: str) -> tuple[float, float] | None:
        """Median and half-range of the time of arm over that of another, repeat by repeat."""
        mine, other = self.values(arm, "seconds"), self.values(to, "seconds")
        ratios = [mine[repeat] / other[repeat] for repeat in mine if repeat in other]
        return (statistics.median(ratios), (max(ratios) - min(ratios)) / 2) if ratios else None


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """Rows of one setting together, in the order of their first measurement."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in KEY_FIELDS), []).append(row)
    return [Comparison(group) for group in groups.values()]


def _milliseconds(comparison: Comparison, arm: str) -> str:
    times = list(comparison.values(arm, "seconds").values())
    if not times:
        return ""
    half_range = (max(times) - min(times)) / 2
    return f"{statistics.median(times) * 1e3:.3f} ± {half_range * 1e3:.3f}"


def _tokens_per_second(comparison: Comparison, arm: str) -> str:
    times = list(comparison.values(arm, "seconds").values())
    return f"{comparison.setting.tokens / statistics.median(times):,.0f}" if times else ""


def _ratio_to(to: str) -> Callable[[Comparison, str], str]:
    def cell(comparison: Comparison, arm: str) -> str:
        ratio = comparison.ratio(arm, to)
        return f"{ratio[0]:.3f} ± {ratio[1]:.3f}" if ratio else ""

    return cell


def _mebibytes(metric: str) -> Callable[[Comparison, str], str]:
    def cell(comparison: Comparison, arm: str) -> str:
        value = comparison.single(arm, metric)
        return "" if value is None else f"{value / MEBIBYTE:,.0f}"

    return cell


def _extra(comparison: Comparison, arm: str, metric: str) -> float | None:
    value, frozen = comparison.single(arm, metric), comparison.single("frozen", metric)
    return None if value is None or frozen is None else value - frozen


def _extra_mebibytes(metric: str) -> Callable[[Comparison, str], str]:
    def cell(comparison: Comparison, arm: str) -> str:
        extra = _extra(comparison, arm, metric)
        return "" if extra is None else f"{extra / MEBIBYTE:,.0f}"

    return cell


def _extra_ratio(metric: str) -> Callable[[Comparison, str], str]:
    def cell(comparison: Comparison, arm: str) -> str:
        extra, lora = _extra(comparison, arm, metric), _extra(comparison, "lora", metric)
        return f"{extra / lora:.2f}" if extra is not None and lora else ""

    return cell


COLUMNS: dict[str, Callable[[Comparison, str], str]] = {
    "ms": _milliseconds,
    "tokens/s": _tokens_per_second,
    "time x frozen": _ratio_to("frozen"),
    "x lora": _ratio_to("lora"),
    "x lora-default": _ratio_to("lora-default"),
    "x lora-equal": _ratio_to("lora-equal"),
    "x native-lora": _ratio_to("native-lora"),
    "x native-lora-default": _ratio_to("native-lora-default"),
    "x unsloth": _ratio_to("unsloth"),
    "x lora-liger": _ratio_to("lora-liger"),
    "x unwatched": _ratio_to("unwatched"),
    "x stock-base": _ratio_to("stock-base"),
    "x stock-lora": _ratio_to("stock-lora"),
    "x plugin-lora": _ratio_to("plugin-lora"),
    "peak MiB": _mebibytes("peak_bytes"),
    "peak over frozen": _extra_mebibytes("peak_bytes"),
    "that, x lora": _extra_ratio("peak_bytes"),
    "kept over frozen": _extra_mebibytes("kept_bytes"),
    "kept, x lora": _extra_ratio("kept_bytes"),
}


def arm_table(comparison: Comparison) -> list[str]:
    """One row per arm; columns that no arm fills are left out."""
    s = comparison.setting
    title = f"### {s.benchmark}: {s.case}"
    settings = f"T = {s.tokens}, E = {s.experts}, r = {s.rank}, k = {s.top_k}, {s.dtype}"
    if clock := comparison.single("", "clock_mhz"):
        settings += f", SM clock {clock:.0f} MHz under load"
    cells = {name: [column(comparison, arm) for arm in comparison.arms] for name, column in COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    rows = [[arm, *(column[i] for column in cells.values())] for i, arm in enumerate(comparison.arms)]
    failures = [f"{arm} failed: {comparison.failure(arm)}" for arm in comparison.arms if comparison.failure(arm)]
    return [title, "", settings, "", *_markdown(["arm", *cells], rows), "", *failures, ""]


def sweep_table(title: str, points: Sequence[Comparison]) -> list[str]:
    """One row per setting, one column per arm: its time as a multiple of the frozen model's."""
    arms = [arm for arm in points[0].arms if arm != "frozen"]
    rows = []
    for point in points:
        s = point.setting
        settings = [s.tokens, s.experts, s.rank, s.experts * s.rank, s.top_k]
        cells = [*map(str, settings), _milliseconds(point, "frozen")]
        rows.append(cells + [_ratio_to("frozen")(point, arm) for arm in arms])
    header = ["T", "E", "r", "E*r", "k", "frozen ms", *(f"{arm}, x frozen" for arm in arms)]
    return [f"### {title}", "", *_markdown(header, rows), ""]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def render(comments: Sequence[str], rows: Sequence[Row]) -> str:
    """The whole Markdown file."""
    lines = ["# Benchmark results", "", *(f"- {comment}" for comment in comments), ""]
    lines += [
        "Medians over the repeats, ± half their range; ratios are taken repeat by repeat, the arms taking turns.",
        "",
    ]
    sweeps: dict[str, list[Comparison]] = {}
    for comparison in comparisons(rows):
        s = comparison.setting
        if s.benchmark in SWEEPS:
            sweeps.setdefault(f"{s.benchmark}: {s.case}, {s.dtype}", []).append(comparison)
        else:
            lines += arm_table(comparison)
    for title, points in sweeps.items():
        lines += sweep_table(title, points)
    used = dict.fromkeys(row.arm for row in rows if row.arm)
    lines += ["### Arms", "", *(f"- `{arm}`: {ARMS[arm]}" for arm in used)]
    return "\n".join(lines) + "\n"


def write(paths: Iterable[Path], out: Path) -> None:
    """Render CSV files into one Markdown file."""
    out.write_text(render(*read(paths)), encoding="utf-8")
    print(f"tables: {out}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write them."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="Markdown file to write instead of printing")
    args = parser.parse_args(argv)
    if args.out:
        write(args.csv, args.out)
    else:
        print(render(*read(args.csv)), end="")


if __name__ == "__main__":
    main()
