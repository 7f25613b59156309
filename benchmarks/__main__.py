"""The check of correctness, then the benchmarks, into one CSV and one file of Markdown tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import crossover, decode, generate, growth, layer, model, native, pool, table
from .correctness import CorrectnessError, check_correctness
from .options import add_output_options, make_parser, output_folder
from .record import CSV_NAME, TABLE_NAME, command_line

MODULES = {
    module.MODULE.rpartition(".")[2]: module
    for module in (layer, model, decode, generate, growth, crossover, pool, native)
}
EXAMPLES = (
    "",
    "--device cpu --quick",
    "--device cuda --only layer --out benchmarks/results/h200",
    "--device cuda --only growth crossover --repeats 7",
)
SMALL = "--dtype float32 --hidden 576 --intermediate 1536 --kv 192 --experts 4 --rank 8"
GROWTH_ON_CPU = f"{SMALL} --tokens 256 --num-tokens 1 8 64 256 --num-experts 2 4 8 16 --ranks 4 8 16"
CROSSOVER_ON_CPU = "--dtype float32 --tokens 256 --widths 576 576 576 1536"
POOL_ON_CPU = "--dtype float32 --hidden 576 --intermediate 1536 --kv 192 --rank 8 --num-tokens 256"
# The options of each benchmark by device and --quick.
PLANS: dict[tuple[str, bool], dict[str, str]] = {
    ("cuda", False): dict.fromkeys(MODULES, ""),
    ("cuda", True): {
        "layer": "--shapes block",
        "model": "--layers 2",
        "decode": "--layers 2 --batches 1 8",
        "generate": "--layers 2 --steps 16",
        "growth": "--num-experts 2 8 --ranks 8 16 --num-tokens 64 8192",
        "crossover": "--num-experts 8 32",
        "pool": "--num-experts 32 256 --num-tokens 8192",
        "native": "--tokens 8192 --arms frozen native-lora native beside",
    },
    ("cpu", False): {
        "layer": f"{SMALL} --tokens 512",
        "model": "--preset quickstart",
        "decode": "--preset quickstart",
        "generate": "--preset quickstart --steps 8",
        "growth": GROWTH_ON_CPU,
        "crossover": CROSSOVER_ON_CPU,
        "pool": POOL_ON_CPU,
        "native": "--quick --tokens 256",
    },
    ("cpu", True): {
        "layer": f"{SMALL} --tokens 128 --shapes block --min-time 0.05",
        "model": "--preset tiny --min-time 0.05",
        "decode": "--preset tiny --min-time 0.05",
        "generate": "--preset tiny --min-time 0.05 --steps 8",
        "growth": f"{GROWTH_ON_CPU} --min-time 0.01",
        "crossover": f"{CROSSOVER_ON_CPU} --num-experts 8 --min-time 0.01",
        "pool": f"{POOL_ON_CPU} --num-experts 8 64 --min-time 0.01",
        "native": "--quick",
    },
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser("benchmarks", __doc__, EXAMPLES)
    add_output_options(parser)
    parser.add_argument("--quick", action="store_true", help="small sizes: two minutes on two cores")
    default = ["layer", "model", "decode"]
    names = f"benchmarks to run, of {', '.join(MODULES)} (default: {', '.join(default)})"
    parser.add_argument("--only", nargs="+", default=default, choices=list(MODULES), metavar="NAME", help=names)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Gate, measure, write.

    Raises:
        SystemExit: the check failed.
    """
    args = parse(argv)
    try:
        check_correctness(args.device)
    except CorrectnessError as error:
        raise SystemExit(f"the check of correctness failed: {error}") from None
    out = output_folder(args)
    common = ["--device", args.device, "--repeats", str(args.repeats), "--out", str(out)]
    common += ["--commit", args.commit] if args.commit else []
    for name in args.only:
        arguments = [*common, *PLANS[args.device, args.quick][name].split()]
        print(f"\n{command_line(MODULES[name].MODULE, arguments)}", flush=True)
        try:
            MODULES[name].main(arguments)
        finally:  # what was measured so far is worth a table whatever happens to the rest
            if (out / CSV_NAME).exists():
                table.write([out / CSV_NAME], out / TABLE_NAME)


if __name__ == "__main__":
    main()
