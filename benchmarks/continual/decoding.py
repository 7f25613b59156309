"""What a mixture costs after so many tasks: milliseconds a token when it decodes, and the size of its folder.

The experts are random: neither time nor size asks what they have learned. The arms take turns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moelora.experts import grow, learn_domain

from ..options import add_output_options, make_parser, recorder_of
from ..record import Recorder, Row
from ..timing import take_turns
from .bases import BASES, load_base
from .learner import Plan, Setting
from .mixture import Grown, Recipe

MODULE = "benchmarks.continual.decoding"
EXAMPLES = (
    "--device cpu --quick",
    "--device cuda --models /models --base smollm2 --tasks 1 15 50 --repeats 9",
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_output_options(parser)
    add = parser.add_argument
    add("--models", type=Path, help="folder with the saved models (default: from the Hub)")
    add("--base", choices=[name for name in BASES if name != "quick"], default="smollm2")
    add("--quick", action="store_true", help="a tiny random model: whether the code works")
    add("--tasks", nargs="+", type=int, default=[1, 15, 50], help="numbers of tasks learned (default: 1 15 50)")
    add("--rank", type=int, default=16, help="of a task's LoRA or experts together (default: 16)")
    add("--batches", nargs="+", type=int, default=[1, 8], help="sequences at a time (default: 1 8)")
    add("--prompt", type=int, default=64, help="tokens before decoding (default: 64)")
    add("--new", type=int, default=32, help="tokens decoded in one call (default: 32)")
    add("--min-time", type=float, default=0.1, help="seconds that one measurement lasts at least")
    args = parser.parse_args(argv)
    if args.quick:
        args.base, args.new, args.tasks = "quick", 4, [1, 3]
    return args


def mixture_of(setting: Setting, num_tasks: int) -> nn.Module:
    """A mixture that has grown by so many tasks, each with factors and domain statistics that are not another's."""
    learner = Grown(setting, Recipe())
    model, names = learner.model, ["default"]
    for _ in range(num_tasks - 1):
        names.append(grow(model))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.01)
    for number, name in enumerate(names):
        learn_domain(model, name, _texts(setting, number), max_tokens=512)
    model.set_adapter(names)
    return model.eval()


def _texts(setting: Setting, number: int) -> Iterator[Mapping[str, Tensor]]:
    """A task's, as [`_random_ids`] makes them."""
    yield {"input_ids": _random_ids(setting, number, 8, 64)}


def _random_ids(setting: Setting, number: int, rows: int, length: int) -> Tensor:
    """[rows, length] from a part of the vocabulary that is a task's own."""
    generator = torch.Generator().manual_seed(number)
    size = setting.base.config.vocab_size
    first = number * size // 64
    return torch.randint(first, first + size // 64, (rows, length), generator=generator).to(setting.plan.device)


def arms_of(setting: Setting, numbers: Sequence[int]) -> dict[str, nn.Module]:
    """The frozen base, one LoRA, and mixtures."""
    arms: dict[str, nn.Module] = {"frozen": setting.base.eval(), "lora": setting.lora().eval()}
    return arms | {f"{number} tasks": mixture_of(setting, number) for number in numbers}


def generation(model: nn.Module, setting: Setting, batch: int, args: argparse.Namespace) -> Callable[[], object]:
    """What decodes `--new` tokens of every sequence, which are all of the first task."""
    ids = _random_ids(setting, 0, batch, args.prompt)
    options = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False, "pad_token_id": setting.pad}
    return partial(model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def record_size(model: nn.Module, recorder: Recorder, row: Row, arm: str) -> None:
    """The bytes of the saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    recorder.add(row, arm=arm, metric="stored_bytes", value=size)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure sizes, then every batch size."""
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    torch.manual_seed(0)
    base, tokenizer = load_base(args.base, args.models, args.device)
    setting = Setting(base, tokenizer, [], Plan(0, 0, args.rank, args.device), 0, 0.0)
    arms = arms_of(setting, args.tasks)
    dtype = str(next(base.parameters()).dtype).removeprefix("torch.")
    for batch in args.batches:
        case = f"{args.base}, batch {batch}, {args.new} tokens after {args.prompt}"
        row = Row("continual-decoding", case, batch, 1, args.rank, 1, dtype)
        calls = {arm: generation(model, setting, batch, args) for arm, model in arms.items()}
        take_turns(calls, recorder, row, args.device, args.repeats, args.min_time, args.new)
    for arm, model in arms.items():
        if arm != "frozen":
            record_size(model, recorder, row, arm)


if __name__ == "__main__":
    main()
