"""How long saving and loading a large mixture take: `python -m benchmarks.storage`, or with another checkout's package
on PYTHONPATH to compare two versions (interleave them, and compare the medians of one run).

Prints seconds of save_pretrained into a new folder, over an earlier save, and of from_pretrained, each the median of
several; the disk's cache is warm. A CPU is enough.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig

HIDDEN, EXPERTS = 2048, 8


def base_model() -> LlamaForCausalLM:
    """Four blocks whose linears are wide enough for a gigabyte of factors."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 4, "vocab_size": 256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=16))
    return model.to_empty(device="cpu")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the adapter in float32 (default: 1.0)")
    parser.add_argument("--repeats", type=int, default=5, help="times each is done (default: 5)")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    options = parser.parse_args()
    per_rank = 4 * 4 * (4 * 2 * HIDDEN + 3 * 3 * HIDDEN)  # bytes: 4 blocks of attention's and MLP's linears
    r = max(1, round(options.gigabytes * 1e9 / per_rank / EXPERTS))
    config = MoELoraConfig(r=r, num_experts=EXPERTS, target_modules="all-linear", task_type="CAUSAL_LM")
    base = base_model()
    model = get_peft_model(base, config)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        new, over, load = [], [], []
        for repeat in range(options.repeats):
            folder = Path(place, str(repeat))
            new.append(seconds(lambda folder=folder: model.save_pretrained(folder, save_embedding_layers=False)))
            over.append(seconds(lambda folder=folder: model.save_pretrained(folder, save_embedding_layers=False)))
        size = (folder / "adapter_model.safetensors").stat().st_size
        model = model.unload()
        for repeat in range(options.repeats):
            folder = Path(place, str(repeat))
            load.append(seconds(lambda folder=folder: PeftModel.from_pretrained(base, folder).unload()))
    print(f"{size / 1e9:.2f} GB; save new, over, load (s): " + ", ".join(
        f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" for times in (new, over, load)
    ))  # fmt: skip


if __name__ == "__main__":
    main()
