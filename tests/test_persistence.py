"""Saving and loading: exact, complete or not at all."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from helpers import SCOPES, every_pair
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig
from moelora.storage import saving

IDS = torch.arange(12).view(2, 6)


def base_model(hidden_size=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
    )
    return LlamaForCausalLM(config)


def config(**options):
    fields = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "num_experts": 3, "task_type": "CAUSAL_LM"}
    return MoELoraConfig(**(fields | options))


def trained(names=("default",), **options):
    """A mixture with something in every tensor that a checkpoint holds."""
    model = get_peft_model(base_model(), config(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**options))
    model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    model.train()
    model(input_ids=IDS, labels=IDS)  # maturity and counters move
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapter_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    assert any(name.endswith("tokens_per_expert") for name in expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


EXPERTS = tuple(f"expert_{i}" for i in range(12))  # twelve: by name, expert_10 would sort before expert_2
NAMES = {"default": ("default",), "named": ("skills",), "experts": EXPERTS}
WAYS = pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)


@every_pair(kind=NAMES, scope=SCOPES, low_cpu_mem_usage=[False, True])
def test_round_trip_is_exact(tmp_path, kind, scope, low_cpu_mem_usage):
    names = NAMES[kind]
    model = trained(names, router_scope=scope, router_hidden_size=5, maturity_tokens=30)
    model.set_expert_maturity(1, 0.25)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    expected_names = ["default"] if names in (("default",),) else list(names)
    assert loaded.active_adapters == expected_names
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@WAYS
def test_loads_trainable_through_auto_class(tmp_path, names):
    base_model().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_transformers_loads_an_adapter(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = base_model()
    loaded.load_adapter(str(tmp_path))
    loaded.eval()
    assert torch.equal(logits(loaded), logits(model))
    trained(EXPERTS[:2]).save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match=r"PeftModel\.from_pretrained"):
        base_model().load_adapter(str(tmp_path / "several"))


def test_a_subset_stays_a_subset(tmp_path):
    model = trained(EXPERTS[:4])
    model.set_adapter(["expert_3", "expert_1"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert list(loaded.peft_config) == list(EXPERTS[:4])
    assert loaded.active_adapters == ["expert_3", "expert_1"]
    assert torch.equal(logits(loaded), logits(model))


def test_one_expert_moves_to_another_mixture(tmp_path):
    model = trained(EXPERTS[:3], router_type="learned")
    model.save_pretrained(tmp_path, selected_adapters=["expert_2"])
    other = trained(EXPERTS[:2], router_type="learned")
    before = logits(other)
    other.load_adapter(tmp_path / "expert_2", "expert_2")
    assert other.active_adapters == ["expert_0", "expert_1"]
    assert torch.equal(logits(other), before)
    other.set_adapter(list(EXPERTS[:3]))
    assert torch.equal(logits(other), logits(model))


def damage(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def drop_expert(tensors):
    for key in [key for key in tensors if key.startswith("expert_1/")]:
        del tensors[key]


def drop_router(tensors):
    del tensors[next(key for key in tensors if "moe_router" in key and key.endswith("weight"))]


def add_key(tensors):
    some = next(key for key in tensors if "lora_A" in key)
    tensors[some.replace("layers.0", "layers.7")] = torch.zeros(2)


@pytest.mark.parametrize(
    ("names", "change", "reason"),
    [
        (EXPERTS[:3], drop_expert, "adapter 'expert_1' is missing"),
        (EXPERTS[:3], drop_router, r"moe_router.* of adapter 'expert_\d' is missing"),
        (("default",), drop_router, "moe_router.* of adapter 'default' is missing"),
        (EXPERTS[:3], add_key, "layers.7.* has no place in the model"),
        (("default",), add_key, "layers.7.* has no place in the model"),
    ],
    ids=["expert", "router", "router-default", "extra", "extra-default"],
)
def test_a_mismatched_checkpoint_is_refused_with_the_reason(tmp_path, names, change, reason):
    trained(names).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=reason):
        PeftModel.from_pretrained(base_model(), tmp_path)
    model = trained(names)
    model.set_expert_maturity(0, 1.0)
    before = adapter_state(model)
    with pytest.raises(ValueError, match=reason):
        model.load_adapter(tmp_path, names[0])
    assert_same_state(adapter_state(model), before)
    assert list(model.peft_config) == list(names)


@pytest.mark.parametrize("names", [("default",), EXPERTS[:3]], ids=["default", "experts"])
def test_another_base_is_refused(tmp_path, names):
    trained(names).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \[.*\], the model \["):
        PeftModel.from_pretrained(base_model(hidden_size=32), tmp_path)


@pytest.mark.parametrize("names", [("default",), EXPERTS[:3]], ids=["default", "experts"])
@pytest.mark.parametrize("size", [0, 100, -10], ids=["empty", "header", "tail"])
def test_a_truncated_file_is_refused(tmp_path, names, size):
    trained(names).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged or truncated"):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_a_failed_load_adds_no_adapter(tmp_path):
    trained(EXPERTS[:3]).save_pretrained(tmp_path)
    damage(tmp_path, drop_expert)
    model = trained()
    before = logits(model)
    with pytest.raises(ValueError, match="expert_1"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("names", [("default",), EXPERTS[:3]], ids=["default", "experts"])
def test_a_crash_while_saving_leaves_the_previous_save(tmp_path, monkeypatch, names):
    folder = tmp_path / "adapter"
    model = trained(names)
    model.save_pretrained(folder)
    saved = {path: path.read_bytes() for path in folder.rglob("*")}
    expected = logits(model)

    def crash(tensors, filename, **kwargs):
        Path(filename).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "save_file", crash)
    model.set_expert_maturity(0, 1.0)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*")} == saved
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), folder)), expected)


def test_bad_targets_of_a_save_are_named(tmp_path):
    model = trained(EXPERTS[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    with pytest.raises(ValueError, match="expert_9"):
        model.save_pretrained(tmp_path / "out", selected_adapters=["expert_9"])
    assert not (tmp_path / "out").exists()


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base_model(), tmp_path / "nowhere")


def test_the_index_names_adapters_in_expert_order(tmp_path):
    trained(EXPERTS).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [entry["name"] for entry in saved["adapters"]] == list(EXPERTS)
    assert saved["peft_type"] == "MOELORA"
