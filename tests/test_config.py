"""MoELoraConfig: defaults, rules, refusals, round trips."""

import dataclasses
import warnings

import pytest
from peft import LoraConfig, PeftConfig, PeftType

from moelora import MoELoraConfig
from moelora.config import MIXTURE_FIELDS, count_experts, storage_config
from moelora.presets import PRESETS

DEFAULTS = {
    "use_moe_routing": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "router_hidden_size": None,
    "router_aux_loss_coef": 0.01,
    "router_temperature": 2.0,
    "router_type": "learned_with_maturity",
    "expert_capacity_factor": 1.25,
    "expert_dropout": 0.0,
    "load_balance_loss_type": "aux_loss",
    "router_scope": "block",
    "domain_window": 64,
}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("field", "value"), DEFAULTS.items())
def test_defaults(field, value):
    assert getattr(MoELoraConfig(), field) == value


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say_and_give_way(name):
    config = MoELoraConfig.preset(name, target_modules="all-linear")
    assert PRESETS[name].items() <= vars(config).items() and config.target_modules == "all-linear"
    assert MoELoraConfig.preset(name, r=3).r == 3 != PRESETS[name]["r"]


def test_a_preset_says_what_it_sets_where_an_option_contradicts_it():
    with pytest.raises(
        ValueError, match=r"`top_k_experts` \(16\) exceeds.*preset 'multi-domain' sets r=4.*top_k_experts=16"
    ):
        MoELoraConfig.preset("multi-domain", num_experts=4)


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"`preset` \('multi'\) is not known; choose one of multi-domain, mergeable, continual"
    ):
        MoELoraConfig.preset("multi")
    with pytest.raises(ValueError, match=r"\['continual'\]"):
        MoELoraConfig.preset(["continual"])


def test_identity():
    config = MoELoraConfig()
    assert isinstance(config, LoraConfig) and config.peft_type is PeftType.MOELORA and config.peft_type == "MOELORA"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("use_moe_routing", value) for value in (1, "yes", None)],
        *[("num_experts", value) for value in (1, 0, -2, 2.0, "4", None, True)],
        *[("top_k_experts", value) for value in (0, -1, 5, 1.5, "2", None, True)],
        *[("lora_dropout", value) for value in (3, 1.0, -0.1, NAN, "0.1")],
        *[("router_hidden_size", value) for value in (0, -1, 8.0, "8", True)],
        *[("router_aux_loss_coef", value) for value in (-0.01, NAN, INF, None, "0.1", True)],
        *[("router_temperature", value) for value in (0, -1.0, NAN, INF, None, "2")],
        *[("router_type", value) for value in ("dense", None, 3, ["learned"])],
        *[("expert_capacity_factor", value) for value in (0, -1.25, NAN, INF, "1")],
        *[("expert_dropout", value) for value in (1, 1.0, -0.1, NAN, None, "0")],
        *[("load_balance_loss_type", value) for value in ("aux", None)],
        *[("router_scope", value) for value in ("layer", None)],
        *[("maturity_tokens", value) for value in (0, -5, 1.5, None)],
        *[("routing_scale", value) for value in (0, -1, NAN, INF, None)],
        *[("domain_window", value) for value in (0, -1, 1.5, "64", True, 2**31)],
    ],
    ids=str,
)
def test_violation_names_field_value_and_fix(field, value):
    with pytest.raises(ValueError) as raised:
        MoELoraConfig(**{field: value})
    message = str(raised.value)
    assert f"`{field}`" in message and str(value) in message
    assert any(verb in message for verb in ("pass ", "choose ", "lower ", "raise ")), message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts", 2),
        ("top_k_experts", 1),
        ("top_k_experts", 4),
        ("lora_dropout", 0),
        ("router_hidden_size", 1),
        ("router_aux_loss_coef", 0),
        ("router_temperature", 1e-3),
        ("expert_capacity_factor", None),
        ("expert_dropout", 0.99),
        ("maturity_tokens", 1),
        ("domain_window", 1),
        ("domain_window", None),
        *[("router_type", kind) for kind in ("learned", "learned_with_maturity", "fixed")],
        *[("load_balance_loss_type", kind) for kind in ("aux_loss", "z_loss", "switch")],
        *[("router_scope", scope) for scope in ("block", "model", "module")],
    ],
)
def test_edges_are_valid(field, value):
    assert getattr(MoELoraConfig(**{field: value}), field) == value


