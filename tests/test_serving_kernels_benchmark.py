"""The benchmark of serving kernels checks what it times, and sums up what it measured."""

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch

from benchmarks import serving_kernels
from benchmarks.correctness import CorrectnessError
from benchmarks.record import Row

pytestmark = pytest.mark.slow

SIZES = "--slots 3 --blocks 2 --experts 4 --rank 2 --rows 8 --hidden 32 --intermediate 48 --kv 16 --dtype float16"


class KernelsInTorch:
    """Named and called as vLLM's are; `meta` is the slots alone."""

    HAS_TRITON = True

    class LoRAKernelMeta:
        @classmethod
        def make(cls, max_loras, max_num_tokens, device):
            return cls()

        def prepare_tensors(self, slot_T):
            self.slot_T = slot_T

        def meta_args(self, token_nums, specialize_active_lora):
            return (self.slot_T,)

    @staticmethod
    def _lora_shrink(x, weights, out, slot_T, scale):
        for target, weight in zip(out, weights, strict=True):
            target.copy_(torch.einsum("ti,tri->tr", x.float(), weight[slot_T, 0].float()) * scale)

    @staticmethod
    def _lora_expand(x, weights, out, slot_T, offset_start, add_inputs):
        for shrunk, weight, target in zip(x, weights, out.split([w.shape[2] for w in weights], dim=1), strict=True):
            target += torch.einsum("tr,tor->to", shrunk, weight[slot_T, 0].float())


@pytest.fixture
def args():
    return serving_kernels.parse(SIZES.split())


@pytest.fixture
def batch(args, monkeypatch, kernel_device):
    """Eight tokens of all slots, for vLLM's kernels and for ours."""
    modules = SimpleNamespace(import_module=lambda name: KernelsInTorch)
    monkeypatch.setattr(serving_kernels, "importlib", modules)
    with torch.device(kernel_device):
        slot_T = serving_kernels.CASES["mixed"](8, args.slots).to(torch.int32)
        tables, groups = serving_kernels.make_tables(args), serving_kernels.groups_of(args)
        ours = serving_kernels.Ours(tables, slot_T, torch.float16, groups)
        yield serving_kernels.VllmKernels(args, torch.float16).batch(slot_T), ours


def test_both_checks_pass(batch):
    theirs, ours = batch
    ours.check()
    theirs.check(ours)


def test_a_wrong_gate_stops_everything(batch, monkeypatch):
    def nothing(hidden, tables, block, slot_T, gate_TR, residual):
        gate_TR.fill_(0.5)

    monkeypatch.setattr(serving_kernels, "route_slots_reference", nothing)
    with pytest.raises(CorrectnessError, match="the gates of 8 of 8 tokens differ"):
        batch[1].check()


def test_a_gate_that_does_not_arrive_stops_everything(batch, monkeypatch):
    theirs, ours = batch
    plain = type(theirs).lora
    monkeypatch.setattr(type(theirs), "lora", lambda self, block, gate_TR: plain(self, block))
    with pytest.raises(CorrectnessError, match="of the output differ"):
        theirs.check(ours)


def test_the_summary_says_what_routing_adds():
    row = Row("serving_kernels", "mixed", 8, experts=8, rank=8, top_k=2, dtype="bfloat16")
    micros = {"route": 8, "weight": 6, "lora": 50, "mixture": 60}
    rows = [dataclasses.replace(row, arm=arm, value=value * 1e-6) for arm, value in micros.items()]
    assert serving_kernels.summary(rows) == [
        "8 tokens, mixed: a block's plain LoRA of rank 64 costs 50.0 us, routing and weighting add 10.0 us = 20.0%; "
        "alone, routing takes 8.0 us, weighting 6.0 us"
    ]
    alone = ["8 tokens, mixed: a block's routing takes 8.0 us, weighting 6.0 us"]
    assert serving_kernels.summary([*rows[:2], dataclasses.replace(row, tokens=0, metric="failed")]) == alone


@pytest.mark.parametrize("case", serving_kernels.CASES)
def test_cases_are_slots_for_every_token(case, args):
    slots = serving_kernels.CASES[case](50, args.slots)
    assert len(slots) == 50 and set(slots.tolist()) == ({0} if case == "one" else set(range(args.slots)))


@pytest.mark.parametrize("example", serving_kernels.EXAMPLES)
def test_examples_parse(example):
    assert serving_kernels.parse(example.split()).tokens


def test_help_shows_real_calls(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.serving_kernels").main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(example.split()) in text for example in serving_kernels.EXAMPLES)


def test_a_machine_without_a_gpu_is_told(tmp_path):
    with pytest.raises(SystemExit, match="for a GPU"):
        serving_kernels.main(["--device", "cpu", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
