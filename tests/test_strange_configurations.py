"""What a stranger's configuration of an adapter must not do: to the API and to the commands that read adapters."""

import json
import os
import shutil

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from test_persistence import EXPERTS, adapter_state, assert_same_state, base_model, trained

from moelora.cli import main
from moelora.files.atomic_save import PENDING
from moelora.storage.lora_file import LoraError, read_lora

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trained().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """An adapter as it was saved, to be made strange."""
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture(scope="module")
def model():
    """A mixture that no strange adapter may change."""
    return trained()


def edit(folder, change):
    settings = json.loads((folder / CONFIG).read_text())
    change(settings)
    (folder / CONFIG).write_text(json.dumps(settings))


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
    ({"adapters": [1]}, r"entry 0 of `adapters`"),
    ({"adapters": [{}]}, r"entry 0 of `adapters`"),
]


@pytest.mark.parametrize(("changes", "reason"), SETTINGS, ids=[ascii(changes)[:40] for changes, _ in SETTINGS])
def test_a_strange_configuration_is_refused_by_name(folder, model, tmp_path, capsys, changes, reason):
    edit(folder, lambda settings: settings.update(changes))
    commands = (["inspect", str(folder)], ["export", str(folder), "--expert", "0", "--out", str(tmp_path / "out")])
    if changes != {"peft_type": "LORA"} and not isinstance(changes.get("peft_type"), list):  # which PEFT reads itself
        with pytest.raises(ValueError, match=reason):
            PeftModel.from_pretrained(base_model(), folder)
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
def test_a_strange_list_of_adapters_is_refused(tmp_path, model, change):
    folder = tmp_path / "adapter"
    trained(EXPERTS[:2]).save_pretrained(folder)
    edit(folder, change)
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base_model(), folder)
    with pytest.raises(ValueError):
        model.load_adapter(folder, "another")
    assert list(model.peft_config) == ["default"]
    assert main(["inspect", str(folder)]) == 2


def test_no_list_of_adapters_is_one_adapter(folder):
    """As saves of a single adapter have none."""
    edit(folder, lambda settings: settings.update(adapters={}))
    assert list(PeftModel.from_pretrained(base_model(), folder).peft_config) == ["default"]


ENDLESS = r"(([a-z0-9]+[._]?)+)+!"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "changes", [{"target_modules": ENDLESS}, {"alpha_pattern": {ENDLESS: 2}}], ids=["targets", "alpha"]
)
def test_a_pattern_without_end_is_refused(folder, capsys, monkeypatch, changes):
    monkeypatch.setattr("moelora.storage.patterns.SECONDS", 0.5)
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
def test_a_configuration_that_is_none_is_refused(folder, model, capsys, content):
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match="adapter_config"):
        model.load_adapter(folder, "another")
    for command in (["inspect", str(folder)], ["generate", "--adapter", str(folder), "--prompt", "x"]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "adapter_config.json" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "by_generate"), [("FOO", "`peft_type`"), ("XLORA", "does not load onto"), (None, "`peft_type`")]
)
def test_an_adapter_of_another_kind_is_told(adapter_folder, capsys, kind, by_generate):
    """`generate` reads what PEFT knows, and tells what PEFT says of it."""
    folder = adapter_folder() / "adapter"
    edit(folder, lambda settings: settings.update(peft_type=kind))
    assert main(["generate", "--adapter", "adapter", "--prompt", "x"]) == 2
    assert by_generate in capsys.readouterr().err
    assert main(["inspect", "adapter"]) == 2
    assert "`peft_type`" in capsys.readouterr().err


def test_weights_too_large_to_export_are_refused_before_anything_is_written(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for weights in ("1e308,1e308,1e308", "1e39,0,0", "1,-1e300,1"):
        assert main(["export", str(folder), "--mixture", "--weights", weights, "--out", str(out)]) == 2
        assert "are too large" in capsys.readouterr().err
        assert not out.exists()
    assert main(["export", str(folder), "--mixture", "--weights", "1,2,3", "--out", str(out)]) == 0


def test_a_lone_experts_alpha_that_no_lora_takes_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    edit(folder, lambda settings: settings.update(lora_alpha=3e38, routing_scale=3e38))
    assert main(["export", str(folder), "--expert", "0", "--out", str(out)]) == 2
    assert "`lora_alpha` (3e+38) times `routing_scale` (3e+38)" in capsys.readouterr().err
    assert not out.exists()
