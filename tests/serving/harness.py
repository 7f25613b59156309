"""An engine of vLLM's in this process, transformers and moelora beside it, and whether both say the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import KINDS, Workshop, load_base
from bases import LENGTH, VOCAB, architecture, save_base
from peft import PeftModel
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.models.transformers import base as transformers_backend

TOLERANCE = 1e-4
"""Nats between the log-probability of a token here and there, both in float32."""
BASE = "base"
"""The name of a request without an adapter."""
NEW_TOKENS = 12


@dataclass(frozen=True)
class Request:
    """A prompt for an adapter, or for BASE."""

    adapter: str
    prompt: tuple[int, ...]


class Reference:
    """transformers, PEFT and moelora in float32: what an adapter makes of its base model."""

    def __init__(self, model: Path, adapter: Path | None) -> None:
        base = load_base(model)
        self.model: nn.Module = PeftModel.from_pretrained(base, str(adapter)).eval() if adapter else base
        self.seen: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [T, V] of what follows each of T tokens, read in one forward."""
        key = tuple(tokens)
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=torch.tensor([key])).logits[0].float().log_softmax(-1)
        return self.seen[key]


class Running:
    """The one engine of this process: engines share what vLLM ends with the first of them."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.llm: LLM | None = None

    def engine(self, options: dict[str, Any]) -> LLM:
        """The engine that runs, if it was started with these options, or else a new one in its place."""
        if self.llm is None or self.options != options:
            self.end()
            with experts_on_a_cpu(), classes_left_alone():
                self.llm, self.options = LLM(**options), options
        return self.llm

    def end(self) -> None:
        if self.llm is not None:
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()


RUNNING = Running()


@dataclass
class Bench:
    """A tiny base model, and adapters for it that are made when they are first asked for.

    Args:
        folder: where all of it is kept.
        architecture: a name of ARCHITECTURES.
    """

    folder: Path
    architecture: str = "llama"
    references: dict[str, Reference] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        return save_base(self.folder / "base", self.architecture)

    @property
    def linears(self) -> tuple[str, ...]:
        return architecture(self.architecture).linears

    def adapter(self, name: str) -> Path:
        """The folder of a kind of adapter in KINDS."""
        folder = self.folder / name
        if not folder.exists():
            torch.manual_seed(0)
            KINDS[name](Workshop(self.model, self.linears, self.folder / "loras")).save_pretrained(str(folder))
        return folder

    def reference(self, name: str) -> Reference:
        if name not in self.references:
            self.references[name] = Reference(self.model, None if name == BASE else self.adapter(name))
        return self.references[name]

    def lora(self, name: str) -> LoRARequest | None:
        if name == BASE:
            return None
        return LoRARequest(name, self.numbers.setdefault(name, len(self.numbers) + 1), str(self.adapter(name)))

    def engine(self, **options: Any) -> LLM:
        """The engine of this model with these options. One runs at a time: where it is another, that one is ended."""
        fields = {
            "model": str(self.model),
            "dtype": "float32",
            "max_model_len": LENGTH,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 1024,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "enable_lora": True,
            "max_loras": 4,
            "max_lora_rank": 64,
            "lora_target_modules": list(self.linears),
            "block_size": 32,
            "num_gpu_blocks_override": 1024,
        }
        return RUNNING.engine(fields | dict(architecture(self.architecture).engine) | options)

    def ask(self, llm: LLM, requests: Sequence[Request], **sampling: Any) -> list[Any]:
        """The engine's answers to requests that are there at once; greedy, and with log-probabilities of prompts."""
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "prompt_logprobs": 0, "logprobs": 0}
        loras = [self.lora(request.adapter) for request in requests]
        try:
            return llm.generate(
                [TokensPrompt(prompt_token_ids=list(request.prompt)) for request in requests],
                SamplingParams(**(options | sampling)),
                lora_request=loras,
                use_tqdm=False,
            )
        except Exception:
            RUNNING.end()  # its requests would stay in the engine, and fail or hold up all that come after them
            raise

    def assert_same(self, requests: Sequence[Request], outputs: Sequence[Any], tolerance: float = TOLERANCE) -> None:
        """Log-probabilities of prompts and of what was generated are those of the reference."""
        assert len(requests) == len(outputs) > 0
        found: dict[str, list[float]] = {}
        for request, output in zip(requests, outputs, strict=True):
            assert tuple(output.prompt_token_ids) == request.prompt
            for completion in output.outputs:
                nats = difference(self.reference(request.adapter), output, completion)
                found.setdefault(request.adapter, []).append(nats)
        # `not <=`, of each by itself: NaN is neither more than the tolerance nor the largest of several.
        wrong = {name: nats for name, nats in found.items() if not all(one <= tolerance for one in nats)}
        assert not wrong, f"nats from the reference by adapter, at most {tolerance}: {wrong}; all: {found}"


