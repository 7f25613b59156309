"""Every name of an adapter comes back exactly, or is refused when the adapter is made."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_persistence import adapter_state, assert_same_state, base_model, config, logits, trained
from tiny import save_tiny_model
from transformers import LlamaForCausalLM

from moelora.cli.commands import main
from moelora.experts import from_lora
from moelora.storage import saving

CLASH = ("0", "1", "mlp", "self_attn", "q_proj", "down_proj", "layers", "embed_tokens", "norm")
OF_PEFT = ("weight", "lora_A", "lora_B", "moe_router", "lora_router", "base_layer")
OF_CONTAINERS = ("keys", "pop", "forward", "training", "items", "add_module")
UNPRINTABLE = ("", "a\n", "a\x1b[31m", "\ud800", "a\u202eb", "n" * 129)
SEPARATORS = ("a/b", "a.b", "..", "a\\b")
REFUSED = (*CLASH, *OF_PEFT, *OF_CONTAINERS, *UNPRINTABLE, *SEPARATORS, "é" * 128)
FINE = (
    "default",
    "expert_3",
    "skills",
    "lora",
    "lora_",
    "l",
    "a b",
    "7",
    "q",
    "q_proj2",
    "é",
    "a-b",
    "[v2]",
    "$(x)",
    "*",
    "weights",
)


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_would_lose_weights_is_refused_when_the_adapter_is_made(name):
    base = base_model()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match="an adapter cannot be named"):
        get_peft_model(base, config(), adapter_name=name)
    assert base.state_dict().keys() == before.keys()
    model = trained()
    expected = logits(model)
    with pytest.raises(ValueError, match="an adapter cannot be named"):
        model.add_adapter(name, config())
    with pytest.raises(ValueError, match="an adapter cannot be named"):
        get_peft_model(base_model(), config(use_moe_routing=False), adapter_name=name)
    assert list(model.peft_config) == ["default"] == model.active_adapters
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Adapter name")
@pytest.mark.parametrize("name", FINE, ids=ascii)
def test_any_other_name_comes_back_exactly(tmp_path, name):
    for names in ((name,), ("first", name, "last")):
        model = trained(names)
        folder = tmp_path / str(len(names))
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base_model(), folder)
        assert list(loaded.peft_config) == list(names)
        assert_same_state(adapter_state(loaded), adapter_state(model))
        assert torch.equal(logits(loaded), logits(model))
        model.save_pretrained(folder / "alone", selected_adapters=[name])
        alone = get_peft_model(base_model(), config(), adapter_name="other")
        alone.load_adapter(folder / "alone" / ("" if name == "default" else name), name)
        kept = {key: tensor for key, tensor in adapter_state(model).items() if f".{name}." in key or key.endswith(name)}
        found = {key: tensor for key, tensor in adapter_state(alone).items() if ".other." not in key}
        assert_same_state(found, kept)


def test_the_name_of_pefts_own_wrapper_can_only_be_alone(tmp_path):
    model = trained(("model",))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert_same_state(adapter_state(loaded), adapter_state(model))
    for first, second in (("model", "other"), ("other", "model")):
        several = trained((first,))
        with pytest.raises(ValueError, match="'model' is a part of all tensors' names in PEFT"):
            several.add_adapter(second, config())
        assert several.active_adapters == [first]


def test_imported_experts_are_named_by_the_same_rule(tmp_path):
    get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = trained()
    with pytest.raises(ValueError, match="cannot be named 'mlp'"):
        from_lora(model, tmp_path, "mlp")
    assert list(model.peft_config) == ["default"]


def test_a_command_refuses_such_a_name_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    save_tiny_model(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    for name in ("mlp", "q_proj", "keys"):
        experts = ["--expert", f"{name}={tmp_path / 'lora'}", "--expert", f"fine={tmp_path / 'lora'}"]
        assert main(["build", *experts, "--base", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 2
        assert f"an adapter cannot be named '{name}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_save_that_lacks_tensors_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    model = trained()
    whole = saving.get_peft_model_state_dict
    monkeypatch.setattr(saving, "get_peft_model_state_dict", lambda *a, **k: dict(list(whole(*a, **k).items())[1:]))
    with pytest.raises(ValueError, match=r"'default' has \d+ tensors of experts and routers, and \d+ were gathered"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
