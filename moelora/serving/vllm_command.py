"""The command line of `vllm serve` for a base model and its adapters; vLLM itself is not imported."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ..recipe import ModelOptions
from ..schema import UserError
from .served import Served

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM takes, but for 1."""
_HEAD = "lm_head"


def find_vllm() -> str | None:
    """The `vllm` command: of this environment, else of the shell; None where there is none."""
    here = str(Path(sys.executable).parent)
    return shutil.which("vllm", path=os.pathsep.join([here, os.environ.get("PATH", "")]))


def vllm_command(
    vllm: str,
    base: ModelOptions,
    served: Sequence[Served],
    *,
    host: str,
    port: int,
    arguments: Sequence[str] = (),
    cpu_dtype: str | None = None,
) -> list[str]:
    """The command, word by word; arguments come last, and what they set is not set here.

    Args:
        vllm: the program.
        cpu_dtype: on a machine without an accelerator, the precision of the base model's files.

    Raises:
        UserError: vLLM cannot serve the base model or one of the adapters.
    """
    if base.gguf_file is not None:
        raise UserError(
            f"vLLM is not given GGUF files such as {base.gguf_file}: give a folder or a hub id with --base, or "
            "`--engine transformers`"
        )
    options = {
        "--max-lora-rank": [str(_max_rank(served))],
        "--host": [host],
        "--port": [str(port)],
    }
    if cpu_dtype is not None:
        # vLLM would wrap the head too, and on a CPU that ends the engine where log-probabilities of a prompt are asked.
        options["--lora-target-modules"] = _modules(served)
        options["--dtype"] = [cpu_dtype]
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    words = [word for flag, values in options.items() if flag not in given for word in (flag, *values)]
    adapters = [_as_argument(one) for one in served]
    return [vllm, "serve", base.name, "--enable-lora", "--lora-modules", *adapters, *words, *arguments]


def _as_argument(one: Served) -> str:
    """NAME=FOLDER, or JSON: vLLM parts a pair at its first `=`, and takes what has a comma for JSON."""
    pair = f"{one.name}={one.folder}"
    is_pair = "," not in pair and "=" not in one.name
    return pair if is_pair else json.dumps({"name": one.name, "path": str(one.folder)})


def _max_rank(served: Sequence[Served]) -> int:
    largest = max(served, key=lambda one: one.rank)
    for rank in RANKS:
        if rank >= largest.rank:
            return rank
    raise UserError(
        f"the adapter {largest.folder} has ranks of {largest.rank} in all (experts times rank), and vLLM takes at most "
        f"{RANKS[-1]}: prune or merge experts (`moelora prune`, `moelora merge`), or give `--engine transformers`"
    )


def _modules(served: Sequence[Served]) -> list[str]:
    for one in served:
        if _HEAD in one.modules:
            raise UserError(
                f"the adapter {one.folder} adapts {_HEAD}, which vLLM does not serve on a CPU: leave it out of its "
                "`target_modules`, or give `--engine transformers`"
            )
    return sorted(frozenset().union(*(one.modules for one in served)))
