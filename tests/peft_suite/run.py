"""Run PEFT's own tests on MoELoraConfig and record how many apply, how many pass, and why the rest do not.

The tests come from PEFT's source release, which pip downloads into a temporary folder; nothing of it is copied here.
Stock LoraConfig runs first: a case counts when it passes there on stand-ins for the hub's models.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deviations import explain
from standins import build_hub_cache

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "docs" / "peft-tests.md"

# PEFT's test files by the scope that can route them: custom models have no transformer blocks.
FILES = {
    "module": ("custom_models", "initialization", "tuners_utils", "low_level_api", "other"),
    "block": (
        "decoder_models",
        "encoder_decoder_models",
        "feature_extraction_models",
        "seq_classifier",
        "target_parameters",
    ),
}
STOCK = "LoraConfig"
VARIANTS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "use_moe_routing=False": {"use_moe_routing": False},
    'router_type="fixed"': {"num_experts": 2, "router_type": "fixed"},
    "learned_with_maturity (default)": {"num_experts": 2},
}

_METHOD = """\
Each test file runs with `LoraConfig` replaced by `MoELoraConfig`: 2 experts, and `router_scope` "module" for custom
models, which have no transformer blocks, or "block" for transformers models. A case counts when it makes a `LoraConfig`
in the stock run. *Skipped*: PEFT skips it, or it cannot run here, for stock LoRA too (a GPU, a file from the hub).
*Refused*: it needs what a mixture refuses by name. The others *apply*: they pass, or differ by design as listed below,
or are unexplained, which is a bug.
"""

Case = tuple[str, str, str]  # file, test, parameters
Records = dict[Case, dict[str, Any]]


@dataclass
class Tally:
    """What became of one file's cases under one variant."""

    cases: int = 0
    skipped: int = 0  # by PEFT, also for LoRA
    refused: int = 0
    passed: int = 0
    differs: int = 0
    bugs: list[tuple[str, str]] = field(default_factory=list)  # test, message
    reasons: Counter[tuple[str, bool]] = field(default_factory=Counter)

    @property
    def applies(self) -> int:
        """Cases that are about something a mixture does."""
        return self.passed + self.differs + len(self.bugs)


