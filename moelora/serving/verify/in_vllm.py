"""What vLLM computes with an adapter, in this process; mixtures need moelora's plug-in, which vLLM finds by itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...recipe import ModelOptions
from ...schema import UserError, shorten
from ...storage.base_model import resolve_dtype
from ..adapters import max_lora_rank, read_served_adapter
from ..vllm.contract import HEAD
from .verdict import Computed, Prompts, Rows


def check_installed() -> None:
    """Raise UserError where there is no vLLM."""
    if find_spec("vllm") is None:
        raise UserError('--runtime vllm: vLLM is not installed; pip install "moelora[vllm]"')


def run_in_vllm(base: ModelOptions, adapter: Path, prompts: Prompts) -> Computed:
    """The base model and the adapter in one engine, which runs the prompts with the adapter and without.

    Raises:
        UserError: vLLM is not installed, does not take the adapter's rank or linears, or refuses it; with what it says.
    """
    check_installed()
    if base.gguf_file is not None:
        raise UserError(f"--runtime vllm: {base.gguf_file} is a GGUF file; give the model's folder with --base")
    served = read_served_adapter("adapter", adapter, base)
    if HEAD in served.linears:
        raise UserError(
            f"--runtime vllm: {adapter} adapts {HEAD}, which vLLM leaves out of the log-probabilities of prompts; give "
            "--runtime transformers"
        )
    max_rank = max_lora_rank([served])
    dtype = _dtype(base)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine ends with this process
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for the result
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    try:
        engine = LLM(
            model=base.name,
            dtype=dtype,
            max_model_len=max(map(len, prompts)) + 1,  # vLLM makes one token more
            enable_lora=True,
            max_loras=1,
            max_lora_rank=max_rank,
            enable_prefix_caching=False,
            enforce_eager=True,
            skip_tokenizer_init=True,
        )
        without = _read(engine, prompts)  # first: some releases on the CPU add a LoRA that fills all slots to the base
        adapted = _read(engine, prompts, LoRARequest(served.name, 1, str(adapter.absolute())))
        return Computed(adapted, without, dtype)
    except (ValueError, RuntimeError, OSError) as error:
        said = shorten(" ".join(str(error).split()), 500)
        raise UserError(f"--runtime vllm: {adapter} on {base.name}: {said}") from error


def _dtype(base: ModelOptions) -> str:
    """The precision asked for; on a GPU vLLM's LoRA kernels know no float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(resolve_dtype(base, device)).removeprefix("torch.")
    return "bfloat16" if device.type == "cuda" and dtype == "float32" else dtype


def _read(engine: Any, prompts: Prompts, lora: Any = None) -> Rows:
    """The log-probability of every token after a prompt's first."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
    outputs = engine.generate(inputs, sampling, lora_request=lora, use_tqdm=False)
    return [_row(ids, output.prompt_logprobs) for ids, output in zip(prompts, outputs, strict=True)]


def _row(ids: Sequence[int], found: Sequence[Any]) -> list[float]:
    return [float(at[token].logprob) for token, at in zip(ids[1:], found[1:], strict=True)]
