"""Draw how cost grows with experts, rank and tokens, from the results of `python -m benchmarks.growth`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .options import make_parser
from .record import read
from .table import Comparison, comparisons

MODULE = "benchmarks.plot"
EXAMPLES = ("benchmarks/results/cpu-2026-01-31/results.csv growth.png",)
AXES = {"experts": "experts E", "rank": "rank r of one expert", "tokens": "tokens T"}
# Distinct without colour: shade, dash and marker all differ.
STYLES = {
    "ours": {"color": "black", "linestyle": "-", "marker": "o", "label": "moelora"},
    "lora": {"color": "0.4", "linestyle": "--", "marker": "s", "label": "PEFT LoRA, rank k*r"},
    "lora-equal": {"color": "0.6", "linestyle": ":", "marker": "^", "label": "PEFT LoRA, rank E*r"},
}


def draw(csv: Sequence[Path], out: Path) -> None:
    """Write the picture.

    Raises:
        SystemExit: the files hold no growth measurements, or matplotlib is missing.
    """
    comments, rows = read(csv)
    points = comparisons(row for row in rows if row.benchmark == "growth")
    if not points:
        raise SystemExit(f"no growth measurements in {', '.join(map(str, csv))}; run python -m benchmarks.growth first")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit('matplotlib is missing; pip install -e ".[bench]"') from None
    axes = [name for name in AXES if any(point.setting.case == f"by {name}" for point in points)]
    figure = Figure(figsize=(4 * len(axes), 3.6), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        _draw_panel(panel, axis, [point for point in points if point.setting.case == f"by {axis}"])
    figure.axes[0].set_ylabel("time, multiple of the frozen linears'")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(comments[0], fontsize="x-small")
    figure.savefig(out, dpi=160)
    print(f"picture: {out}", flush=True)


def _draw_panel(panel: Any, axis: str, points: list[Comparison]) -> None:
    points = sorted(points, key=lambda point: getattr(point.setting, axis))
    panel.axhline(1, color="0.8", linewidth=1)
    for arm, style in STYLES.items():
        measured = [(getattr(point.setting, axis), point.ratio(arm, "frozen")) for point in points]
        measured = [(x, ratio) for x, ratio in measured if ratio]
        if measured:
            xs, ratios = zip(*measured, strict=True)
            panel.errorbar(xs, [r[0] for r in ratios], yerr=[r[1] for r in ratios], markersize=4, capsize=2, **style)
    panel.set_ylim(bottom=0)
    panel.set_xscale("log", base=2)
    ticks = [getattr(point.setting, axis) for point in points]
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    setting = points[0].setting
    others = {"experts": f"E = {setting.experts}", "rank": f"r = {setting.rank}", "tokens": f"T = {setting.tokens}"}
    fixed = [text for name, text in others.items() if name != axis]
    panel.set_xlabel(f"{AXES[axis]} ({', '.join(fixed)}, k = {setting.top_k})")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("out", type=Path, help="picture to write (.png, .svg, .pdf)")
    args = parser.parse_args(argv)
    draw(args.csv, args.out)


if __name__ == "__main__":
    main()