def unpack_release(folder: Path, sdist: Path | None) -> Path:
    """PEFT's source release of the installed version, with a tests package that pytest can import."""
    if sdist is None:
        version = importlib.metadata.version("peft")
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:")
        subprocess.run([*pip, f"peft=={version}", "--dest", str(folder)], check=True)
        sdist = next(folder.glob("peft-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    root = next(path for path in folder.glob("peft-*") if path.is_dir())
    (root / "tests" / "__init__.py").touch()
    # In place of PEFT's own options, which ask for coverage.
    (root / "pytest.ini").write_text("[pytest]\naddopts = -q --tb=no -W ignore -p no:cacheprovider\n")
    return root


def run_pytest(root: Path, cache: Path, variant: str, options: argparse.Namespace) -> Records:
    """Run one variant over all files."""
    records = root / "records.jsonl"
    records.unlink(missing_ok=True)
    config = STOCK if variant == STOCK else "MoELoraConfig"
    for scope, names in FILES.items():
        files = [f"tests/test_{name}.py" for name in names if name in options.files]
        if not files:
            continue
        defaults = dict(VARIANTS[variant])
        if "num_experts" in defaults:
            defaults["router_scope"] = scope
        settings = {"config": config, "defaults": defaults, "records": str(records)}
        environment = {
            **os.environ,
            "MOELORA_PEFT_SUITE": json.dumps(settings),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        selection = ["-k", options.k] if options.k else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "plugin", *selection, *files],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        print(f"{variant}, {scope}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        if done.returncode not in (0, 1, 5):  # passed, failed, nothing selected
            sys.exit(done.stdout)
    return read_records(records, config)


def read_records(path: Path, config: str) -> Records:
    """The records by case, under one name for both configuration classes."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {(r["file"], r["test"], r["case"].replace(config, STOCK)): r for r in records}


def tally(stock: Records, records: Records, variant: str) -> dict[str, Tally]:
    """Judge each case of stock LoRA that ran here by what it became; by file."""
    tallies: dict[str, Tally] = {}
    for case, expected in sorted(stock.items()):
        if not expected["concerns_lora"]:
            continue
        file, test, _ = case
        entry = tallies.setdefault(file.removeprefix("test_").removesuffix(".py"), Tally())
        entry.cases += 1
        if expected["outcome"] != "passed":
            entry.skipped += 1
            continue
        found = records.get(case, {"outcome": "missing", "message": "the case was not collected"})
        if found["outcome"] == "passed":
            entry.passed += 1
            continue
        explained = explain(test, found["message"], variant == "use_moe_routing=False")
        if explained is None:
            entry.bugs.append((test, found["message"]))
            continue
        entry.reasons[explained] += 1
        if explained[1]:
            entry.differs += 1
        else:
            entry.refused += 1
    return tallies


def report(results: dict[str, dict[str, Tally]], release: str) -> str:
    """The record, in Markdown."""
    return "\n".join([*_header(release), *_table(results), *_reasons(results), *_bugs(results)]) + "\n"


def _header(release: str) -> Iterator[str]:
    packages = ("torch", "transformers", "peft", "accelerate", "diffusers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    yield "# PEFT's own tests on MoELoraConfig\n"
    yield "Written by `make peft-suite`; do not edit.\n"
    yield f"Tests of {release}; Python {platform.python_version()}, {versions}, CPU.\n"
    yield _METHOD


def _table(results: dict[str, dict[str, Tally]]) -> Iterator[str]:
    yield "| Variant | Test file | Cases | Skipped | Refused | Apply | Pass | Differ by design | Unexplained |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for variant, tallies in results.items():
        rows = {**tallies, "**all**": sum_tallies(tallies)}
        for file, t in rows.items():
            counts = (t.cases, t.skipped, t.refused, t.applies, t.passed, t.differs, len(t.bugs))
            yield f"| {variant} | {file} | " + " | ".join(map(str, counts)) + " |"


def sum_tallies(tallies: dict[str, Tally]) -> Tally:
    """All files together."""
    total = Tally()
    for t in tallies.values():
        total.cases, total.skipped, total.refused = (
            total.cases + t.cases,
            total.skipped + t.skipped,
            total.refused + t.refused,
        )
        total.passed, total.differs = total.passed + t.passed, total.differs + t.differs
        total.bugs += t.bugs
        total.reasons += t.reasons
    return total


def _reasons(results: dict[str, dict[str, Tally]]) -> Iterator[str]:
    totals = {variant: sum_tallies(tallies) for variant, tallies in results.items() if variant != STOCK}
    every = Counter[tuple[str, bool]]()
    for total in totals.values():
        every |= total.reasons
    for title, applies in (("Why cases do not apply", False), ("Where behaviour differs by design", True)):
        yield f"\n## {title}\n"
        yield "| Reason | " + " | ".join(totals) + " |"
        yield "|---" * (len(totals) + 1) + "|"
        for reason, _ in sorted((r for r in every.items() if r[0][1] == applies), key=lambda r: -r[1]):
            counts = " | ".join(str(total.reasons[reason]) for total in totals.values())
            yield f"| {reason[0]} | {counts} |"


def _bugs(results: dict[str, dict[str, Tally]]) -> Iterator[str]:
    """The unexplained, one line per test with the error of its first case."""
    found: dict[str, list[tuple[str, str]]] = {}
    for variant, tallies in results.items():
        for test, message in (bug for t in tallies.values() for bug in t.bugs):
            found.setdefault(test, []).append((variant, message))
    yield "\n## Unexplained\n"
    yield "Cases by test, with the error of the first.\n" if found else "None."
    for test, bugs in found.items():
        counts = ", ".join(f"{count} with {variant}" for variant, count in Counter(v for v, _ in bugs).items())
        yield f"- {test} ({counts}): `{' '.join(bugs[0][1].split())[:300]}`"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    everything = [name for names in FILES.values() for name in names]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tests/peft_suite/run.py --files decoder_models --k test_generate",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--files",
        nargs="+",
        choices=everything,
        default=everything,
        metavar="FILE",
        help=f"PEFT's test files: {', '.join(everything)} (all)",
    )
    parser.add_argument("--k", metavar="EXPRESSION", help="pytest's -k; a selection is printed, not recorded")
    parser.add_argument(
        "--sdist", type=Path, help="PEFT's source release, instead of downloading the installed version's"
    )
    return parser.parse_args()


def main() -> None:
    """Run every variant, print the record, and write it unless only a selection ran."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as name:
        folder = Path(name)
        root = unpack_release(folder, options.sdist)
        build_hub_cache(folder / "hub")
        runs = {variant: run_pytest(root, folder / "hub", variant, options) for variant in VARIANTS}
        results = {variant: tally(runs[STOCK], records, variant) for variant, records in runs.items()}
        text = report(results, root.name)
    print(text)
    if options.k is None and set(options.files) == {name for names in FILES.values() for name in names}:
        RECORD.write_text(text, encoding="utf-8")
    if any(t.bugs for tallies in results.values() for t in tallies.values()):
        sys.exit("unexplained failures: see above")


if __name__ == "__main__":
    main()
