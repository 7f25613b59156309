"""`target_parameters` on bases that are mixtures themselves, beside plain LoRA of the same PEFT."""

import pytest
import torch
from native import EXPERTS, FAMILIES, batch, gradients, native_model, noisy, ours, peft_lora
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import ParamWrapper as PeftParamWrapper
from safetensors.torch import load_file, save_file

from moelora import MoELoraConfig
from moelora.ops import native
from moelora.tuner.native import ParamWrapper

ALONE = {"target_modules": [], "target_parameters": EXPERTS}


def names_and_shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_pefts_lora_does(family):
    inputs = batch()
    expected_model, model = peft_lora(native_model(family), **ALONE), ours(native_model(family), **ALONE)
    assert names_and_shapes(model) == names_and_shapes(expected_model)
    assert sum(isinstance(m, ParamWrapper) for m in model.modules()) == 2 * FAMILIES[family].num_mixtures
    expected_loss, expected = gradients(expected_model, inputs)
    loss, grads = gradients(model, inputs)
    with torch.no_grad():
        base = native_model(family)(**inputs).logits
        logits = model(**inputs).logits
        torch.testing.assert_close(logits, expected_model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (logits - base).abs().max() > 0.01
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_never_makes_the_sum(family, monkeypatch):
    def refuse(*_):
        raise AssertionError("W + BA was made")

    monkeypatch.setattr(PeftParamWrapper, "forward", refuse)
    model = get_peft_model(native_model(family), MoELoraConfig(r=2, **ALONE)).eval()
    inputs = batch(labels=False)
    torch.testing.assert_close(model(**inputs).logits, native_model(family)(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpoints_go_to_pefts_lora_and_back(family, tmp_path):
    inputs = batch(labels=False)
    model = ours(native_model(family), **ALONE)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(native_model(family), tmp_path)
    assert type(again.base_model).__name__ == "MoELoraModel"
    assert torch.equal(again(**inputs).logits, expected)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    plain = get_peft_model(native_model(family), LoraConfig(r=2, lora_alpha=6, **ALONE)).eval()
    found = set_peft_model_state_dict(plain, tensors)
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora" in key]
    torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_to_and_from_plain_loras(family, tmp_path):
    from moelora.experts import native_from_lora, native_to_lora, save_lora

    inputs = batch(labels=False)
    plain = peft_lora(native_model(family), **ALONE)
    expected = plain(**inputs).logits
    plain.save_pretrained(tmp_path / "plain")
    model = native_from_lora(native_model(family), tmp_path / "plain")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    save_lora(native_to_lora(model), tmp_path / "back")
    again = PeftModel.from_pretrained(native_model(family), tmp_path / "back")
    assert type(again.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    trainable = native_from_lora(native_model(family), tmp_path / "plain", is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == set(names_and_shapes(trainable))


def test_loras_that_are_more_are_refused_and_leave_the_base_alone(tmp_path):
    from moelora.experts import LoraError, build, from_lora, native_from_lora, native_to_lora

    mixed = peft_lora(native_model("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS)
    mixed.save_pretrained(tmp_path)
    base = native_model("mixtral")
    with pytest.raises(LoraError, match="q_proj`, which is a linear"):
        native_from_lora(base, tmp_path)
    assert not [name for name, _ in base.named_modules() if "lora" in name]
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(LoraError, match="native_from_lora"):
        build(base, {"one": tmp_path, "other": tmp_path})
    model = ours(base, target_modules=["q_proj"], target_parameters=EXPERTS)
    with pytest.raises(LoraError, match="target_parameters"):
        from_lora(model, tmp_path, "more")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj`, which a router weighs"):
        native_to_lora(model)


def test_beside_a_routed_mixture():
    """Linears go by our routers, native experts by the base's: what each computes alone, it computes with the other."""
    inputs = batch()
    both = {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS, "router_aux_loss_coef": 0.5}
    model = ours(native_model("qwen3_moe"), **both)
    assert set(model.base_model.routing.routers) == {"model.layers.0", "model.layers.1"}
    loss, grads = gradients(model.train(), inputs)
    assert loss.isfinite() and all(grad.abs().max() > 0 for grad in grads.values())
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and "lora_B" in name:
                parameter.zero_()
    alone = ours(native_model("qwen3_moe"), **both | {"target_parameters": None})
    torch.testing.assert_close(model.eval()(**inputs).logits, alone(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_merges_as_pefts_lora_does():
    inputs = batch(labels=False)
    model = ours(native_model("gpt_oss"), **ALONE)
    expected = model(**inputs).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(native_model("gpt_oss"))
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_routed_mixture_beside_cannot_be_merged():
    model = ours(native_model("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS)
    with pytest.raises(ValueError, match="router_type='learned'"):
        model.merge_adapter()
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_switched_off_and_on():
    inputs = batch(labels=False)
    model = ours(native_model("mixtral"), **ALONE)
    expected = model(**inputs).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).logits, native_model("mixtral")(**inputs).logits)
    assert torch.equal(model(**inputs).logits, expected)
    assert type(model.unload()) is type(native_model("mixtral"))


def test_several_adapters_add_up_as_in_peft():
    inputs = batch()
    pair = []
    for make in (peft_lora, ours):
        model = make(native_model("olmoe"), **ALONE)
        model.add_adapter("second", type(model.peft_config["default"])(r=3, lora_alpha=3, **ALONE))
        model.base_model.set_adapter(["default", "second"])
        noisy(model)
        pair.append(model)
    (expected_loss, expected), (loss, grads) = (gradients(model, inputs) for model in pair)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys() and any("second" in name for name in grads)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)
    plain, model = pair
    for each in pair:
        each.base_model.set_adapter("second")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
    model.delete_adapter("default")
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_several_adapters_are_saved_and_loaded_as_one(tmp_path):
    inputs = batch(labels=False)
    both = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    model = ours(native_model("mixtral"), **both)
    model.add_adapter("second", MoELoraConfig(r=3, router_type="learned", **both))
    model.set_adapter(["default", "second"])
    noisy(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(native_model("mixtral"), tmp_path)
    assert again.active_adapters == model.active_adapters == ["default", "second"]
    assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    inputs = batch()
    results = []
    for checkpoints in (False, True):
        model = ours(native_model("qwen3_moe"), target_modules=["q_proj"], target_parameters=EXPERTS).train()
        if checkpoints:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        results.append(gradients(model, inputs))
    (expected_loss, expected), (loss, grads) = results
    torch.testing.assert_close(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bfloat16(family):
    """Adapters in float32 on a bfloat16 base, as PEFT makes them: no further from float32 than PEFT's own form."""
    inputs = batch()
    exact = ours(native_model(family), **ALONE)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float() if not parameter.requires_grad else parameter)
        expected = exact(**inputs).logits
        errors = []
        for make in (ours, peft_lora):
            model = make(native_model(family, torch.bfloat16), **ALONE)
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            errors.append((model(**inputs).logits.float() - expected).norm() / expected.norm())
    assert errors[0] < 1.2 * errors[1] + 0.01 < 0.2
    _, grads = gradients(model, inputs)
    assert all(grad.isfinite().all() and grad.dtype is torch.float32 for grad in grads.values())


def test_a_watched_module_is_called_as_peft_does(monkeypatch):
    """Hooks on the experts see their forward: offloading, and whoever records outputs."""
    model = ours(native_model("mixtral"), **ALONE)
    inputs = batch(labels=False)
    expected, seen = model(**inputs).logits, []
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    experts.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", [pytest.param("alone", marks=pytest.mark.slow), "beside linears", "beside experts"])
def test_compiles_as_one_graph(family, targets):
    options = {
        "alone": ALONE,
        "beside linears": ALONE | {"target_modules": ["q_proj"]},
        "beside experts": {"target_modules": ["mlp.experts"], "expert_capacity_factor": None},
    }[targets]
    model = ours(native_model(family, torch.bfloat16, num_hidden_layers=1), **options).train()
    inputs = batch()
    expected = model(**inputs).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [ALONE, {"target_modules": ["mlp.experts", "q_proj"]}], ids=["pairs", "beside"])
def test_generates_with_a_cache_what_it_does_without(options):
    model = ours(native_model("qwen3_moe"), **options)
    prompt = {"input_ids": batch(labels=False)["input_ids"], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**prompt), model.generate(**prompt, use_cache=False))


def test_trained_by_the_trainer_and_resumed(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in batch(rows=12)["input_ids"]]

    def trainer(model, steps, folder):
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, save_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, seed=0, logging_steps=1,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=rows)

    def fresh():
        return ours(native_model("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS)

    whole = fresh()
    before = {name: p.detach().clone() for name, p in whole.named_parameters() if p.requires_grad}
    trainer(whole, 4, tmp_path / "whole").train()
    assert all(not torch.equal(p, before[name]) for name, p in whole.named_parameters() if name in before)
    resumed = fresh()
    trainer(resumed, 4, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    for (name, expected), (_, actual) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=name)


REFUSALS = {
    "dropout": ({"lora_dropout": 0.1}, r"`lora_dropout` \(0.1\)"),
    "dropout under all-linear": (
        {"lora_dropout": 0.1, "target_modules": "all-linear", "target_parameters": None},
        r"exclude_modules='\.\*",
    ),
    "one expert": ({"single_expert": True}, "one expert of a mixture"),
    "typing error": ({"target_parameters": ["experts.gate_upproj"]}, r"mlp\.experts\.gate_up_proj"),
    "both": ({"target_modules": ["mlp.experts"]}, "both would be one layer"),
    "one dimension": ({"target_parameters": ["input_layernorm.weight"]}, "1 dimensions"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused_before_anything_is_changed(case):
    options, message = REFUSALS[case]
    base = native_model("mixtral")
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, MoELoraConfig(**ALONE | options))
    assert [name for name, _ in base.named_modules()] == before
    assert all(p.requires_grad for p in base.parameters())


def test_other_parameters_in_a_second_adapter_are_refused():
    model = ours(native_model("mixtral"), **ALONE)
    before = names_and_shapes(model)
    with pytest.raises(ValueError, match="same set of parameters"):
        model.add_adapter("second", MoELoraConfig(target_modules=[], target_parameters=EXPERTS[:1]))
    assert names_and_shapes(model) == before and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("routed_first", [True, False])
def test_native_pairs_alone_and_a_mixture_do_not_join(routed_first):
    routed = {"target_modules": ["q_proj"]}
    first, second = (routed, ALONE) if routed_first else (ALONE, routed)
    model = ours(native_model("mixtral"), **first)
    before = names_and_shapes(model)
    with pytest.raises(ValueError, match="'second' cannot join default: one has experts"):
        model.add_adapter("second", MoELoraConfig(**second))
    assert names_and_shapes(model) == before and list(model.peft_config) == ["default"]


def test_without_a_mixture_what_needs_one_says_so():
    model = ours(native_model("mixtral"), **ALONE)
    for call in (model.routing_stats, lambda: model.attach_router(torch.nn.Linear(32, 4))):
        with pytest.raises(ValueError, match="holds no mixture"):
            call()
    with pytest.raises(ValueError, match="native experts"):
        model(**batch(), routing_weights=torch.ones(3, 4))


def test_files_alone_say_what_they_hold(tmp_path):
    """Read without the base model, as `moelora inspect` does; what would drop native pairs is refused."""
    from moelora.experts import to_lora
    from moelora.schema import UserError
    from moelora.storage.mixture_files import read_mixture

    model = ours(native_model("mixtral"), target_modules=["q_proj"], target_parameters=EXPERTS)
    model.save_pretrained(tmp_path)
    (adapter,) = read_mixture(tmp_path)
    assert adapter.pools.keys() == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert len(adapter.others) == 8 and all("experts" in name for name in adapter.others)
    assert adapter.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for given in (model, [adapter]):
        with pytest.raises(ValueError, match="`target_parameters`"):
            to_lora(given, 0)
    alone = ours(native_model("mixtral"), **ALONE)
    alone.save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match="native experts alone"):
        read_mixture(tmp_path / "alone")


@pytest.mark.parametrize("damage", ["half", "shape"])
def test_damaged_pairs_are_told(tmp_path, damage):
    from moelora.schema import UserError
    from moelora.storage.mixture_files import read_mixture

    model = ours(native_model("mixtral"), **ALONE)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    tensors[key] = tensors[key][:, :-1].clone()
    if damage == "half":
        del tensors[key]
    save_file(tensors, path)
    for read in (read_mixture, lambda folder: PeftModel.from_pretrained(native_model("mixtral"), folder)):
        with pytest.raises((UserError, ValueError), match=r"experts\.base_layer"):
            read(tmp_path)


def test_a_bare_name_is_written_with_its_module():
    """From a checkpoint alone it could not be told which factors are a parameter's."""
    model = ours(native_model("mixtral"), target_modules=[], target_parameters=["down_proj"])
    assert model.peft_config["default"].target_parameters == ["mlp.experts.down_proj"]
    assert native.is_native(model.base_model.model.model.layers[0].mlp.experts.get_base_layer())


def test_commands_run_pairs_alone(tmp_path, capsys):
    """They have no routing of ours that an attached router could be in the place of."""
    from tiny import tiny_tokenizer

    from moelora.cli import main

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    base = native_model("mixtral", vocab_size=len(tokenizer))
    base.save_pretrained(tmp_path / "model")
    ours(base, **ALONE).save_pretrained(tmp_path / "adapter")
    given = ["--base", str(tmp_path / "model"), "--max-new-tokens", "2"]
    assert main(["generate", "--adapter", str(tmp_path / "adapter"), "--prompt", "hello", *given]) == 0
    assert capsys.readouterr().out


@torch.no_grad()
def test_a_trainers_reference_of_pairs_alone():
    """As TRL's DPO, KTO, GRPO and RLOO make it."""
    model, inputs = ours(native_model("mixtral"), **ALONE), batch(labels=False)
    before = model(**inputs).logits
    model.add_adapter("ref", model.peft_config["default"])
    assert model.active_adapters == ["default"]
    assert torch.equal(model(**inputs).logits, before)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".default." in name:
            parameters[name.replace(".default.", ".ref.")].copy_(parameter)
            parameter.mul_(2)
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-2)
    model.set_adapter("ref")
    assert torch.equal(model(**inputs).logits, before)
