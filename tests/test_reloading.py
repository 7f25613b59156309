"""Where a mixture is saved to and loaded from: precisions, the folder one is in, the hub."""

import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_attached_router_files import Gate
from test_persistence import IDS, adapter_state, assert_same_state, base_model, config, logits, trained

NAMES = pytest.mark.parametrize(
    "names", [("default",), ("skills",), ("expert_0", "expert_1", "expert_2")], ids=" ".join
)


def on_half_base(names, **options):
    base = base_model().to(torch.bfloat16)
    model = get_peft_model(base, config(), adapter_name=names[0], **options)
    for name in names[1:]:
        model.add_adapter(name, config(), **options)
    model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.train()(input_ids=IDS, labels=IDS)
    return model.eval()


def factor_dtypes(model):
    return {p.dtype for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


@NAMES
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_float32_adapters_on_a_half_precision_base_stay_what_they_were(tmp_path, names, low_cpu_mem_usage):
    model = on_half_base(names)
    assert factor_dtypes(model) == {torch.float32}
    model.save_pretrained(tmp_path)
    base = base_model().to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(logits(loaded), logits(model))
    other = get_peft_model(base_model().to(torch.bfloat16), config(), adapter_name="other")
    other.load_adapter(tmp_path, names[0], is_trainable=True)
    kept = {name: tensor for name, tensor in adapter_state(other).items() if ".other." not in name}
    assert_same_state(kept, adapter_state(model))


@NAMES
def test_half_precision_adapters_stay_half_where_that_is_asked_for(tmp_path, names):
    model = on_half_base(names, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert factor_dtypes(loaded) == {torch.bfloat16}
    assert_same_state(adapter_state(loaded), adapter_state(model))


@NAMES
def test_the_folder_one_is_in_can_be_saved_to(tmp_path, names, monkeypatch):
    model, folder = trained(names), tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for place in (".", os.path.join("..", "here"), str(folder)):
        model.save_pretrained(place)
        assert torch.equal(logits(PeftModel.from_pretrained(base_model(), place)), logits(model))
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.glob(".*"))


def test_nothing_is_moved_between_file_systems(tmp_path, monkeypatch):
    """The folder may be a volume: renaming into it works from inside alone."""
    folder, rename = tmp_path / "volume", os.replace
    folder.mkdir()

    def only_inside(source, target):
        assert folder in type(folder)(source).parents, source
        rename(source, target)

    monkeypatch.setattr(os, "replace", only_inside)
    trained().save_pretrained(folder)
    assert (folder / "adapter_config.json").exists()


@NAMES
def test_an_attached_router_comes_from_the_hub_too(tmp_path, names):
    snapshot = tmp_path / "models--me--mixture" / "snapshots" / ("0" * 40)
    (tmp_path / "models--me--mixture" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--mixture" / "refs" / "main").write_text("0" * 40)
    model = trained(names)
    model.save_pretrained(snapshot)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    plain = PeftModel.from_pretrained(base_model(), "me/mixture", **options)
    assert torch.equal(logits(plain), logits(model))
    model.attach_router(Gate())
    model.save_pretrained(snapshot)
    loaded = PeftModel.from_pretrained(base_model(), "me/mixture", router=Gate(), **options)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), logits(plain))
