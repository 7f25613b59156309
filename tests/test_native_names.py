"""`"all-linear"`, and names of transformers 4, on bases whose linears became parameters; beside plain LoRA."""

import warnings

import pytest
import torch
from native import EXPERTS, FAMILIES, batch, native_model, ours, peft_lora
from peft import PeftModel, get_peft_model

from moelora import MoELoraConfig

CONVERTED = [name for name, family in FAMILIES.items() if family.is_converted]
V4_NAMES = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}


def factors(model):
    """The factors of parameters, by name, with their shapes."""
    return {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}


def warned_of(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make()
    return model, [str(warning.message) for warning in caught if "stay frozen" in str(warning.message)]


@pytest.mark.parametrize("family", CONVERTED)
def test_all_linear_reaches_what_it_reaches_with_pefts_lora(family):
    plain = peft_lora(native_model(family), target_modules="all-linear")
    # One router for each module: multi-head latent attention's kv_b_proj does not read the block's tokens.
    model, messages = warned_of(lambda: ours(native_model(family), target_modules="all-linear", router_scope="module"))
    of_parameters = {n: s for n, s in factors(plain).items() if ".experts." in n or ".gate." in n}
    assert of_parameters or family == "qwen2_moe"  # whose names PEFT knows, and turns for others alone
    assert of_parameters.items() <= factors(model).items()
    assert any(".mlp.experts." in name for name in factors(model))
    # PEFT leaves out shared experts and dense blocks, whose linears have the names of native experts' (`gate_proj`).
    linears = {n for n, m in native_model(family).named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in factors(model)}
    assert linears <= adapted
    assert not messages
    assert model(**batch(labels=False)).logits.isfinite().all()


@pytest.mark.parametrize("family", V4_NAMES)
def test_names_of_transformers_4(family):
    plain = peft_lora(native_model(family), target_modules=["q_proj", *V4_NAMES[family]])
    model, messages = warned_of(lambda: ours(native_model(family), target_modules=["q_proj", *V4_NAMES[family]]))
    native = {n: s for n, s in factors(model).items() if "experts" in n}
    assert native == {n: s for n, s in factors(plain).items() if "experts" in n} != {}
    config = model.peft_config["default"]
    assert config.target_parameters == sorted(EXPERTS) and not messages
    assert config.rank_pattern == plain.peft_config["default"].rank_pattern


@pytest.mark.parametrize(
    "pattern",
    [
        r".*experts.*\.(w1|w2|w3)",
        r"model\.layers\.\d+\.mlp\.experts\.\d+\.w[123]",
        r".*block_sparse_moe\.experts\.\d+\.w[123]",
    ],
)
def test_patterns_of_transformers_4(pattern):
    model, messages = warned_of(lambda: ours(native_model("mixtral"), target_modules=rf".*\.q_proj|{pattern}"))
    assert model.peft_config["default"].target_parameters == sorted(EXPERTS) and not messages


def test_some_blocks_alone():
    model, messages = warned_of(
        lambda: ours(native_model("mixtral"), target_modules=["q_proj", "w1", "w2", "w3"], layers_to_transform=[1])
    )
    assert not messages
    wanted = [f"model.layers.1.{name}" for name in sorted(EXPERTS)]
    assert model.peft_config["default"].target_parameters == wanted
    assert all(".layers.1." in name for name in factors(model))


def test_excluded_experts_stay_frozen():
    model, messages = warned_of(
        lambda: ours(
            native_model("mixtral"),
            target_modules="all-linear",
            exclude_modules=r".*\.(experts|gate)\b.*",
            lora_dropout=0.1,
        )
    )
    assert not [name for name in factors(model) if ".mlp." in name]
    assert not messages  # they were left out on purpose


def test_half_of_what_was_fused_is_refused():
    base = native_model("mixtral")
    with pytest.raises(ValueError, match=r"has w1 and not w3 of `model\.layers\.0\.mlp\.experts`"):
        ours(base, target_modules=["q_proj", "w1"])
    assert not [name for name, _ in base.named_modules() if "lora" in name]


def test_shared_experts_can_be_named_alone():
    """By a name that no native expert had; PEFT's own conversion would take them for these."""
    model = ours(native_model("qwen2_moe"), target_modules=["shared_expert.gate_proj"])
    assert factors(model) and all(".shared_expert.gate_proj." in name for name in factors(model))


def test_converted_names_are_saved_and_loaded(tmp_path):
    model = ours(native_model("mixtral"), target_modules="all-linear")
    expected = model(**batch(labels=False)).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(native_model("mixtral"), tmp_path)
    assert torch.equal(again(**batch(labels=False)).logits, expected)
    assert factors(again) == factors(model)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "experts.gate_proj"], r".*(q_proj|experts\.0\.gate_proj)"], ids=str
)
def test_experts_that_stay_frozen_are_named_with_what_adapts_them(targets):
    """gpt-oss was never anything but fused, so that no name of transformers 4 reaches its experts."""
    model, messages = warned_of(lambda: ours(native_model("gpt_oss"), target_modules=targets))
    (message,) = messages
    assert "model.layers.0.mlp.experts, model.layers.1.mlp.experts stay frozen" in message
    field = message.rpartition("pass ")[2]
    assert field == f"target_parameters={sorted(EXPERTS)}"
    pasted = eval(f"dict({field})")
    _, messages = warned_of(lambda: ours(native_model("gpt_oss"), target_modules=targets, **pasted))
    assert not messages
    assert not [name for name in factors(model) if "experts" in name]


def test_nothing_is_said_where_nobody_meant_experts():
    for targets in (["q_proj", "v_proj"], None, ["mlp.experts"]):
        _, messages = warned_of(lambda targets=targets: ours(native_model("mixtral"), target_modules=targets))
        assert not messages


def test_one_expert_of_a_mixture_leaves_them(tmp_path):
    """Built expert by expert, no part of a parameter could be weighed by our router."""
    config = MoELoraConfig(r=2, target_modules="all-linear", num_experts=2)
    model, messages = warned_of(lambda: get_peft_model(native_model("mixtral"), config, "expert_0"))
    assert len(messages) == 1 and "name ['mlp.experts'] in `target_modules` too" in messages[0]
    model.add_adapter("expert_1", config)
    assert model.base_model.routing.num_experts == 2
    assert not [name for name in factors(model) if ".mlp." in name]


def test_grown_experts_leave_them():
    from moelora.experts import grow

    model = ours(native_model("mixtral"), target_modules=["q_proj", "w1", "w2", "w3"])
    before = {name for name in factors(model) if "experts" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name = grow(model, num_experts=2)
    grown = {each for each in factors(model) if f".{name}." in each}
    assert len(grown) == 4 and all("q_proj" in each for each in grown)
    assert {each for each in factors(model) if "experts" in each} == before
    assert model(**batch(labels=False)).logits.isfinite().all()


def test_plain_lora_under_our_name_reaches_them_too():
    model = ours(
        native_model("mixtral"), target_modules="all-linear", use_moe_routing=False, num_experts=4,
        router_type="learned_with_maturity",
    )  # fmt: skip
    plain = peft_lora(native_model("mixtral"), target_modules="all-linear")
    assert factors(model) == factors(plain)
    torch.testing.assert_close(model(**batch(labels=False)).logits, plain(**batch(labels=False)).logits)
