"""What cannot become an expert is refused, and the model stays as it was."""

import json

import pytest
from helpers import ARCHITECTURES, mixture_of
from helpers import llama as llama_with
from loras import KINDS, save_lora
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from moelora.experts import LoraError, build, from_lora


def llama():
    return ARCHITECTURES["llama"].build()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` (['lm_head'])"),
        ({"use_dora": True}, "`use_dora` (True)"),
        ({"bias": "all"}, "`bias` ('all')"),
        ({"lora_bias": True}, "`lora_bias` (True)"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` ('pissa')"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no factor of a linear layer"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_carry_over_is_named(tmp_path, options, named):
    save_lora(tmp_path, **({"target_modules": ["q_proj"]} | options))
    model = mixture_of("llama")
    with pytest.raises(LoraError) as stop:
        from_lora(model, tmp_path, "new")
    assert named in str(stop.value)
    assert list(model.peft_config) == ["default"]


def test_other_adapters_are_sent_elsewhere(tmp_path):
    mixture_of("llama").save_pretrained(str(tmp_path / "mixture"))
    with pytest.raises(LoraError, match="a mixture already"):
        from_lora(mixture_of("llama"), tmp_path / "mixture", "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraError, match=r"no readable adapter_config\.json"):
        from_lora(mixture_of("llama"), tmp_path / "empty", "new")


def test_another_base_model_is_told_by_its_shapes(tmp_path):
    save_lora(tmp_path, base=llama_with(hidden_size=16), **KINDS["plain"])
    with pytest.raises(LoraError, match=r"was not trained on this model: `model\.layers\.0.* is 32 to"):
        build(llama(), {"a": tmp_path})
    gpt2 = ARCHITECTURES["gpt2"].build()
    with pytest.raises(LoraError, match=r"it has no linear `model\.layers"):
        build(gpt2, {"a": tmp_path})
    assert not any("lora" in name for name, _ in gpt2.named_modules())


def test_damaged_files_are_refused(tmp_path):
    folder = save_lora(tmp_path, **KINDS["plain"])
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(LoraError, match="incomplete"):
        build(llama(), {"a": folder})
    save_file(tensors, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(LoraError, match="rank 4 in the weights and 3 by the configuration"):
        from_lora(mixture_of("llama"), folder, "new")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(LoraError, match="damaged or truncated"):
        build(llama(), {"a": folder})
    weights.unlink()
    with pytest.raises(LoraError):
        build(llama(), {"a": folder})


def test_arguments_out_of_range_are_refused(tmp_path):
    folder = save_lora(tmp_path, **KINDS["plain"])
    model = mixture_of("llama")
    for arguments, message in (
        (((llama(), {"a": folder}, "oracle"), {}), "is not one of arrow"),
        (((llama(), {}, "arrow"), {}), "at least one"),
        (((llama(), {"a": folder}), {"top_k": 2}), r"`top_k` \(2\)"),
        (((llama(), {"a.b": folder}), {"top_k": 1}), "cannot be named"),
        (((llama(), {"a": folder}, "prototype"), {"top_k": 1}), "`examples`"),
    ):
        with pytest.raises(LoraError, match=message):
            build(*arguments[0], **arguments[1])
    with pytest.raises(LoraError, match="already"):
        from_lora(model, folder, "default")
    with pytest.raises(LoraError, match="router_scope='block'"):
        from_lora(model, folder, "new", router="arrow")
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(LoraError, match="does not hold"):
        from_lora(plain, folder, "new")