@contextmanager
def experts_on_a_cpu() -> Iterator[None]:
    """Native mixtures with LoRAs on their attention alone, which vLLM serves on a GPU, on a CPU as well.

    Wherever LoRA is switched on vLLM 0.32 takes its Triton kernel for a model's own experts, adapted or not, and that
    ends the engine on a CPU ("module 'triton.language' has no attribute 'float32'"). Here they get the CPU's kernel.
    """
    select = unquantized_fused_moe_method.select_unquantized_moe_backend

    def without_lora(moe_config: Any) -> Any:
        return select(replace(moe_config, is_lora_enabled=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unquantized_fused_moe_method, "select_unquantized_moe_backend", without_lora)
        yield


@contextmanager
def classes_left_alone() -> Iterator[None]:
    """transformers' classes as they are, for the reference that runs in the same process.

    vLLM's transformers backend gives them, for good, a `__call__` that compiles, or where nothing is to be compiled (as
    here) runs `forward` without any hook; and an `__init__` that fails outside of vLLM.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_backend, "support_torch_compile", lambda **options: lambda cls: cls)
        yield


def difference(reference: Reference, output: Any, completion: Any) -> float:
    """Largest difference in nats between an answer and the reference that reads the same tokens.

    The reference reads prompt and answer in one forward. Where the engine's token is not the likeliest there, its
    distance to the likeliest counts: a greedy answer that differs is as wrong as that.
    """
    prompt, answer = list(output.prompt_token_ids), list(completion.token_ids)
    expected = reference.logprobs(prompt + answer)
    ours, theirs = [], []
    for position, token in enumerate(prompt[1:]):
        if output.prompt_logprobs:
            ours.append(output.prompt_logprobs[position + 1][token].logprob)
            theirs.append(expected[position, token])
    for position, token in enumerate(answer, start=len(prompt) - 1):
        if completion.logprobs:
            ours.append(completion.logprobs[position - len(prompt) + 1][token].logprob)
            theirs.append(expected[position, token])
    assert ours, "no log-probabilities to compare"
    return (torch.tensor(ours) - torch.stack(theirs)).abs().max().item()


def assert_greedy(bench: Bench, requests: Sequence[Request], outputs: Sequence[Any]) -> None:
    """Each token is the one that the reference finds likeliest after those before it."""
    wrong = []
    for request, output in zip(requests, outputs, strict=True):
        for completion in output.outputs:
            tokens = [*request.prompt, *completion.token_ids]
            likeliest = bench.reference(request.adapter).logprobs(tokens).argmax(-1)[len(request.prompt) - 1 : -1]
            if likeliest.tolist() != list(completion.token_ids):
                wrong.append((request.adapter, len(request.prompt), likeliest.tolist(), list(completion.token_ids)))
    assert not wrong, f"adapter, length of the prompt, tokens of the reference, tokens of the engine: {wrong}"


def prompts(lengths: Sequence[int] = (3, 17, 40, 77), seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts: of all tokens, of the lower half, of the upper half, and the first half lower, the rest upper."""
    generator = torch.Generator().manual_seed(seed)
    spans = [(1, VOCAB), (1, VOCAB // 2), (VOCAB // 2, VOCAB)]
    made = []
    for number, length in enumerate(lengths):
        first, last = [(0, 0), (1, 1), (2, 2), (1, 2)][number % 4]
        halves = ((first, length - length // 2), (last, length // 2))
        made.append(torch.cat([torch.randint(*spans[span], (count,), generator=generator) for span, count in halves]))
    return [tuple(ids.tolist()) for ids in made]


def for_all(adapters: Sequence[str], texts: Sequence[tuple[int, ...]]) -> list[Request]:
    """Each prompt for each adapter; neighbours in the batch differ in adapter."""
    return [Request(adapter, text) for text in texts for adapter in adapters]
