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
from .adapters import ServedAdapter, max_lora_rank
from .vllm.contract import HEAD


def find_vllm() -> str | None:
    """The `vllm` command: of this environment, else of the shell; None where there is none."""
    here = str(Path(sys.executable).parent)
    return shutil.which("vllm", path=os.pathsep.join([here, os.environ.get("PATH", "")]))


def vllm_command(
    vllm: str,
    base: ModelOptions,
    adapters: Sequence[ServedAdapter],
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
        "--max-lora-rank": [str(max_lora_rank(adapters))],
        "--host": [host],
        "--port": [str(port)],
    }
    if cpu_dtype is not None:
        _refuse_head(adapters)
        options["--dtype"] = [cpu_dtype]
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    words = [word for flag, values in options.items() if flag not in given for word in (flag, *values)]
    modules = [_as_argument(one) for one in adapters]
    return [vllm, "serve", base.name, "--enable-lora", "--lora-modules", *modules, *words, *arguments]


def _as_argument(one: ServedAdapter) -> str:
    """NAME=FOLDER, or JSON: vLLM parts a pair at its first `=`, and takes what has a comma for JSON."""
    pair = f"{one.name}={one.folder}"
    is_pair = "," not in pair and "=" not in one.name
    return pair if is_pair else json.dumps({"name": one.name, "path": str(one.folder)})


def _refuse_head(adapters: Sequence[ServedAdapter]) -> None:
    for one in adapters:
        if HEAD in one.linears:
            raise UserError(
                f"the adapter {one.folder} adapts {HEAD}: on a CPU vLLM's engine ends when a client asks for the "
                "log-probabilities of a prompt beside it; leave it out of its `target_modules`, or give `--engine "
                "transformers`"
            )
