"""`modules_to_save` beside targets in the same modules, and beside plain LoRA of the same PEFT.

What lies in a module that is trained whole is not adapted. Where PEFT adapts it all the same and fails when it has
changed the model, or when it loads what it saved, a mixture is refused by name before anything is changed.
"""

import copy

import pytest
import torch
from helpers import llama
from native import EXPERTS, batch, native_model, noisy
from peft import LoraConfig, PeftModel, get_peft_model
from test_refused_wrap import traces

from moelora import MoELoraConfig

Q = ["q_proj"]
BASES = {"llama": llama, "qwen3_moe": lambda: native_model("qwen3_moe")}


def config(kind, options):
    own = {"num_experts": 2} if kind is MoELoraConfig else {}
    return kind(r=2, **own, **copy.deepcopy(options))


def trained_whole(model):
    """Names of the base's parameters that are trained, as copies."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}


def save_and_load(model, base, folder, name=""):
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(BASES[base](), folder / name).eval()


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        ("qwen3_moe", {"target_modules": Q, "modules_to_save": ["mlp.experts"]}, 4),
        ("qwen3_moe", {"target_modules": [*Q, "experts"], "modules_to_save": ["mlp"]}, 6),
        ("qwen3_moe", {"target_modules": Q, "target_parameters": EXPERTS, "modules_to_save": ["mlp.gate"]}, 2),
        ("llama", {"target_modules": [*Q, "up_proj"], "modules_to_save": ["mlp"]}, 6),
        ("llama", {"target_modules": [*Q, "up_proj"], "modules_to_save": ["up_proj"]}, 2),
    ],
    ids=str,
)
def test_what_lora_can_do_is_the_same_here(base, options, expected, tmp_path):
    lora, ours = (get_peft_model(BASES[base](), config(kind, options)) for kind in (LoraConfig, MoELoraConfig))
    assert trained_whole(ours) == trained_whole(lora) and len(trained_whole(ours)) == expected
    with torch.no_grad():
        for parameter in noisy(ours).parameters():
            if parameter.requires_grad:
                parameter += 0.1
    inputs = batch()
    loaded = save_and_load(ours, base, tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, ours(**inputs).logits, rtol=0, atol=0)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(**inputs).logits, BASES[base]().eval()(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("module", ["mlp", "mlp.experts", "experts"])
def test_all_linear_leaves_native_experts_out_that_are_trained_whole(module, tmp_path, recwarn):
    """As it leaves out linears there; of parameters PEFT's LoRA does not see it, and fails."""
    options = {"target_modules": "all-linear", "modules_to_save": [module]}
    with pytest.raises((TypeError, KeyError)):
        save_and_load(get_peft_model(native_model("qwen3_moe"), config(LoraConfig, options)), "qwen3_moe", tmp_path)
    model = noisy(get_peft_model(native_model("qwen3_moe"), config(MoELoraConfig, options)))
    assert not [name for name, _ in model.named_parameters() if "experts" in name and "lora_" in name]
    assert len([name for name in trained_whole(model) if ".experts." in name]) == 4
    assert not [warning for warning in recwarn if "stay frozen" in str(warning.message)]
    inputs = batch()
    loaded = save_and_load(model, "qwen3_moe", tmp_path / "ours")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("base", "options", "named"),
    [
        ("qwen3_moe", {"target_parameters": EXPERTS, "modules_to_save": ["mlp.experts"]}, r"experts` whole, and `targ"),
        ("qwen3_moe", {"target_parameters": EXPERTS, "modules_to_save": ["mlp"]}, r"`model.layers.\d.mlp` whole"),
        ("llama", {"modules_to_save": ["proj"]}, r"\('proj'\) .*self_attn.q_proj` whole, and `target_modules` adapts"),
        ("llama", {"modules_to_save": ["attn"]}, r"\('attn'\) .*`model.layers.0.self_attn` whole.*attn.q_proj` in it"),
    ],
    ids=str,
)
def test_what_lora_fails_at_is_refused(base, options, named, tmp_path):
    options = {"target_modules": Q} | options
    with pytest.raises((TypeError, KeyError)):
        save_and_load(get_peft_model(BASES[base](), config(LoraConfig, options)), base, tmp_path)
    model = BASES[base]()
    before = traces(model)
    with pytest.raises(ValueError, match=f"`modules_to_save` .*{named}"):
        get_peft_model(model, config(MoELoraConfig, options))
    assert traces(model) == before


FIRST, SECOND = {"target_modules": [*Q, "up_proj"]}, {"target_modules": Q}
PAIRS = {"target_modules": Q, "target_parameters": ["experts.gate_up_proj"]}


@pytest.mark.parametrize(
    ("base", "first", "second", "named"),
    [
        ("llama", FIRST, SECOND | {"modules_to_save": ["mlp"]}, r"of adapter 'b' .* and another adapter adapts"),
        ("llama", FIRST, SECOND | {"modules_to_save": ["up_proj"]}, r"of adapter 'b' .* and another adapter adapts"),
        ("llama", SECOND | {"modules_to_save": ["mlp"]}, FIRST, r"adapter 'default',.* with `exclude_modules`"),
        (
            "llama",
            SECOND | {"modules_to_save": ["up_proj"]},
            FIRST,
            r"adapter 'default',.* with `exclude_modules`",
        ),
        ("qwen3_moe", PAIRS, SECOND | {"modules_to_save": ["mlp"]}, r"another adapter adapts `.*experts` in it"),
        ("qwen3_moe", SECOND | {"modules_to_save": ["mlp"]}, PAIRS, r"`target_parameters` of adapter 'b' is for"),
    ],
    ids=str,
)
def test_an_adapter_is_refused_beside_one_that_it_could_not_be_saved_with(base, first, second, named, tmp_path):
    lora = get_peft_model(BASES[base](), config(LoraConfig, first))
    with pytest.raises((TypeError, KeyError, ValueError)):
        lora.add_adapter("b", config(LoraConfig, second))
        lora.set_adapter("b")
        save_and_load(lora, base, tmp_path, "b")
    model = get_peft_model(BASES[base](), config(MoELoraConfig, first))
    before = traces(model)
    with pytest.raises(ValueError, match=named):
        model.add_adapter("b", config(MoELoraConfig, second))
    assert (traces(model), list(model.peft_config)) == (before, ["default"])


def test_all_linear_beside_an_adapter_that_trains_native_experts_whole(tmp_path):
    """They are not there to be adapted: "all-linear" is for what is."""
    model = get_peft_model(native_model("qwen3_moe"), config(MoELoraConfig, SECOND | {"modules_to_save": ["experts"]}))
    model.add_adapter("b", config(MoELoraConfig, {"target_modules": "all-linear"}))
    model.set_adapter("b")
    assert not [name for name, _ in noisy(model).named_parameters() if "experts" in name and "lora_" in name]
    inputs = batch()
    loaded = save_and_load(model, "qwen3_moe", tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
