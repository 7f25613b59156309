"""When a recipe takes Liger's kernels, and which of them."""

import sys
from types import ModuleType

import pytest
import torch
from tiny import problems, tiny_recipe, write_recipe
from transformers import AutoConfig, TrainingArguments

from moelora.training import load_recipe

NO_FUSED_LOSS = {"fused_linear_cross_entropy": False}
NO_NATIVE = {"swiglu": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU, and a liger-kernel that knows Llama."""

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):
        raise AssertionError("nothing is trained here")

    table = ModuleType("liger_kernel.transformers.monkey_patch")
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama, "qwen9": apply_to_llama}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, table.__name__, table)
    monkeypatch.setattr("moelora.training.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    return table


def settled(folder, recipe, *overrides):
    return load_recipe(write_recipe(folder, recipe), overrides).training["use_liger_kernel"]


def test_on_by_default_on_a_gpu_where_they_are_installed(tmp_path, recipe, on_gpu):
    assert settled(tmp_path, recipe)
    assert settled(tmp_path, recipe, "training.use_liger_kernel=true")
    assert not settled(tmp_path, recipe, "training.use_liger_kernel=false")


def test_off_by_default_on_a_cpu(tmp_path, recipe, on_gpu, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cpu"))
    assert not settled(tmp_path, recipe)
    fix = problems(tmp_path, recipe, "training.use_liger_kernel=true")["training.use_liger_kernel"]
    assert "need a GPU" in fix and "runs on cpu" in fix


def test_off_by_default_where_they_are_not_installed(tmp_path, recipe, on_gpu, monkeypatch):
    monkeypatch.setattr("moelora.training.liger.is_liger_kernel_available", lambda: False)
    assert not settled(tmp_path, recipe)
    fix = problems(tmp_path, recipe, "training.use_liger_kernel=true")["training.use_liger_kernel"]
    assert "pip install liger-kernel" in fix


def test_off_by_default_where_they_cannot_be_imported(tmp_path, recipe, on_gpu, monkeypatch):
    del on_gpu.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert not settled(tmp_path, recipe)
    fix = problems(tmp_path, recipe, "training.use_liger_kernel=true")["training.use_liger_kernel"]
    assert "cannot import name 'MODEL_TYPE_TO_APPLY_LIGER_FN'" in fix


def test_off_by_default_where_liger_does_not_know_the_model(tmp_path, recipe, on_gpu):
    del on_gpu.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]
    assert not settled(tmp_path, recipe)
    fix = problems(tmp_path, recipe, "training.use_liger_kernel=true")["training.use_liger_kernel"]
    assert "of type llama, only for qwen9" in fix


def test_the_fused_loss_is_off_where_the_mixture_adapts_the_output_layer(tmp_path, recipe, on_gpu):
    recipe["mixture"] |= {"target_modules": ["q_proj", "lm_head"], "router_scope": "module"}
    recipe["training"]["liger_kernel_config"] = {"rope": False}
    training = load_recipe(write_recipe(tmp_path, recipe)).training
    assert training["use_liger_kernel"]
    assert training["liger_kernel_config"] == {"rope": False, "fused_linear_cross_entropy": False}
    key = "training.liger_kernel_config.fused_linear_cross_entropy"
    assert "past the mixture" in problems(tmp_path, recipe, f"{key}=true")[key]


def test_the_fused_loss_is_off_where_parameters_are_sharded(tmp_path, recipe, on_gpu, monkeypatch):
    """FSDP2 gathers the output layer when it is called, which that loss does not do."""
    assert load_recipe(write_recipe(tmp_path, recipe)).training["liger_kernel_config"] is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    training = load_recipe(write_recipe(tmp_path, recipe)).training
    assert training["use_liger_kernel"] and training["liger_kernel_config"] == NO_FUSED_LOSS
    key = "training.liger_kernel_config.fused_linear_cross_entropy"
    assert "FSDP" in problems(tmp_path, recipe, f"{key}=true")[key]


def test_the_kernel_of_native_experts_is_off_where_the_mixture_adapts_them(tmp_path, recipe, on_gpu):
    def apply_to_mixtral(rope=True, fused_linear_cross_entropy=True, swiglu=True, model=None):
        raise AssertionError("nothing is trained here")

    on_gpu.MODEL_TYPE_TO_APPLY_LIGER_FN["mixtral"] = apply_to_mixtral
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    AutoConfig.for_model("mixtral", **size, **EXPERTS).save_pretrained(tmp_path / "model")
    recipe["mixture"]["target_modules"] = "all-linear"
    training = load_recipe(write_recipe(tmp_path, recipe)).training
    assert training["use_liger_kernel"] and training["liger_kernel_config"] == NO_NATIVE
    key = "training.liger_kernel_config.swiglu"
    assert "native experts" in problems(tmp_path, recipe, f"{key}=true")[key]
    recipe["mixture"]["exclude_modules"] = r".*\.(experts|gate)\b.*"
    assert load_recipe(write_recipe(tmp_path, recipe)).training["liger_kernel_config"] is None


@pytest.mark.parametrize("asked", [(), ("training.use_liger_kernel=true",)], ids=["default", "asked"])
def test_kernels_that_liger_does_not_know_are_named(tmp_path, recipe, on_gpu, asked):
    recipe["training"]["liger_kernel_config"] = {"ropes": False, "model": None, "cross_entropy": True}
    found = problems(tmp_path, recipe, *asked)
    assert found.keys() == {f"training.liger_kernel_config.{name}" for name in ("ropes", "model", "cross_entropy")}
    assert "did you mean `rope`?" in found["training.liger_kernel_config.ropes"]
    assert settled(tmp_path, recipe, "training.liger_kernel_config={rope: false}")
