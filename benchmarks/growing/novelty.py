"""Whether a mixture that grew knows what it does not know: ROC on domains that it never learned."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moelora.experts.novelty_score import Novelty, auc, judge, measure

from ..quality.trainer import autocast
from ..record import command_line, environment
from .__main__ import load, parser_of
from .learners import LEARNERS, Setting

MODULE = "benchmarks.growing.novelty"
EXAMPLES = (
    "--device cpu --quick",
    "--device cuda --data .scratch/quality --model .scratch --domains python german bible sql",
)
TEXTS = 96
LENGTH = 128


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options: those of the benchmark; `--domains` are learned, all others of the data are new."""
    parser = parser_of(MODULE, __doc__, EXAMPLES)
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"of each domain (default: {TEXTS})")
    return parser.parse_args(argv)


def rows_of(ids: np.ndarray, count: int) -> list[list[int]]:
    """The starts of some blocks, evenly spread over all."""
    chosen = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    return [ids[number, :LENGTH].tolist() for number in chosen]


def run(args: argparse.Namespace, seed: int) -> dict[str, Novelty]:
    """Learn all domains but the new ones; how new test texts of every domain are, calibrated on validation texts."""
    base, data, plan = load(args)
    torch.manual_seed(seed)
    learner = LEARNERS["grown"][1](Setting(base, data, plan, seed, args.rates[0]))
    for stage in range(len(plan.domains)):
        learner.learn(stage)
    new = [name for name in data if name not in plan.domains]
    with autocast(args.device):
        known = [text for name in plan.domains for text in rows_of(data[name]["validation"].ids, args.texts)]
        number, calibration = measure(learner.model, known, batch_size=32)
        return {
            name: judge(
                number,
                calibration,
                measure(learner.model, rows_of(data[name]["test"].ids, args.texts), batch_size=32)[1],
            )
            for name in (*plan.domains, *new)
        }


def table(found: dict[str, Novelty], learned: Sequence[str]) -> str:
    """Markdown: a line a domain, and the area under the ROC curve of those that were not learned."""
    known = known_scores(found, learned)
    lines = ["| domain | learned | flagged as new | AUC |", "|---" * 4 + "|"]
    for name, novelty in found.items():
        is_known = name in learned
        area = "" if is_known else f"{auc(known, novelty.scores):.3f}"
        lines.append(f"| {name} | {'yes' if is_known else 'no'} | {novelty.share_new:.0%} | {area} |")
    return "\n".join(lines)


def known_scores(found: dict[str, Novelty], learned: Sequence[str]) -> np.ndarray:
    """[N] of all texts of the domains that were learned."""
    return np.concatenate([found[name].scores for name in found if name in learned])


def draw(found: dict[str, Novelty], learned: Sequence[str], path: Path) -> None:
    """ROC curves of the domains that were not learned."""
    from matplotlib.figure import Figure

    known = known_scores(found, learned)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    for name, novelty in found.items():
        if name in learned:
            continue
        cuts = np.sort(np.concatenate([known, novelty.scores]))[::-1]
        rates = [np.concatenate([[0.0], (s[None, :] >= cuts[:, None]).mean(1)]) for s in (known, novelty.scores)]
        axis.plot(*rates, label=f"{name} ({auc(known, novelty.scores):.3f})")
    axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    axis.set(xlabel="known texts taken for new", ylabel="new texts found", title="Domains never learned")
    axis.legend(title="AUC", loc="lower right")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write it, the scores and the figure into the folder."""
    args = parse(argv)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    found = run(args, seed=0)
    learned = [name for name in found if name in args.domains]
    text = table(found, learned)
    scores = {name: novelty.scores.round(4).tolist() for name, novelty in found.items()}
    (args.out / "novelty.json").write_text(json.dumps({"learned": learned, "scores": scores}) + "\n", encoding="utf-8")
    arguments = sys.argv[1:] if argv is None else list(argv)
    about = "\n".join(environment(args.device, command_line(MODULE, arguments)))
    (args.out / "novelty.md").write_text(f"{text}\n\n<!--\n{about}\n-->\n", encoding="utf-8")
    draw(found, learned, args.out / "novelty.svg")
    print(text)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
