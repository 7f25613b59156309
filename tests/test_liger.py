"""Liger's kernels around a mixture: equal losses and gradients, and when `moelora train` takes them."""

import inspect
import json
import sys
from types import MethodType

import pytest
import torch
from datasets import Dataset
from helpers import (
    ARCHITECTURES,
    SCOPES,
    assert_same_grads,
    awaken,
    config_for,
    every_pair,
    grads_of,
    llama,
    mixture_of,
)
from peft import get_peft_model
from test_trainer import KeepGradients, Rows, mixture, train
from tiny import tiny_recipe, tiny_tokenizer, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama

from moelora.cli.commands import main
from moelora.training.callback import MoELoraCallback
from moelora.tuner import probe

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(2, 64, (2, 6), generator=GENERATOR)  # the interpreter runs a program for each token
LABELS = IDS.masked_fill(torch.arange(6) < torch.tensor([[0], [3]]), -100)
NO_FUSED_LOSS = {"fused_linear_cross_entropy": False}
NO_NATIVE = {"swiglu": False}


# ---- the same numbers, with the kernels themselves -------------------------------------------------------------------


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request, monkeypatch):
    """Where Liger's kernels run, the CPU in Triton's interpreter; what they replace comes back after the test."""
    pytest.importorskip("liger_kernel")
    _keep(monkeypatch, modeling_llama)
    if request.param == "cpu":
        if request.getfixturevalue("kernel_device").type != "cpu":
            pytest.skip("Triton compiles its kernels for the GPU here")
        monkeypatch.setattr("moelora.ops.triton.INTERPRET", False)  # the mixture's own are not what is tested
        _teach_interpreter(monkeypatch)
    return request.param


def _keep(monkeypatch, module):
    """Liger changes the functions and classes of transformers' modules for good; here, for a test."""
    for name, value in list(vars(module).items()):
        if callable(value):
            monkeypatch.setattr(module, name, value)


def _teach_interpreter(monkeypatch):
    """Triton 3.6's interpreter has no libdevice, and passes numbers on as Python's, which have no `.to`."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(value):
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))  # looked up in the kernel, not here


def has_kernels(model):
    return "Liger" in inspect.unwrap(model.get_base_model().model.layers[0].mlp.forward).__qualname__


def step(model, **inputs):
    """(output, gradients) of a training step on the model's device."""
    model.train()
    given = {"input_ids": IDS, "labels": LABELS} | inputs
    output = model(**{k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in given.items()})
    output.loss.backward()
    return output, grads_of(model)


@every_pair(scope=SCOPES, num_items=[None, 40], saves_x=[True, False])
def test_a_step_equals_one_without_them(device, monkeypatch, scope, num_items, saves_x):
    monkeypatch.setattr("moelora.ops.remade.MIN_BYTES", 2**60 if saves_x else 0)
    inputs = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    options = {"router_scope": scope, "router_aux_loss_coef": 0.5}
    plain, expected = step(mixture_of("llama", **options).to(device), **inputs)
    model = mixture_of("llama", **options).to(device)
    apply_liger_kernel(model, None)
    assert has_kernels(model)
    output, grads = step(model, **inputs)
    assert output.logits is None  # the fused loss has none, and so the balancing loss came with it alone
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.balancing_loss, plain.balancing_loss, rtol=1e-5, atol=1e-5)
    assert_same_grads(grads, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)], indirect=True)  # the interpreter cannot
def test_a_mixture_is_made_of_a_model_that_has_them(device):
    """The model's twin, which is looked at then, has them too, and no data: no kernel is started on it."""
    base = llama().to(device)
    apply_liger_kernel(base, None)
    probe._readings_of.cache_clear()
    model = get_peft_model(base, config_for(ARCHITECTURES["llama"]))
    torch.cuda.synchronize()
    assert probe.readings_of(base).complete
    step(model)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)], indirect=True)  # the interpreter cannot
