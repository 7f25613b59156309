"""How well the domain classifier tells the tasks of a sequence by their prompts, before anything is trained.

The recipe's router reads the embeddings, which no expert changes: a base model of one block does, and a CPU. The
covariance is that of whole texts, as in the recipe, or of single tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from moelora.experts import grow, learn_domain
from moelora.routing import rms_norm
from moelora.routing.domain_classifier import over_context

from ..arms import shared_copy
from ..options import make_parser
from ..quality.data import Examples
from ..record import RESULTS
from .bases import BASES, load_base
from .learner import EncodedTask, Plan, Setting
from .mixture import Recipe, prompt_mask, prompts
from .options import note_origin
from .run import Job, Row, Source, tasks_of
from .tasks import PUBLISHED, SEQUENCES

MODULE = "benchmarks.continual.telling"
EXAMPLES = ("--quick", "--data ../shared/cl-benchmark --models build/models --bases smollm2 --sequences order4")
ROWS_FILE = "telling.jsonl"
COVARIANCES = {"texts": None, "tokens": 1}  # the window that statistics are made for; all of the text decides
PLACES = (16, 64)  # tokens read, beside whole prompts


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, help="folder that holds the tasks' folders (docs/continual.md)")
    add("--models", type=Path, help="folder with the saved models smollm2 and gemma (default: from the Hub)")
    add("--bases", nargs="+", choices=[name for name in BASES if name != "quick"], default=["smollm2", "gemma"])
    add("--sequences", nargs="+", choices=list(SEQUENCES), default=list(PUBLISHED))
    add("--tokens", nargs="+", type=int, default=[8_192, 32_768], help="read of each task (default: 8192 32768)")
    add("--device", default="cpu", choices=["cuda", "cpu"])
    add("--quick", action="store_true", help="a tiny random model on made-up tasks: whether the code works")
    add("--out", type=Path, default=RESULTS / "continual", help=f"folder of {ROWS_FILE}, which is added to")
    add("--commit", help="commit to name in the results, where there is no git checkout")
    args = parser.parse_args(argv)
    if args.quick:
        args.bases, args.data = ["quick"], None
    elif args.data is None:
        parser.error("--data FOLDER is missing: where the tasks are (docs/continual.md); or --quick")
    return args


def with_one_block(base: nn.Module) -> nn.Module:
    """A copy of the model, on its own weights, with its first block alone."""
    base = shared_copy(base)
    base.model.layers = base.model.layers[:1]
    base.config.num_hidden_layers = 1
    return base


def knowing(setting: Setting, tokens: int, window: int | None) -> PeftModel:
    """A mixture with an untrained expert for each task, and statistics of the task's prompts."""
    model = get_peft_model(setting.base, Recipe(window=window).config(1))
    for stage in range(len(setting.tasks)):
        name = grow(model) if stage else "default"
        learn_domain(model, name, prompts(setting.batches([stage])), max_tokens=tokens)
    return model


@torch.no_grad()
def told(model: PeftModel, examples: Examples) -> dict[str, Tensor]:
    """[N] the likeliest task of each prompt after some of its tokens, and after all."""
    (router,) = model.base_model.routing.routers.values()
    own = list(router.lora_router.values())
    device = own[0].gate_weight.device
    ids, labels, mask = (torch.as_tensor(getattr(examples, name)).to(device) for name in ("ids", "labels", "mask"))
    here = prompt_mask(mask, labels)
    weights, biases = (torch.cat([getattr(one, name) for one in own]) for name in ("gate_weight", "gate_bias"))
    densities = F.linear(rms_norm(model.get_input_embeddings()(ids)), weights, biases)
    likeliest = over_context(densities, None, here).argmax(-1)
    places, last = here.cumsum(1), here.sum(1)
    found = {}
    for name, place in [*((str(place), place) for place in PLACES), ("end", ids.shape[1])]:
        at = (places == last.clamp(max=place)[:, None]) & here
        found[name] = likeliest[at]
    return found


def accuracies(setting: Setting, tokens: int, covariance: str) -> Row:
    """By place, the percentage of test prompts whose task is told, by task."""
    model = knowing(setting, tokens, COVARIANCES[covariance])
    row: Row = {"tokens": tokens, "covariance": covariance, "tasks": [task.name for task in setting.tasks]}
    for number, task in enumerate(setting.tasks):
        for place, likeliest in told(model, task.examples["test"]).items():
            row.setdefault(place, []).append(round(float((likeliest == number).double().mean()) * 100, 2))
    model.unload()
    return row


def _line(row: Row) -> str:
    means = ", ".join(f"{sum(row[place]) / len(row[place]):.2f}% {where}" for place, where in _WHERE.items())
    worst = sorted(zip(row["end"], row["tasks"], strict=True))[:3]
    least = ", ".join(f"{name} {score:.1f}%" for score, name in worst)
    what = f"{row['base']} {row['sequence']}, {row['tokens']:,} tokens, covariance of {row['covariance']}"
    return f"{what}: {means}; least {least}"


_WHERE = {**{str(place): f"after {place} tokens" for place in PLACES}, "end": "at the end"}


def main(argv: Sequence[str] | None = None) -> None:
    """Print and keep a row for each base, sequence, number of tokens and covariance."""
    args = parse(argv)
    note_origin(args, MODULE, argv)
    plan = Plan(steps=60, rows=16, rank=1, device=args.device)
    source = Source(args.data, args.models)
    for name in args.bases:
        base, tokenizer = load_base(name, args.models, args.device)
        for sequence in args.sequences:
            tasks = [EncodedTask.of(task, tokenizer) for task in tasks_of(Job(name, sequence, "", 0, 0), source)]
            setting = Setting(with_one_block(base), tokenizer, tasks, plan, 0, 0.0)
            for tokens in args.tokens:
                for covariance in COVARIANCES:
                    row = {"base": name, "sequence": sequence, **accuracies(setting, tokens, covariance)}
                    with (args.out / ROWS_FILE).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(_line(row), flush=True)


if __name__ == "__main__":
    main()
