"""`moelora train --grow`: one domain after another on a tiny model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import counting, shouting, tiny_recipe, write_jsonl, write_recipe

from moelora import MoELoraConfig
from moelora.cli.commands import main
from moelora.cli.grow_from import inherited
from moelora.storage.run_record import learned_domains


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture trained on counting, and a recipe that shouts."""
    folder = tmp_path_factory.mktemp("continual")
    recipe = tiny_recipe(folder)
    recipe["data"] = recipe["data"][:1]
    first = write_recipe(folder, recipe).rename(folder / "first.yaml")
    assert main(["train", str(first)]) == 0
    write_jsonl(folder / "shouting.jsonl", shouting(60))
    recipe["data"] = [{"name": "shouting", "path": "shouting.jsonl"}]
    recipe["mixture"] = {"num_experts": 2}
    recipe["training"]["output_dir"] = "grown"
    write_recipe(folder, recipe).rename(folder / "second.yaml")
    return folder


@pytest.fixture(scope="module")
def grown(folder):
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    assert main(["train", str(folder / "second.yaml"), "--grow", str(folder / "out")]) == 0
    assert before == {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}
    return folder / "grown"


def test_the_old_experts_are_what_they_were_and_the_new_ones_learned(folder, grown):
    old, new = load_file(folder / "out" / "adapter_model.safetensors"), load_file(grown / "adapter_model.safetensors")
    assert old and all(torch.equal(value, new[f"default/{key}"]) for key, value in old.items())
    assert all(value.abs().max() > 0 for key, value in new.items() if key.startswith("grown_1/") and "lora_B" in key)
    config = json.loads((grown / "adapter_config.json").read_text())
    assert [(entry["name"], entry["active"]) for entry in config["adapters"]] == [("default", 0), ("grown_1", 1)]
    record = json.loads((grown / "run.json").read_text())
    assert record["grown_from"] == str(folder / "out") and record["grown_adapter"] == "grown_1"
    assert len(record["maturity"]) == 5


def test_it_grows_again(folder, grown, capsys):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(grown), "--set", "training.output_dir=third"]
    assert main(arguments) == 0
    assert "grown_2" in capsys.readouterr().out
    config = json.loads((folder / "third" / "adapter_config.json").read_text())
    assert [entry["name"] for entry in config["adapters"]] == ["default", "grown_1", "grown_2"]


def test_a_grown_run_resumes(folder, grown, monkeypatch):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out")]
    arguments += ["--set", "training.output_dir=resumed"]
    assert main([*arguments, "--set", "training.max_steps=2"]) == 0
    record_file = folder / "resumed" / "run.json"
    record = json.loads(record_file.read_text())
    record_file.write_text(json.dumps(record | {"status": "training"}))
    assert main([*arguments, "--resume"]) == 0
    straight = load_file(grown / "adapter_model.safetensors")
    resumed = load_file(folder / "resumed" / "adapter_model.safetensors")
    assert straight.keys() == resumed.keys()


def test_new_experts_start_from_the_nearest(folder, capsys):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out"), "--set", "start_from=nearest"]
    assert main([*arguments, "--dry-run", "--set", "training.output_dir=near"]) == 0
    assert "copies of the experts of the adapter with the least loss on the new texts" in capsys.readouterr().out
    # one step with no learning rate: the new experts are still what they began as
    more = ["training.output_dir=near", "training.max_steps=1", "training.learning_rate=1e-30", "mixture={}"]
    assert main([*arguments, *(f"--set={setting}" for setting in more)]) == 0
    start = json.loads((folder / "near" / "run.json").read_text())["start"]
    saved = load_file(folder / "near" / "adapter_model.safetensors")
    is_copy = start["losses"]["default"] < start["base_loss"]
    assert start["start_from"] == ("default" if is_copy else "new")
    assert f"base model {start['base_loss']:.3f}" in capsys.readouterr().err
    for key, value in saved.items():
        if key.startswith("grown_1/") and "lora_B" in key:
            assert torch.equal(value, saved[key.replace("grown_1/", "default/")]) == is_copy
    assert main([*arguments, *(f"--set={setting}" for setting in more), "--resume", "--set", "start_from=new"]) == 2