def test_a_step_in_bfloat16(device):
    """Both round; the kernels are about as far from float32 as what they take the place of."""
    options = {"top_k_experts": 4, "expert_capacity_factor": None}  # a choice would change by a rounding
    exact, truth = step(mixture_of("llama", **options).to(device))
    models = [mixture_of("llama", **options).to(device, torch.bfloat16) for _ in range(2)]
    plain, plain_grads = step(models[0])
    apply_liger_kernel(models[1], None)
    output, grads = step(models[1])
    assert abs(output.loss - exact.loss) < 2 * abs(plain.loss - exact.loss) + 0.02 * exact.loss
    torch.testing.assert_close(output.balancing_loss.float(), exact.balancing_loss, rtol=0.02, atol=0.0)
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        error, plains = ((each[name].float() - grad).norm() for each in (grads, plain_grads))
        assert error < 3 * plains + 0.02 * grad.norm(), name


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS = {"mistral": {}, "qwen3": {}, "phi3": {}, "mixtral": EXPERTS, "qwen3_moe": EXPERTS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_models(device, monkeypatch, kind):
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **size, **heads, **KINDS[kind])
    mixed = config_for(ARCHITECTURES["llama"], target_modules="all-linear", router_aux_loss_coef=0.5)
    results = []
    for use in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config)
        _keep(monkeypatch, sys.modules[type(base).__module__])
        model = get_peft_model(base, mixed)
        awaken(model)
        model.to(device)
        if use:
            apply_liger_kernel(model, NO_NATIVE if KINDS[kind] else None)
        results.append(step(model))
    (plain, expected), (output, grads) = results
    assert output.logits is None and plain.logits is not None
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(output.balancing_loss, plain.balancing_loss, rtol=1e-3, atol=0.0)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 0.02 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.experts"]])
def test_a_kernel_in_place_of_adapted_native_experts_is_refused(monkeypatch, targets):
    pytest.importorskip("liger_kernel")
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **size, **EXPERTS))
    _keep(monkeypatch, sys.modules[type(base).__module__])
    model = get_peft_model(base, config_for(ARCHITECTURES["llama"], target_modules=targets))
    assert model(input_ids=IDS).logits.isfinite().all()
    apply_liger_kernel(model, {"rms_norm": False, "rope": False, "fused_linear_cross_entropy": False})
    with pytest.raises(ValueError, match=r"native experts.*swiglu.*exclude_modules"):
        model(input_ids=IDS)


@pytest.mark.parametrize("when", ["before", "after", "in the class"])
def test_adapters_join_before_and_after(device, when):
    """Liger's own forward of an MLP is read for who shares an input, or the one it took the place of."""
    _, expected = step(mixture_of("llama").to(device))
    if when == "in the class":  # as after an earlier Trainer in the same process
        apply_liger_kernel(llama(), None)
    model = mixture_of("llama")
    if when == "before":
        base = llama()
        apply_liger_kernel(base, None)
        model = get_peft_model(base, config_for(ARCHITECTURES["llama"]))
        awaken(model)
    elif when == "after":
        apply_liger_kernel(model, None)
    assert has_kernels(model.to(device))
    mlp = model.get_base_model().model.layers[0].mlp
    assert mlp.gate_proj.link.fused_with == (mlp.up_proj,)
    _, grads = step(model)
    assert_same_grads(grads, expected, rtol=1e-3, atol=2e-5)


def test_without_labels_there_are_logits_and_they_carry_the_balancing_loss(device):
    options = {"router_aux_loss_coef": 0.5}
    expected, grads = {}, {}
    for found, use in ((expected, False), (grads, True)):
        model = mixture_of("llama", **options).to(device).train()
        if use:
            apply_liger_kernel(model, None)
        model(input_ids=IDS.to(device)).logits.square().mean().backward()
        found |= grads_of(model)
    assert_same_grads(grads, expected, rtol=1e-3, atol=2e-5)