def test_top_k_exceeding_experts():
    message = r"`top_k_experts` \(5\) exceeds `num_experts` \(4\); lower `top_k_experts`"
    with pytest.raises(ValueError, match=message):
        MoELoraConfig(top_k_experts=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("ensure_weight_tying", True),
        ("layer_replication", [(0, 2), (1, 2)]),
        ("alora_invocation_tokens", [1, 2]),
        *[
            ("init_lora_weights", kind)
            for kind in ("pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "orthogonal")
        ],
    ],
    ids=str,
)
def test_lora_options_a_mixture_cannot_honour(field, value):
    options = {field: value}
    if value == "loftq":
        options["loftq_config"] = {"loftq_bits": 4}
    with pytest.raises((ValueError, ImportError)) as raised:
        MoELoraConfig(**options)
    if isinstance(raised.value, ImportError):
        pytest.skip("LoraConfig itself needs a package for this")
    assert f"`{field}`" in str(raised.value) and "cannot be honoured by a mixture" in str(raised.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = MoELoraConfig(use_moe_routing=False, **options)
    assert getattr(plain, field) == getattr(LoraConfig(**options), field)


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("target_parameters", "experts.down_proj", "must be a list of strings"),
        ("kasa_config", 7, "must be a `KasaConf"),
    ],
)
def test_an_option_of_another_type_than_pefts_is_pefts_own_type_of_error(field, value, says, routed):
    """Whoever catches what LoraConfig raises catches it here; a file of such content is bad content, a ValueError."""
    for kind, own in ((LoraConfig, {}), (MoELoraConfig, {"use_moe_routing": routed})):
        with pytest.raises(TypeError, match=says):
            kind(**own, **{field: value})
    with pytest.raises(ValueError, match=says):
        MoELoraConfig.from_peft_type(peft_type="MOELORA", use_moe_routing=routed, **{field: value})


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initialisations_that_keep_the_base(init):
    assert MoELoraConfig(init_lora_weights=init).init_lora_weights == init


def test_without_routing_expert_rules_relax():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MoELoraConfig(use_moe_routing=False, num_experts=1, top_k_experts=9)
    assert config.num_experts == 1


@pytest.mark.parametrize(("field", "value"), [("num_experts", 8), ("router_type", "fixed"), ("expert_dropout", 0.1)])
def test_without_routing_mixture_fields_warn(field, value):
    with pytest.warns(UserWarning, match=rf"use_moe_routing=False.*`{field}`"):
        MoELoraConfig(use_moe_routing=False, **{field: value})


def test_without_routing_defaults_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoELoraConfig(use_moe_routing=False, r=4)


def test_every_mixture_field_has_help():
    fields = {field.name: field for field in dataclasses.fields(MoELoraConfig)}
    assert set(DEFAULTS) <= MIXTURE_FIELDS
    assert not [name for name in MIXTURE_FIELDS if not fields[name].metadata.get("help")]


def test_round_trip(tmp_path):
    config = MoELoraConfig(
        r=3, lora_alpha=5, target_modules=["q", "v"], num_experts=7, top_k_experts=3, router_hidden_size=16,
        router_type="learned", expert_capacity_factor=None, router_scope="module", maturity_tokens=12,
        routing_scale=2.5, rank_pattern={"q": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    for loaded in (MoELoraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MoELoraConfig
        assert loaded.to_dict() == config.to_dict() | {"inference_mode": loaded.inference_mode}
    rebuilt = MoELoraConfig(**{k: v for k, v in config.to_dict().items() if k != "peft_type"})
    assert rebuilt.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("default", 4),
        ("expert_0", 1),
        ("expert_12", 1),
        ("expert_", 4),
        ("expert_a", 4),
        ("my_expert_0", 4),
        ("expert_0_b", 4),
    ],
)
def test_only_expert_i_is_one_expert(name, experts):
    assert count_experts(name, MoELoraConfig()) == experts


@pytest.mark.parametrize("use_rslora", [False, True])
def test_storage_keeps_the_scaling_of_one_expert(use_rslora):
    config = MoELoraConfig(r=3, lora_alpha=5, rank_pattern={"q": 2}, alpha_pattern={"v": 7}, use_rslora=use_rslora)
    stored = storage_config(config, 4)
    power = 0.5 if use_rslora else 1

    def scaling(c):
        return c.lora_alpha / c.r**power

    assert stored.r == 12 and stored.rank_pattern == {"q": 8}
    assert scaling(stored) == pytest.approx(scaling(config))
    assert stored.alpha_pattern["v"] / stored.r**power == pytest.approx(7 / 3**power)
    assert config.r == 3 and config.rank_pattern == {"q": 2} and config.alpha_pattern == {"v": 7}
