"""Checkpoints of every engine: they load everywhere, and a run that was killed continues exactly."""

import json

import pytest
import torch
from engines import launch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM

from moelora.storage.run_record import last_checkpoint

pytestmark = pytest.mark.slow

RUNS = [
    pytest.param("ddp", "step"),
    pytest.param("fsdp2", "save"),
    pytest.param("zero2", "save", marks=pytest.mark.engines),
    pytest.param("zero3", "step", marks=pytest.mark.engines),
]


def prepare(folder, engine):
    recipe = tiny_recipe(folder)
    recipe["model"]["dtype"] = "float32"
    recipe["training"] |= {"max_steps": 6, "lr_scheduler_type": "linear", "use_cpu": engine == "ddp"}
    if engine == "ddp":
        recipe["training"]["ddp_find_unused_parameters"] = True  # what a Trainer gives a PeftModel when nobody chooses
    recipe["mixture"] |= {"expert_dropout": 0.1, "maturity_tokens": 300, "lora_dropout": 0.1}
    write_recipe(folder, recipe)
    return folder / "model"


@pytest.mark.parametrize(("engine", "killed_at"), RUNS)
def test_a_killed_run_continues_exactly_and_its_adapter_loads_everywhere(tmp_path, engine, killed_at):
    """step: the last process dies after step 5. save: the first dies in checkpoint-4, between weights and optimizer."""
    base = prepare(tmp_path, engine)
    whole, broken = (f"--set,training.output_dir={tmp_path / name}" for name in ("whole", "broken"))
    result = launch(engine, "recipe", tmp_path, whole, broken, check=False, KILL=f"{killed_at}:broken")
    assert result.returncode != 0 and (tmp_path / "whole" / "run.json").exists(), result.stderr[-6000:]
    left = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4"]  # where it died saving, the second is incomplete
    assert last_checkpoint(tmp_path / "broken").name == ("checkpoint-4" if killed_at == "step" else "checkpoint-2")
    launch(engine, "recipe", tmp_path, f"{broken},--resume")

    expected, actual = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert actual.keys() == expected.keys() and any(name.endswith("maturity") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert any(tensor.any() for name, tensor in expected.items() if name.endswith("lora_B.weight"))

    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["maturity"] == pytest.approx(_maturity(expected).tolist()) and max(record["maturity"]) > 0
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-6", tmp_path / "broken"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        loaded = {n: t for n, t in model.state_dict().items() if "lora_" in n}
        assert len(loaded) == len(expected)
        for name, tensor in expected.items():
            place = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            assert torch.equal(loaded.get(place, loaded.get(_router_place(name))), tensor), name


@pytest.mark.parametrize(
    "engine", ["ddp", "fsdp2", *(pytest.param(e, marks=pytest.mark.engines) for e in ("zero2", "zero3"))]
)
def test_a_run_that_was_killed_after_its_last_step_ends_there(tmp_path, engine):
    prepare(tmp_path, engine)
    words, run_file = f"--set,training.output_dir={tmp_path / 'out'}", tmp_path / "out" / "run.json"
    launch(engine, "recipe", tmp_path, words)
    whole = json.loads(run_file.read_text())
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    run_file.write_text(json.dumps(whole | {"status": "training"}))
    launch(engine, "recipe", tmp_path, f"{words},--resume")
    resumed, actual = json.loads(run_file.read_text()), load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (resumed["status"], resumed["steps"]) == ("finished", 6)
    assert actual.keys() == expected.keys() and all(torch.equal(actual[n], t) for n, t in expected.items())
    for name, domain in whole["domains"].items():
        assert resumed["domains"][name]["loss_after"] == domain["loss_after"]


def _maturity(tensors):
    return torch.stack([tensor for name, tensor in tensors.items() if name.endswith("maturity")]).mean(0)


def _router_place(name):
    return name.replace(".lora_router.", ".lora_router.default.")


@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.engines) for e in ("zero2", "zero3"))])
def test_float32_adapters_train_on_a_bfloat16_base(tmp_path, engine):
    """What `moelora train` does on GPUs: a base in bfloat16, adapters in float32, measured before and after."""
    prepare(tmp_path, engine)
    settings = ["model.dtype=bfloat16", "training.bf16=true", "training.max_steps=2"]
    words = ",".join(f"--set,{setting}" for setting in [*settings, f"training.output_dir={tmp_path / 'out'}"])
    launch(engine, "recipe", tmp_path, words, precision="bf16")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for domain in record["domains"].values():
        assert domain["loss_after"] != domain["loss_before"]
        assert domain["loss_after"] == pytest.approx(domain["loss_before"], rel=0.2)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for name, tensor in weights.items() if name.endswith("lora_B.weight"))
    assert {tensor.dtype for name, tensor in weights.items() if name.endswith("maturity")} == {torch.float32}