def test_the_output_layer_is_adapted(device):
    options = {"target_modules": ["q_proj", "lm_head"], "router_scope": "module"}
    _, expected = step(mixture_of("llama", **options).to(device))
    model = mixture_of("llama", **options).to(device)
    apply_liger_kernel(model, NO_FUSED_LOSS)
    _, grads = step(model)
    assert any("lm_head" in name for name in grads)
    assert_same_grads(grads, expected, rtol=1e-3, atol=2e-5)
    apply_liger_kernel(model, None)
    with pytest.raises(ValueError, match="output layer"):
        step(model)


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1, "gradient_checkpointing": True}], ids=str)
def test_trainer(device, tmp_path, options):
    results = []
    for use in (False, True):
        model = mixture()
        trainer, grads = train(
            model,
            Rows(8, 8),
            tmp_path,
            callbacks=[MoELoraCallback()],
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            use_cpu=device == "cpu",
            use_liger_kernel=use,
            **options,
        )
        assert has_kernels(model) == use
        logs = [entry for entry in trainer.state.log_history if "balancing_loss" in entry]
        results.append((grads, [(entry["loss"], entry["balancing_loss"]) for entry in logs]))
    (expected, expected_logs), (grads, logs) = results
    assert len(grads) == len(logs) == 2
    for mine, theirs in zip(grads, expected, strict=True):
        assert_same_grads(mine, theirs, rtol=1e-3, atol=2e-5)
    for mine, theirs in zip(logs, expected_logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
def test_sft_trainer(device, tmp_path):
    trl = pytest.importorskip("trl")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    results = []
    for use in (False, True):
        model = mixture(vocab_size=len(tokenizer))
        keep = KeepGradients()
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_length=16,
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            use_cpu=device == "cpu",
            use_liger_kernel=use,
        )
        data = Dataset.from_dict({"text": ["hello", "abc", "long", "zy"]})
        trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[keep, MoELoraCallback()],
        ).train()
        assert has_kernels(model) == use
        results.append(keep.steps[0])
    assert any("moe_router" in name for name in results[1])
    assert_same_grads(results[1], results[0], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_moelora_train_takes_them_by_itself(device, tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path) | {"block_size": 16, "max_eval_blocks": 2}
    recipe["training"] |= {"max_steps": 2, "save_strategy": "no", "use_cpu": device == "cpu"}
    if device == "cpu":
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        monkeypatch.setattr("moelora.training.liger.liger_functions", lambda device: MODEL_TYPE_TO_APPLY_LIGER_FN)
    path = write_recipe(tmp_path, recipe)
    without = ["--set", "training.use_liger_kernel=false", "--set", "training.output_dir=without"]
    for options, use in ((without, False), ([], True)):
        assert main(["train", str(path), *options]) == 0
        assert ("Liger's kernels" in capsys.readouterr().err) == use
    records = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("without", "out")]
    assert [record["recipe"]["training"]["use_liger_kernel"] for record in records] == [False, True]
    assert records[1]["environment"]["packages"]["liger-kernel"]
    for name, domain in records[1]["domains"].items():
        for when in ("before", "after"):
            expected = records[0]["domains"][name][f"loss_{when}"]
            assert domain[f"loss_{when}"] == pytest.approx(expected, rel=1e-3 if device == "cpu" else 2e-2)


# ---- an adapted output layer, which the fused loss would not call ----------------------------------------------------


def liger_forward(self, input_ids=None, labels=None, skip_logits=None, **kwargs):
    return type(self).forward(self, input_ids=input_ids, labels=labels, **kwargs)


liger_forward.__module__ = "liger_kernel.transformers.model.llama"


@pytest.mark.parametrize("target", ["lm_head", "v_proj"])
def test_a_fused_loss_that_would_pass_experts_over_is_refused(target):
    model = mixture_of("llama", target_modules=["q_proj", target], router_scope="module").train()
    inputs = {"input_ids": IDS, "labels": LABELS}
    assert model(**inputs).loss.isfinite()
    base = model.get_base_model()
    base.forward = MethodType(liger_forward, base)
    assert model(input_ids=IDS).logits.isfinite().all()
    assert model(**inputs, skip_logits=False).loss.isfinite()
    assert model.eval()(**inputs).loss.isfinite()
    if target == "v_proj":
        assert model.train()(**inputs).loss.isfinite()
        return
    for training, more in ((True, {}), (False, {"skip_logits": True})):
        with pytest.raises(ValueError, match=r"output layer.*fused_linear_cross_entropy.*exclude_modules"):
            model.train(training)(**inputs, **more)
    model.unload()(**inputs, skip_logits=True)
