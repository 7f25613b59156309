"""N processes equal one: accelerate's engines on two processes against plain torch on the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from cases import CASES, build, reference
from engines import WORLD, launch
from helpers import llama
from peft import PeftModel

pytestmark = pytest.mark.slow

# float32: sums over two processes are rounded in another order. The updates compared are of the order of 0.1; with the
# capacity of each process by itself, the loads of one process or gradients halved, they differ by 1e-2 and more.
TOLERANCE = {"rtol": 1e-5, "atol": 5e-6}
# NCCL 2.30 and later lets ranks share a GPU where this variable of its own is 1.
NUM_GPUS = 1 if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" else WORLD
ON_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < NUM_GPUS, reason=f"needs {NUM_GPUS} CUDA devices"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPUS)]
# What is missing fails in the engine or the package, before or beside the mixture; docs/support.md says how.
QUANTISED_UNDER = {
    "ddp": ("bnb-nf4", "bnb-int8", "hqq", "quanto-int8", "quanto-int4"),
    "fsdp2": ("bnb-nf4", "quanto-int8", "quanto-int4"),
    "zero2": ("bnb-nf4", "bnb-int8", "hqq"),
    "zero3": ("bnb-nf4", "bnb-int8"),
}
DEEPSPEED = [pytest.param(engine, marks=pytest.mark.engines) for engine in ("zero2", "zero3")]


def assert_same(actual, expected, what):
    assert actual.keys() == expected.keys(), what
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, **TOLERANCE, msg=lambda m, n=name: f"{what} {n}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *DEEPSPEED])
def test_two_processes_equal_one(tmp_path, engine, device):
    """Losses, gradients, updates, maturity and counters; every case of cases.py in one launch."""
    launch(engine, "equality", tmp_path, *CASES, device=device)
    for name, case in CASES.items():
        assert_equal(tmp_path, engine, name, reference(case))


@pytest.mark.engines
@pytest.mark.parametrize("engine", QUANTISED_UNDER)
def test_two_processes_equal_one_on_a_quantised_base(tmp_path, engine):
    """In float32, with capacity, and checkpointing where PEFT turns it on; the adapters load on a plain base too."""
    llama().save_pretrained(tmp_path / "base")
    kinds = QUANTISED_UNDER[engine]
    where = {"MOELORA_TEST_BASE": str(tmp_path / "base"), "CUDA_VISIBLE_DEVICES": ""}  # packages take a GPU they see
    launch(engine, "quantised", tmp_path, *kinds, packages=True, **where)
    for kind in kinds:
        assert_equal(tmp_path, engine, kind, torch.load(tmp_path / f"{kind}.pt"))


def assert_equal(folder, engine, name, expected):
    """What every rank left in the folder of a case against what one process computed."""
    updates = [step.abs().max() for gradients in expected["gradients"] for step in gradients.values()]
    assert max(updates) > 0.1, "nothing learned"
    ranks = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(WORLD)]
    for rank, actual in enumerate(ranks):
        what = f"{engine} {name} rank {rank}"
        torch.testing.assert_close(actual["losses"], expected["losses"], **TOLERANCE, msg=lambda m, w=what: w + m)
        assert_same(actual["buffers"], expected["buffers"], what)
        for name_, buffer in ranks[0]["buffers"].items():
            assert torch.equal(actual["buffers"][name_], buffer), f"{what}: {name_} drifts apart"
        for gradients, theirs in zip(actual["gradients"], expected["gradients"], strict=True):
            if not engine.startswith("zero"):  # DeepSpeed steps inside backward; SGD's updates are its gradients
                assert_same(gradients, theirs, f"{what} gradient of")
    assert_same(ranks[0]["parameters"], expected["parameters"], f"{engine} {name}")
    assert_loads(folder / name, ranks[0], f"{engine} {name} saved")


def assert_loads(folder, trained, what):
    """save_pretrained's folder gives one process what the ranks had, buffers included, to the last bit."""
    loaded = PeftModel.from_pretrained(llama(), folder).state_dict()
    for name, tensor in (trained["parameters"] | trained["buffers"]).items():
        assert torch.equal(loaded[name], tensor), f"{what} {name}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", *DEEPSPEED])
def test_two_processes_in_bfloat16_learn_what_one_learns_in_float32(tmp_path, engine, device):
    """DDP: autocast; FSDP2: MixedPrecisionPolicy; DeepSpeed: a bfloat16 model with a float32 master copy."""
    assert_learns(tmp_path, engine, "bf16", torch.bfloat16, device)


@pytest.mark.parametrize("device", DEVICES[1:])  # accelerate refuses float16 on the CPU
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_in_float16_learn_what_one_learns_in_float32(tmp_path, engine, device):
    """With accelerate's scaler."""
    assert_learns(tmp_path, engine, "fp16", torch.float16, device)


def assert_learns(folder, engine, precision, dtype, device):
    """The tolerance is that of test_precision_training.py, in what dtype rounds to."""
    launch(engine, "equality", folder, "aux_loss", "module_bf16", precision=precision, device=device)
    for name in ("aux_loss", "module_bf16"):
        expected, actual = reference(CASES[name]), torch.load(folder / f"{name}.0.pt")
        before = dict(build(CASES[name]).named_parameters())
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(actual["losses"], expected["losses"], rtol=tolerance / 2, atol=0, check_dtype=False)
        updates = [
            torch.cat([(state["parameters"][n].float() - before[n].detach()).flatten() for n in expected["parameters"]])
            for state in (actual, expected)
        ]
        difference = (updates[0] - updates[1]).norm() / updates[1].norm()
        assert 1e-4 < difference < tolerance, f"{name}: {difference} (float32 would be below 1e-5)"
        assert actual["buffers"].keys() == expected["buffers"].keys()
        for key, buffer in actual["buffers"].items():
            assert buffer.dtype == expected["buffers"][key].dtype, key


def test_capacity_over_ranks_keeps_what_one_process_keeps(tmp_path):
    """Exact, with ties within and between ranks, padding, a rank without tokens, and room for none and for all."""
    script = os.path.join(os.path.dirname(__file__), "capacity.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
