"""The shared-outer layout: native experts share the factor on the hidden side, and PEFT reads what is saved."""

import copy

import pytest
import torch
from native import EXPERTS, FAMILIES, batch, gradients, native_model, ours
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import ParamWrapper as PeftParamWrapper
from safetensors.torch import load_file, save_file

from moelora import MoELoraConfig
from moelora.experts import grow
from moelora.tuner.shared_factor import SharedFactor

ALONE = {"target_modules": [], "target_parameters": EXPERTS, "share_native_outer": True}


def plain_twin(family, tensors):
    """PEFT's LoRA with the tensors of a saved adapter, float32."""
    options = {"target_modules": [], "target_parameters": EXPERTS}
    plain = get_peft_model(native_model(family), LoraConfig(r=2, lora_alpha=6, **options))
    found = set_peft_model_state_dict(plain, tensors)
    assert not found.unexpected_keys and not [key for key in found.missing_keys if "lora" in key]
    return plain


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def shared_factors(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedFactor)}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_pefts_lora_with_copies(family, tmp_path):
    """A shared factor's gradient is the sum of those that its copies have."""
    inputs = batch()
    model = ours(native_model(family), **ALONE)
    plain = plain_twin(family, saved(model, tmp_path))
    expected_loss, expected = gradients(plain, inputs)
    loss, grads = gradients(model, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    shared = shared_factors(model)
    assert len(shared) == 2 * FAMILIES[family].num_mixtures
    assert {name.split(".")[-2] for name in shared} == {"lora_A", "lora_B"}
    for name, grad in grads.items():
        owner = name.removesuffix(".shared")
        wanted = expected[f"{owner}.weight" if owner in shared else name]
        if owner in shared:
            experts = shared[owner].num_experts
            copies = wanted.view(experts, -1, wanted.shape[1]) if "lora_A" in name else None
            wanted = copies.sum(0) if copies is not None else wanted.view(len(wanted), -1, experts).sum(-1)
        assert wanted.abs().max() > 0, name
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_sum_of_weight_and_delta_is_never_made_and_fewer_numbers_are_trained(monkeypatch):
    monkeypatch.setattr(PeftParamWrapper, "forward", lambda *_: pytest.fail("W + BA was made"))
    model = get_peft_model(native_model("qwen3_moe"), MoELoraConfig(r=2, **ALONE)).eval()
    inputs = batch(labels=False)
    torch.testing.assert_close(model(**inputs).logits, native_model("qwen3_moe")(**inputs).logits, rtol=1e-5, atol=1e-5)
    full = get_peft_model(native_model("qwen3_moe"), MoELoraConfig(r=2, **ALONE | {"share_native_outer": False}))
    counts = [each.get_nb_trainable_parameters()[0] for each in (model, full)]
    assert counts[0] < 0.75 * counts[1]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_and_loaded_it_is_the_same(family, low_cpu_mem_usage, tmp_path):
    inputs = batch(labels=False)
    model = ours(native_model(family), **ALONE)
    expected = model(**inputs).logits
    saved(model, tmp_path)
    again = PeftModel.from_pretrained(native_model(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert shared_factors(again).keys() == shared_factors(model).keys()
    assert torch.equal(again(**inputs).logits, expected)
    assert torch.equal(copy.deepcopy(again)(**inputs).logits, expected)


def test_what_is_not_finite_is_loaded_as_another_adapter_would_be():
    model = ours(native_model("mixtral"), **ALONE)
    name, factor = next(iter(shared_factors(model).items()))
    with torch.no_grad():
        factor.shared[0, 0] = float("nan")
    other = get_peft_model(native_model("mixtral"), MoELoraConfig(r=2, **ALONE))
    other.load_state_dict(model.state_dict())
    assert shared_factors(other)[name].shared.isnan().sum() == 1


def test_factors_that_experts_do_not_share_are_not_loaded(tmp_path):
    tensors = saved(ours(native_model("mixtral"), **ALONE), tmp_path)
    key = next(key for key in tensors if "lora_A" in key and tensors[key][0].equal(tensors[key][2]))
    tensors[key][0] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    model = get_peft_model(native_model("mixtral"), MoELoraConfig(r=2, **ALONE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"differs from one native expert to another.*share_native_outer"):
        set_peft_model_state_dict(model, tensors)
    name = key.replace(".weight", ".default.weight")
    assert torch.equal(model.state_dict()[name], before[name])


def test_beside_an_adapter_that_shares_nothing():
    """Both layouts in one product: as one after the other, by PEFT's own form."""
    model = ours(native_model("qwen3_moe"), **ALONE)
    options = ALONE | {"share_native_outer": False}
    model.add_adapter("own", MoELoraConfig(r=3, lora_alpha=6, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".own." in name:
                parameter.normal_(std=0.2)
    model.set_adapter(["default", "own"])
    inputs = batch(labels=False)
    logits = model(**inputs).logits
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    assert (logits - native_model("qwen3_moe")(**inputs).logits).abs().max() > 0.01


def test_new_experts_of_a_mixture_beside_have_no_pairs_to_share():
    model = ours(native_model("qwen3_moe"), **ALONE | {"target_modules": ["q_proj"]})
    before = model(**batch(labels=False)).logits
    name = grow(model, 2)
    config = model.peft_config[name]
    assert config.target_parameters is None and not config.share_native_outer
    model.set_adapter("default")
    assert torch.equal(model(**batch(labels=False)).logits, before)


def test_in_bfloat16_factors_are_float32_as_others_are():
    model = get_peft_model(native_model("mixtral").bfloat16(), MoELoraConfig(r=2, **ALONE))
    assert {module.shared.dtype for module in shared_factors(model).values()} == {torch.float32}
    assert model(**batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (ALONE | {"use_moe_routing": False}, r"share_native_outer.*use_moe_routing=False.*leave one"),
        ({"target_modules": ["q_proj"]}, r"share_native_outer.*nothing to act on.*target_parameters"),
        (ALONE | {"share_native_outer": "yes"}, r"share_native_outer.*'yes'.*True or False"),
    ],
)
def test_what_cannot_be_shared_is_refused_and_leaves_the_base_alone(options, said):
    base = native_model("mixtral")
    with pytest.raises(ValueError, match=said):
        get_peft_model(base, MoELoraConfig(r=2, **{"share_native_outer": True} | options))
    assert not [name for name, _ in base.named_modules() if "lora" in name]
