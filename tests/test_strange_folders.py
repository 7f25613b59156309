"""What a stranger's adapter folder must not do: to the API and to the commands that read adapters."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_persistence import EXPERTS, adapter_state, assert_same_state, base_model, logits, trained

from moelora.cli.commands import main
from moelora.files.generation import PENDING, checksum
from moelora.schema import UserError
from moelora.storage.lora_file import LoraError, read_lora
from moelora.storage.stored import read_mixture

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = "base_model.model.model.layers.0.self_attn.q_proj"
ROUTER = "base_model.model.model.layers.1.moe_router.lora_router"


def with_tensors(folder, change, *, seal):
    """Change the tensors; seal: as if they had been saved so, else as a save of old, which has no checksums."""
    settings = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    prefix = "" if LINEAR + ".lora_A.weight" in tensors else "expert_1/"
    change(tensors, prefix)
    metadata = {"format": "pt"} | ({"moelora_save": settings["checkpoint"]["id"]} if seal else {})
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    if seal:
        settings["checkpoint"]["files"][WEIGHTS] = checksum(load_file(folder / WEIGHTS))
    else:
        settings["checkpoint"] = None
    (folder / CONFIG).write_text(json.dumps(settings))


def integers(tensors, prefix):
    tensors[f"{prefix}{LINEAR}.lora_A.weight"] = torch.full_like(
        tensors[f"{prefix}{LINEAR}.lora_A.weight"], 10**9, dtype=torch.int32
    )


def float8(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_B.weight"
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)


def booleans(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"] = tensors[f"{prefix}{ROUTER}.weight"] > 0


def float_counters(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.tokens_per_expert"] = tensors[f"{prefix}{ROUTER}.tokens_per_expert"].float()


def negative_counters(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.tokens_per_expert"] -= 10**6


def too_mature(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.maturity"].fill_(5)


def less_than_new(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.maturity"].fill_(-3)


def beyond_float32(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = torch.full_like(tensors[key], 1e300, dtype=torch.float64)


def nan(tensors, prefix):
    tensors[f"{prefix}{LINEAR}.lora_B.weight"][0, 0] = torch.nan


def infinite(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"][0, 0] = -torch.inf


def two_infinities(tensors, prefix):
    tensors[f"{prefix}{ROUTER}.weight"][0, :2] = torch.tensor([torch.inf, -torch.inf])


def half(tensors, prefix):
    for key in [key for key in tensors if "layers.1" in key]:
        del tensors[key]


def half_a_linear(tensors, prefix):
    del tensors[f"{prefix}{LINEAR}.lora_B.weight"]


def no_router(tensors, prefix):
    for key in [key for key in tensors if key.startswith(prefix + ROUTER)]:
        del tensors[key]


def router_only(tensors, prefix):
    for key in [key for key in tensors if "lora_A" in key or "lora_B" in key]:
        del tensors[key]


def empty_factors(tensors, prefix):
    for side, shape in (("A", (0, 16)), ("B", (16, 0))):
        tensors[f"{prefix}{LINEAR}.lora_{side}.weight"] = torch.zeros(shape)


def empty_input(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = torch.zeros(tensors[key].shape[0], 0)


def flat(tensors, prefix):
    key = f"{prefix}{LINEAR}.lora_A.weight"
    tensors[key] = tensors[key].flatten()


def other_rank(tensors, prefix):
    for side in "AB":
        key = f"{prefix}{LINEAR}.lora_{side}.weight"
        tensors[key] = torch.cat([tensors[key]] * 2, dim="AB".index(side))


def other_experts(tensors, prefix):
    key = f"{prefix}{ROUTER}.weight"
    tensors[key] = torch.cat([tensors[key]] * 2)


def of_the_base(name):
    def change(tensors, prefix):
        tensors[f"{prefix}base_model.model.{name}"] = torch.zeros(16)

    change.__name__ = name
    return change


def embeddings(name):
    def change(tensors, prefix):
        tensors[f"{prefix}base_model.model.{name}"] = torch.zeros(40, 16)

    change.__name__ = name
    return change


TENSORS = [
    (integers, "holds int32, not float32"),
    (float8, "holds float8_e4m3fn, not float32"),
    (booleans, "holds bool, not float32"),
    (float_counters, "holds float32, not int64"),
    (negative_counters, "has negative numbers"),
    (too_mature, r"a maturity lies in \[0, 1\]"),
    (less_than_new, r"a maturity lies in \[0, 1\]"),
    (beyond_float32, "has numbers beyond float32"),
    (nan, "lora_B.weight` of .* is not finite"),
    (infinite, "weight` of .* is not finite"),
    (two_infinities, "weight` of .* is not finite"),
    (half_a_linear, "lacks half of|lora_B.weight' of adapter .* is missing"),
    (no_router, "no router|is missing"),
    (router_only, "lacks experts or routers|is missing"),
    (empty_factors, r"\[0, 16\] and|has shape \[0, 16\]"),
    (empty_input, r", 0\] and|has shape \[\d, 0\]"),
    (flat, r"the factors of|has shape"),
    (other_rank, r"not \[\d, in\] and|has shape"),
    (other_experts, r"has shape \[\d, 16\], the model \[\d, 16\]"),
    (of_the_base("model.norm.weight"), "is no part of a mixture|has no place in the model"),
    (of_the_base("model.layers.0.self_attn.q_proj.base_layer.weight"), "is no part of a mixture|has no place"),
    (of_the_base("model.layers.0.input_layernorm.weight"), "is no part of a mixture|has no place"),
]
WAYS = pytest.mark.parametrize(
    ("names", "seal"), [(("default",), True), (EXPERTS[:2], False)], ids=["default, new save", "experts, old save"]
)


def assert_refused_and_unchanged(folder, reason):
    with pytest.raises(ValueError, match=reason):
        PeftModel.from_pretrained(base_model(), folder)
    model = trained()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name in ("default", "another"):
        with pytest.raises(ValueError, match=reason):
            model.load_adapter(folder, name)
    assert list(model.peft_config) == ["default"]
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[key], state[key]) for key in state)


WAYS_OF_TENSORS = [("default", True, *case) for case in TENSORS] + [("experts", False, *case) for case in TENSORS[::4]]
"""The other way of saving has other names, for which a few cases are enough."""


@pytest.mark.parametrize(
    ("kind", "seal", "change", "reason"),
    WAYS_OF_TENSORS,
    ids=[f"{kind}-{change.__name__}" for kind, _, change, _ in WAYS_OF_TENSORS],
)
def test_tensors_that_are_none_of_a_mixtures_are_refused(tmp_path, capsys, kind, seal, change, reason):
    trained(("default",) if kind == "default" else EXPERTS[:2]).save_pretrained(tmp_path)
    with_tensors(tmp_path, change, seal=seal)
    assert_refused_and_unchanged(tmp_path, reason)
    with pytest.raises(UserError, match=reason):
        read_mixture(tmp_path)
    for command in (["inspect", str(tmp_path)], ["export", str(tmp_path), "--expert", "0", "--out", "out"]):
        assert main(command) == 2
        assert "Traceback" not in capsys.readouterr().err


@WAYS
@pytest.mark.parametrize("layer", ["lm_head.weight", "model.embed_tokens.weight"])
def test_embeddings_replace_the_bases_only_where_the_user_says_so(tmp_path, names, seal, layer):
    trained(names).save_pretrained(tmp_path)
    with_tensors(tmp_path, embeddings(layer), seal=seal)
    assert_refused_and_unchanged(tmp_path, f"{layer}' would replace the base model's own embeddings, for good")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, load_embedding_layers=True)
    assert loaded.get_base_model().get_parameter(layer).count_nonzero() == 0
    with pytest.raises(UserError, match="no part of its experts' factors"):
        raise_of_export(tmp_path)


def raise_of_export(folder):
    from moelora.experts.exporting import to_lora_mixture

    adapters = read_mixture(folder)
    try:
        to_lora_mixture(adapters, [1.0] * sum(adapter.num_experts for adapter in adapters))
    except ValueError as error:
        raise UserError(str(error)) from error


def test_embeddings_that_are_the_bases_own_load(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("lm_head" in key for key in load_file(tmp_path / WEIGHTS))
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))


def test_an_old_save_that_lacks_blocks_is_found_out_where_the_base_is_at_hand(tmp_path, capsys):
    """The files alone do not tell: a save of old says nothing of how much was saved."""
    base_model().save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    settings = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    (folder / CONFIG).write_text(json.dumps(settings))
    shutil.copytree(folder, tmp_path / "sealed")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    with_tensors(folder, half, seal=False)
    assert main(["inspect", str(folder)]) == 2
    assert "is missing" in capsys.readouterr().err
    assert main(["export", str(folder), "--expert", "0", "--out", str(tmp_path / "out")]) == 2
    assert "is missing" in capsys.readouterr().err
    save_file(load_file(folder / WEIGHTS), tmp_path / "sealed" / WEIGHTS, metadata={"format": "pt"})
    assert main(["inspect", str(tmp_path / "sealed")]) == 2
    assert "is damaged" in capsys.readouterr().err


# ---- configurations --------------------------------------------------------------------------------------------------


def entry(**changes):
    def change(settings):
        settings["adapters"][0] |= changes

    return change


def in_entry(**changes):
    def change(settings):
        settings["adapters"][0]["config"] |= changes

    return change


SETTINGS = [
    ({"r": "2"}, r"`r` \('2'\) is not valid"),
    ({"r": 0}, r"`r` \(0\) is not valid"),
    ({"r": 1e9}, r"`r` \(1000000000.0\) is not valid"),
    ({"r": 10**40}, r"`r` \(1000.*\) is not valid"),
    ({"r": [2]}, r"`r` \(\[2\]\) is not valid"),
    ({"lora_alpha": "4"}, r"`lora_alpha` \('4'\) is not valid"),
    ({"lora_alpha": None}, r"`lora_alpha` \(None\) is not valid"),
    ({"lora_alpha": float("nan")}, r"`lora_alpha` \(nan\) is not valid"),
    ({"lora_alpha": float("inf")}, r"`lora_alpha` \(inf\) is not valid"),
    ({"rank_pattern": [1]}, r"`rank_pattern` \(\[1\]\) is not valid"),
    ({"rank_pattern": {"q_proj": "x"}}, r"`rank_pattern`"),
    ({"rank_pattern": {"(": 2}}, r"`rank_pattern`"),
    ({"alpha_pattern": "x"}, r"`alpha_pattern`"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, r"`alpha_pattern`"),
    ({"target_modules": "("}, r"`target_modules` \('\('\) is not valid"),
    ({"target_modules": 7}, r"`target_modules` \(7\) is not valid"),
    ({"target_modules": [7]}, r"`target_modules` \(\[7\]\) is not valid"),
    ({"target_modules": ["nothing"]}, r"nothing"),
    ({"exclude_modules": "("}, r"`exclude_modules`"),
    ({"layers_pattern": "("}, r"`layers_pattern`"),
    ({"layers_to_transform": "x"}, r"`layers_to_transform`"),
    ({"bias": "x"}, r"`bias`"),
    ({"base_model_name_or_path": 7}, r"`base_model_name_or_path`"),
    ({"use_rslora": "yes"}, r"`use_rslora`"),
    ({"router_type": [1]}, r"`router_type`"),
    ({"router_scope": 1}, r"`router_scope`"),
    ({"router_temperature": 1e-300}, r"`router_temperature`"),
    ({"routing_scale": 1e300}, r"`routing_scale`"),
    ({"num_experts": 10**30}, r"`num_experts`"),
    ({"num_experts": 5}, r"has shape|the factors of"),
    ({"top_k_experts": 99}, r"`top_k_experts`"),
    ({"router_hidden_size": 2**40}, r"`router_hidden_size`"),
    ({"maturity_tokens": 10**400}, r"`maturity_tokens`"),
    ({"router_memory": -1}, r"`router_memory`"),
    ({"monteclora_config": {"": 1}}, r"MontecloraConfig|`monteclora_config`"),
    ({"peft_type": "LORA"}, r"peft_type|'LORA', not 'MOELORA'|damaged"),
    ({"peft_type": ["MOELORA"]}, r"`peft_type`"),
    ({"trainable_token_indices": ["x"]}, r"`trainable_token_indices`"),
    ({"trainable_token_indices": {"embed_tokens": [-1]}}, r"`trainable_token_indices`"),
    ({"eva_config": [1]}, r"`EvaConfig` must be"),
    ({"auto_mapping": json.loads("[" * 300 + "]" * 300)}, r"more than 100 levels deep"),
    ({"checkpoint": 7}, r"`checkpoint`"),
    ({"checkpoint": {"id": 7, "files": {}}}, r"`checkpoint`"),
    ({"checkpoint": {"id": "x", "files": {"../../x": "y"}}}, r"`checkpoint`"),
    ({"checkpoint": {"id": "x", "files": []}}, r"`checkpoint`"),
    ({"checkpoint": {"id": "x", "files": {}}}, r"was not saved with"),
    ({"adapters": "x"}, r"`adapters`"),
    ({"adapters": {}}, None),
    ({"adapters": [1]}, r"entry 0 of `adapters`"),
    ({"adapters": [{}]}, r"entry 0 of `adapters`"),
]


def edit(folder, change):
    settings = json.loads((folder / CONFIG).read_text())
    change(settings)
    (folder / CONFIG).write_text(json.dumps(settings))


@pytest.mark.parametrize(("changes", "reason"), SETTINGS, ids=[ascii(changes)[:40] for changes, _ in SETTINGS])
def test_a_strange_configuration_is_refused_by_name(tmp_path, capsys, changes, reason):
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    edit(folder, lambda settings: settings.update(changes))
    commands = (["inspect", str(folder)], ["export", str(folder), "--expert", "0", "--out", str(tmp_path / "out")])
    if reason is None:
        assert isinstance(PeftModel.from_pretrained(base_model(), folder), PeftModel)
        return
    if changes != {"peft_type": "LORA"} and not isinstance(changes.get("peft_type"), list):  # which PEFT reads itself
        with pytest.raises(ValueError, match=reason):
            PeftModel.from_pretrained(base_model(), folder)
    model = trained()
    state = adapter_state(model)
    with pytest.raises(ValueError, match=reason):
        model.load_adapter(folder, "another")
    assert_same_state(adapter_state(model), state)
    if changes != {"target_modules": ["nothing"]}:  # which takes the base model to tell
        for command in commands:
            assert main(command) == 2
            assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        entry(active="x"),
        entry(active=True),
        entry(active=1),
        entry(name="expert_1"),
        entry(name=7),
        entry(config=[]),
        in_entry(peft_type="LORA"),
        in_entry(peft_type=None),
        in_entry(r="x"),
        in_entry(adapters=[{"name": "a"}]),
        lambda settings: [each.update(active=None) for each in settings["adapters"]],
        lambda settings: settings["adapters"].pop(),
        entry(name="mlp"),
    ],
)
def test_a_strange_list_of_adapters_is_refused(tmp_path, change):
    folder = tmp_path / "adapter"
    trained(EXPERTS[:2]).save_pretrained(folder)
    edit(folder, change)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base_model(), folder)
    model = trained()
    with pytest.raises(ValueError):
        model.load_adapter(folder, "another")
    assert list(model.peft_config) == ["default"]
    assert main(["inspect", str(folder)]) == 2


ENDLESS = r"(([a-z0-9]+[._]?)+)+!"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "changes", [{"target_modules": ENDLESS}, {"alpha_pattern": {ENDLESS: 2}}], ids=["targets", "alpha"]
)
def test_a_pattern_without_end_is_refused(tmp_path, capsys, monkeypatch, changes):
    monkeypatch.setattr("moelora.storage.patterns.SECONDS", 0.5)
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    edit(folder, lambda settings: settings.update(changes))
    with pytest.raises(ValueError, match="did not come to an end"):
        PeftModel.from_pretrained(base_model(), folder)
    assert main(["inspect", str(folder)]) == 2
    assert "did not come to an end" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_a_pattern_without_end_is_refused_in_a_plain_lora(tmp_path, monkeypatch):
    monkeypatch.setattr("moelora.storage.patterns.SECONDS", 0.5)
    get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    edit(tmp_path, lambda settings: settings.update(rank_pattern={ENDLESS: 2}))
    with pytest.raises(LoraError, match=r"`rank_pattern` .* did not come to an end"):
        read_lora(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_place_of_a_pending_configuration_is_not_waited_for(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / PENDING).mkdir()
    os.mkfifo(tmp_path / PENDING / CONFIG)
    assert isinstance(PeftModel.from_pretrained(base_model(), tmp_path), PeftModel)
    trained().save_pretrained(tmp_path)
    assert not (tmp_path / PENDING).exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\0", "\ufeff{}", "NaN"],
    ids=["empty", "open", "list", "null", "text", "deep", "digits", "nul", "bom", "nan"],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, capsys, content):
    folder = tmp_path / "adapter"
    trained().save_pretrained(folder)
    (folder / CONFIG).write_text(content)
    model = trained()
    with pytest.raises(ValueError, match="adapter_config"):
        model.load_adapter(folder, "another")
    for command in (["inspect", str(folder)], ["generate", "--adapter", str(folder), "--prompt", "x"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "adapter_config.json" in error and "Traceback" not in error


@pytest.mark.parametrize("kind", ["FOO", "XLORA", None])
def test_an_adapter_of_another_kind_is_told(adapter_folder, capsys, kind):
    folder = adapter_folder() / "adapter"
    edit(folder, lambda settings: settings.update(peft_type=kind))
    for command in (["generate", "--adapter", "adapter", "--prompt", "x"], ["inspect", "adapter"]):
        assert main(command) == 2
        assert "`peft_type`" in capsys.readouterr().err or kind == "XLORA"


def test_weights_too_large_to_export_are_refused_before_anything_is_written(tmp_path, capsys):
    folder, out = tmp_path / "adapter", tmp_path / "out"
    trained().save_pretrained(folder)
    for weights in ("1e308,1e308,1e308", "1e39,0,0", "1,-1e300,1"):
        assert main(["export", str(folder), "--mixture", "--weights", weights, "--out", str(out)]) == 2
        assert "are too large" in capsys.readouterr().err
        assert not out.exists()
    assert main(["export", str(folder), "--mixture", "--weights", "1,2,3", "--out", str(out)]) == 0


def test_a_lone_experts_alpha_that_no_lora_takes_is_refused(tmp_path, capsys):
    folder, out = tmp_path / "adapter", tmp_path / "out"
    trained().save_pretrained(folder)
    edit(folder, lambda settings: settings.update(lora_alpha=3e38, routing_scale=3e38))
    assert main(["export", str(folder), "--expert", "0", "--out", str(out)]) == 2
    assert "`lora_alpha` (3e+38) times `routing_scale` (3e+38)" in capsys.readouterr().err
    assert not out.exists()