def test_old_experts_are_merged_to_a_budget(folder, grown, capsys):
    """Three and two old experts beside two new ones: of seven, five may stay."""
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(grown), "--max-experts", "5"]
    arguments += ["--set", "training.output_dir=budget", "--set", "training.max_steps=1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "The 5 old experts are merged into 3 first" in capsys.readouterr().out
    old_data = ["--set", "old_data=[{name: counting, path: counting.jsonl}]"]
    before = (grown / "adapter_model.safetensors").read_bytes()
    assert main([*arguments, *old_data]) == 0
    assert (grown / "adapter_model.safetensors").read_bytes() == before
    record = json.loads((folder / "budget" / "run.json").read_text())
    assert len(record["maturity"]) == 5 and len(record["merged"]) >= 1
    assert "become one: changes" in capsys.readouterr().err
    assert record["old_domains"]["counting"].keys() >= {"loss_before", "loss_merged", "loss_after"}
    config = json.loads((folder / "budget" / "adapter_config.json").read_text())
    assert [entry["name"] for entry in config["adapters"]] == ["default", "grown_1", "grown_2"]
    assert main([*arguments, "--overwrite"]) == 0 and main(["undo", str(folder / "budget")]) == 0
    assert json.loads((folder / "budget" / "run.json").read_text())["old_domains"]
    capsys.readouterr()
    elsewhere = ["--set", "training.output_dir=none", "--max-experts", "2"]
    assert main([*arguments, *elsewhere]) == 2
    assert "the new adapter alone has 2 experts" in capsys.readouterr().err
    assert main([*arguments[:2], "--max-experts", "5"]) == 2
    assert "--max-experts needs --grow" in capsys.readouterr().err


def test_a_dry_run_says_what_stays_and_writes_nothing(folder, capsys):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out"), "--dry-run"]
    assert main([*arguments, "--set", "training.output_dir=nowhere"]) == 0
    said = capsys.readouterr().out
    assert "unchanged" in said and "grown_1" in said and "Dry run" in said
    assert not (folder / "nowhere").exists()


def test_overwriting_a_grown_mixture_keeps_it(folder, grown, capsys):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out"), "--overwrite"]
    arguments += ["--set", "training.max_steps=1", "--set", "training.output_dir=again"]
    shutil.copytree(grown, folder / "again")
    assert main([*arguments, "--dry-run"]) == 0
    assert f"what it holds would be kept in {folder / 'again.backup-1'}" in capsys.readouterr().out
    assert main(arguments) == 0
    old, kept = (load_file(place / "adapter_model.safetensors") for place in (grown, folder / "again.backup-1"))
    assert old.keys() == kept.keys() and all(torch.equal(value, kept[key]) for key, value in old.items())
    assert main(["undo", str(folder / "again")]) == 0
    assert (folder / "again" / "run.json").read_bytes() == (grown / "run.json").read_bytes()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("mixture.router_temperature=3.0", "is 2.0 in the mixture that grows"),
        ("training.output_dir=out", "holds a finished run"),
        ("mixture.num_experts=1", "num_experts"),
        ("start_from=defualt", "must be one of new, nearest, default; did you mean `default`?"),
    ],
)
def test_what_cannot_grow_is_refused_before_work(folder, capsys, setting, expected):
    arguments = ["--grow", str(folder / "out"), "--set", "training.output_dir=refused", "--set", setting]
    assert main(["train", str(folder / "second.yaml"), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_settings_of_imported_loras_leave_new_experts_to_the_recipe():
    settings = inherited(MoELoraConfig(single_expert=True, num_experts=3))
    assert MoELoraConfig(**settings | {"num_experts": 5}).single_expert is False


def test_a_mixture_made_without_a_task_type_grows(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(tmp_path / "plain")]
    arguments += ["--set", "training.max_steps=1", "--set", f"training.output_dir={tmp_path / 'grown'}"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "grown_1" in capsys.readouterr().out


def test_a_folder_without_a_mixture_is_refused(folder, capsys, tmp_path):
    assert main(["train", str(folder / "second.yaml"), "--grow", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_overwriting_what_grows_is_refused(folder, grown, capsys):
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out"), "--overwrite"]
    assert main([*arguments, "--set", "training.output_dir=out"]) == 2
    assert "is the adapter that grows" in capsys.readouterr().err
    inside = shutil.copytree(grown, folder / "holder" / "grown")
    arguments = ["train", str(folder / "second.yaml"), "--grow", str(inside), "--overwrite"]
    assert main([*arguments, "--set", "training.output_dir=holder"]) == 2
    assert f"holds {inside}, which is only read" in capsys.readouterr().err
    assert Path(folder / "out" / "adapter_model.safetensors").is_file()


def test_lost_texts_are_named(folder, capsys):
    lost = folder / "counting.jsonl"
    lost.unlink()
    try:
        arguments = ["train", str(folder / "second.yaml"), "--grow", str(folder / "out")]
        assert main([*arguments, "--set", "training.output_dir=lost"]) == 2
        assert "has no domain statistics" in capsys.readouterr().err
    finally:
        write_jsonl(lost, counting(40))


def test_what_was_made_of_an_adapter_knows_which_documents_it_learned(folder, grown, tmp_path, monkeypatch, capsys):
    """Of every file of every stage the held-out documents are measured, even where the folders before are gone."""
    monkeypatch.chdir(tmp_path)
    data = [f"--data={name}={folder / name}.jsonl" for name in ("counting", "shouting")]
    held_out = []
    shutil.copytree(grown, "here")
    for keep in (4, 3):  # in place: what was read is then no longer there
        assert main(["prune", "here", *data, "--keep", str(keep), "--out", "here", "--overwrite"]) == 0
        held_out.append(re.findall(r"; ([\d,]+) held-out tokens", capsys.readouterr().out))
    assert len(held_out[0]) == 2 and held_out[0] == held_out[1]
    assert [domain["name"] for domain in learned_domains(Path("here"))] == ["shouting", "counting"]
