"""Any configuration and any name makes a mixture that runs and comes back exactly, or is refused by name."""

import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from strategies import at_most, examples, words
from test_persistence import IDS, adapter_state, assert_same_state, base_model, logits, trained
from test_persistence import config as tiny_config

from moelora import MoELoraConfig
from moelora.config_rules import LORA_RULES, MIXTURE_RULES

SECONDS = 10
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, -1, 0.5, 1.0, 1e-30, 1e-300, 1e300, 1e39, float("nan"), float("inf"), 2**31, 10**400]
)
GOOD = {
    "r": st.integers(1, 3),
    "target_modules": st.sampled_from(["all-linear", ["q_proj"], r".*\.(up|down)_proj", "(", ["x"], "(a+)+$"]),
    "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", ".*", "(", r"layers\.0\..*"]), st.integers(0, 3)),
    "alpha_pattern": st.dictionaries(st.sampled_from(["v_proj", ".*", "("]), NUMBERS),
    "num_experts": st.integers(0, 5),
    "top_k_experts": st.integers(0, 5),
    "router_hidden_size": st.none() | st.integers(0, 4),
    "router_type": st.sampled_from(["learned", "learned_with_maturity", "fixed", "x"]),
    "router_scope": st.sampled_from(["block", "model", "module", "x"]),
    "load_balance_loss_type": st.sampled_from(["aux_loss", "z_loss", "switch", ""]),
    "expert_capacity_factor": st.none() | NUMBERS,
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "modules_to_save": st.sampled_from([None, ["lm_head"], ["norm"]]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa"]),
}
NAMES = sorted({rule.name for rule in (*LORA_RULES, *MIXTURE_RULES)} - {"checkpoint", "use_moe_routing"} | set(GOOD))
ANY = st.none() | st.booleans() | NUMBERS | words | st.lists(words | NUMBERS, max_size=2)


def field(name):
    usual = GOOD.get(name, st.booleans() if name.startswith("use_") or name == "fan_in_fan_out" else NUMBERS)
    return st.one_of(*[usual] * 9, ANY)


fields = st.lists(st.sampled_from(NAMES), max_size=4, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: field(name) for name in names})
)


def assert_comes_back(model, folder):
    model.save_pretrained(folder, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base_model(), folder)
    assert_same_state(adapter_state(loaded), adapter_state(model))
    assert torch.equal(logits(loaded), logits(model.eval()))
    shutil.rmtree(folder)


def test_no_token_at_all_to_train_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`trainable_token_indices` \(\[\]\) is not valid"):
        tiny_config(trainable_token_indices=[])


@given(fields)
@examples(0.6)
def test_a_configuration_works_or_is_refused_by_name(tmp_path_factory, options):
    with at_most(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = MoELoraConfig(**{"r": 2, "target_modules": "all-linear", "num_experts": 3} | options)
        except ValueError as error:
            assert any(f"`{name}`" in str(error) for name in NAMES), error
            return
        try:
            model = get_peft_model(base_model(), config)
        except ValueError:
            return
        output = model.train()(input_ids=IDS, labels=IDS)
        output.loss.backward()
        folder = tmp_path_factory.mktemp("made") / "adapter"
        state = model.state_dict()
        if all(tensor.isfinite().all() for key, tensor in state.items() if "lora_" in key):
            assert_comes_back(model, folder)


names = st.text(min_size=0, max_size=8) | st.sampled_from(
    [part for key in base_model().state_dict() for part in key.split(".")]
).flatmap(lambda part: st.sampled_from([part, part.upper(), part + "x", part[:-1], "lora_" + part]))


@given(st.lists(names, min_size=1, max_size=2, unique=True))
@examples(0.4, in_make_test=0.15)
def test_a_name_comes_back_or_is_refused_when_the_adapter_is_made(tmp_path_factory, given_names):
    with at_most(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = trained(tuple(given_names))
        except ValueError as error:
            assert "an adapter cannot be named" in str(error)
            return
        assert_comes_back(model, tmp_path_factory.mktemp("named") / "adapter")
        first = get_peft_model(base_model(), tiny_config(), adapter_name=given_names[0])
        assert first.active_adapters == given_names[:1]
