"""vLLM: tokens a second of the base, of a plain LoRA and of a mixture whose experts have the same rank together.

Two engines of one model run in processes of their own and take turns: vLLM as it is ("stock"), and with the plug-in.
Every measurement is one batch through `LLM.generate`: prompts that are read and answered with one token (prefill), or
short prompts that are answered at length (decode). Needs vLLM (`make serve-test` builds a venv that has it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .arms import ARMS
from .models import PRESETS, add_model_options, build_base
from .options import add_output_options, make_parser, recorder_of
from .record import Recorder, Row

MODULE = "benchmarks.serving"
EXAMPLES = ("--preset quickstart --device cpu", "--preset llama-8b --layers 8 --device cuda --batches 1 8 64")
SERVED = ("stock-base", "stock-lora", "plugin-base", "plugin-lora", "mixture")
NUMBERS = {"lora": 1, "mixture": 2}


def write_models(folder: Path, args: argparse.Namespace) -> None:
    """The base, a plain LoRA and a mixture, with random weights that act."""
    from moelora import MoELoraConfig

    def save(config: Any, name: str) -> None:
        adapted = get_peft_model(build_base(args), config)
        _awaken(adapted)
        adapted.save_pretrained(str(folder / name))

    build_base(args).save_pretrained(str(folder / "base"))
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    rank = args.experts * args.rank
    save(LoraConfig(r=rank, lora_alpha=rank, **common), "lora")
    options = {"r": args.rank, "num_experts": args.experts, "top_k_experts": args.top_k}
    save(MoELoraConfig(lora_alpha=args.rank, **options, **common), "mixture")


@torch.no_grad()
def _awaken(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if "lora_B" in name:
            tensor.normal_(std=0.01)
        elif name.endswith("maturity"):
            tensor.fill_(1.0)


class Engine:
    """A vLLM in a process of its own, with or without the plug-in."""

    def __init__(self, folder: Path, has_plugin: bool, args: argparse.Namespace) -> None:
        settings = {"VLLM_PLUGINS": "moelora" if has_plugin else "none", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        options = {
            "model": str(folder / "base"),
            "skip_tokenizer_init": True,
            "dtype": args.dtype,
            "max_model_len": args.max_length,
            "max_num_batched_tokens": args.max_length,
            "max_num_seqs": max(args.batches),
            "enable_prefix_caching": False,
            "enable_lora": True,
            "max_loras": 2,
            "max_lora_rank": args.experts * args.rank,
            "lora_target_modules": [f"{name}_proj" for name in (*"qkvo", "gate", "up", "down")],
            "disable_log_stats": True,
            "enforce_eager": args.eager,
        }
        if args.device == "cuda":
            options["gpu_memory_utilization"] = 0.4
        command = [sys.executable, "-m", MODULE, "--worker", json.dumps(options | args.engine)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | settings | quiet
        )
        self._read()

    def seconds(self, adapter: str | None, sequences: int, prompt: int, answer: int) -> float:
        """Of one batch."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([adapter, sequences, prompt, answer]) + "\n")
        self.process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        """The next line that the worker means for us; the rest is vLLM's."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("> "):
                return line[2:]
        raise RuntimeError(f"the engine ended with status {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(options: dict[str, Any]) -> None:
    """Answer the parent's requests with one engine: a line each way."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    llm = LLM(**options)
    folder = Path(options["model"]).parent
    generator = torch.Generator().manual_seed(0)
    print("> ready", flush=True)
    for line in sys.stdin:
        adapter, sequences, prompt, answer = json.loads(line)
        ids = torch.randint(1, 500, (sequences, prompt), generator=generator).tolist()
        request = None if adapter is None else LoRARequest(adapter, NUMBERS[adapter], str(folder / adapter))
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        prompts = [TokensPrompt(prompt_token_ids=row) for row in ids]
        llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        print(f"> {time.perf_counter() - start}", flush=True)


def measure(engines: dict[str, Engine], args: argparse.Namespace, recorder: Recorder) -> dict[tuple[str, str], list]:
    """Seconds of a token, by case and arm; the arms take turns, after a round that is not counted."""
    cases = {f"prefill {args.prefill[0]}x{args.prefill[1]}": (*args.prefill, 1)}
    cases |= {f"decode {batch}x{args.steps}": (batch, 16, args.steps) for batch in args.batches}
    found: dict[tuple[str, str], list] = {}
    for repeat in range(-1, args.repeats):
        for case, (sequences, prompt, answer) in cases.items():
            for arm in args.arms:
                engine = engines["stock" if arm.startswith("stock-") else "plugin"]
                adapter = arm.rpartition("-")[2]
                duration = engine.seconds(None if adapter == "base" else adapter, sequences, prompt, answer)
                tokens = sequences * (prompt if answer == 1 else answer)
                if repeat >= 0:
                    row = Row("serving", case, tokens, args.experts, args.rank, args.top_k, args.dtype)
                    recorder.add(row, arm=arm, repeat=repeat, value=duration)
                    found.setdefault((case, arm), []).append(tokens / duration)
    return found


def print_table(found: dict[tuple[str, str], list]) -> None:
    """Tokens a second, and as a share of the plain LoRA's."""
    for case in dict.fromkeys(case for case, _ in found):
        medians = {arm: sorted(rates)[len(rates) // 2] for (of, arm), rates in found.items() if of == case}
        like = medians.get("plugin-lora")
        for arm, rate in medians.items():
            share = f"{rate / like:.3f} x plugin-lora" if like else ""
            print(f"{case} | {arm} | {rate:.0f} tokens/s | {share}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    add_output_options(parser)
    add_model_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of one expert (default: 8)")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--prefill", type=int, nargs=2, default=[4, 256], metavar=("PROMPTS", "TOKENS"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sequences that are decoded at a time")
    parser.add_argument("--steps", type=int, default=32, help="tokens of an answer (default: 32)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a text, and of a batch")
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs (CPU: always)")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of vllm.LLM, as JSON")
    legend = "; ".join(f"{name}: {ARMS[name]}" for name in SERVED)
    parser.add_argument("--arms", nargs="+", default=list(SERVED), choices=SERVED, metavar="ARM", help=legend)
    preset = PRESETS[parser.parse_known_args(argv)[0].preset]
    parser.set_defaults(**{name: preset.options[name] for name in ("dtype", "experts", "rank", "top_k")})
    args = parser.parse_args(argv)
    args.eager |= args.device == "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    if argv is None and sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    args = parse(argv)
    recorder = recorder_of(args, MODULE, argv)
    folder = Path(tempfile.mkdtemp(prefix="moelora-serving-"))
    engines: dict[str, Engine] = {}
    try:
        write_models(folder, args)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        for name in ("stock", "plugin"):
            if any(arm.startswith("stock-") == (name == "stock") for arm in args.arms):
                engines[name] = Engine(folder, name == "plugin", args)
        print_table(measure(engines, args, recorder))
    finally:
        for engine in engines.values():
            engine.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
