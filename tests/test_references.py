"""references.json: what training writes, what goes along with an export, and what is refused."""

import json
import math
import os
import shutil

import pytest
import torch
from tiny import DATA, tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM

from moelora import MoELoraConfig  # noqa: F401 (registers the tuner)
from moelora.cli.commands import main
from moelora.experts.exporting import save_lora, to_lora
from moelora.schema import UserError
from moelora.storage.mixture_files import read_mixture
from moelora.storage.references import MOST_PROMPTS, MOST_TOKENS, read_references
from moelora.training import load_recipe, train


def run(folder, *overrides):
    path = write_recipe(folder, tiny_recipe(folder))
    train(load_recipe(path, overrides))
    return folder / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))


def content_of(folder):
    return json.loads((folder / "references.json").read_text())


@torch.no_grad()
def test_training_writes_what_the_base_model_makes_of_held_out_texts(trained):
    found = read_references(trained)
    model = AutoModelForCausalLM.from_pretrained(found.base_model).eval()
    assert found.dtype == "float32" and found.is_exact
    assert 1 <= len(found.prompts) <= MOST_PROMPTS
    for prompt in found.prompts:
        assert 2 <= len(prompt.token_ids) <= MOST_TOKENS
        ids = torch.tensor([prompt.token_ids])
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(prompt.base), expected, rtol=0, atol=1e-5)
        assert (torch.tensor(prompt.adapted) - expected).abs().max() > 1e-3


def test_a_trained_adapter_does_what_it_did(trained, capsys):
    assert main(["verify", str(trained)]) == 0
    assert "does what it did in training: mean |Δ| 0 nats" in capsys.readouterr().out


def test_the_precision_is_that_of_autocast(tmp_path):
    assert read_references(run(tmp_path, "training.bf16=true")).dtype == "bfloat16"
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_mixture_that_grew_does_what_it_did(trained, tmp_path, capsys):
    recipe = tiny_recipe(tmp_path)
    recipe["mixture"] = {}
    recipe["data"] = recipe["data"][1:]
    path = write_recipe(tmp_path, recipe | {"model": {"name": str(trained.parent / "model")}})
    assert main(["train", str(path), "--grow", str(trained)]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "does what it did in training" in capsys.readouterr().out


def test_each_domain_gives_prompts(trained):
    texts = ["".join(map(chr, _letters(ids))) for ids in read_references(trained).token_ids]
    assert any("HELLO" in text for text in texts) and any("plus" in text for text in texts)


def _letters(ids):
    """The tiny tokenizer numbers the printable bytes from "!" on, which is 1."""
    return [token + 32 for token in ids if 0 < token < 95]


def test_references_change_nothing_that_is_trained(trained, tmp_path):
    without = run(tmp_path, "references=false")
    assert not (without / "references.json").exists()
    weights = [read_mixture(folder)[0].pools for folder in (trained, without)]
    assert all(torch.equal(weights[0][name].lora_B, pool.lora_B) for name, pool in weights[1].items())
    domains = [json.loads((folder / "run.json").read_text())["domains"] for folder in (trained, without)]
    assert domains[0] == domains[1]


def test_references_of_another_save_are_refused(copy, tmp_path):
    other = run(tmp_path / "other", "seed=1")
    shutil.copy(other / "references.json", copy)
    with pytest.raises(UserError, match="is of another save than the adapter beside it"):
        read_references(copy)


def test_a_lora_that_was_changed_since_is_another_save(trained, tmp_path):
    assert main(["export", str(trained), "--expert", "0", "--out", str(tmp_path / "lora")]) == 0
    lora = to_lora(read_mixture(trained), 1)
    save_lora(lora, tmp_path / "other")
    assert read_references(tmp_path / "lora") is not None
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", tmp_path / "lora")
    with pytest.raises(UserError, match="is of another save"):
        read_references(tmp_path / "lora")


def _set(**values):
    return lambda content: content.update(values)


def _set_prompt(**values):
    return lambda content: content["prompts"][0].update(values)


DAMAGED = {
    "another version": (_set(version=2), "`version` is 2"),
    "a strange key": (_set(code="rm"), "unknown key 'code'"),
    "no save": (_set(save=None), "`save` is missing or of the wrong kind"),
    "a strange precision": (_set(dtype="load_model"), "`dtype` is 'load_model'"),
    "no prompts": (_set(prompts=[]), "0 prompts"),
    "too many prompts": (lambda content: content.update(prompts=content["prompts"] * 9), "there must be 1 to 8"),
    "a prompt that is none": (_set(prompts=[5]), "prompt 0: must hold"),
    "a long prompt": (_set_prompt(token_ids=[1] * 65), "must be 2 to 64 whole numbers"),
    "a negative token": (_set_prompt(token_ids=[1, -1]), "whole numbers, 0 or greater"),
    "a token that is none": (_set_prompt(token_ids=[1, True]), "whole numbers, 0 or greater"),
    "wrong lengths": (_set_prompt(token_ids=[1, 2, 3]), "`adapted` must be 2 finite numbers"),
    "NaN": (_set_prompt(token_ids=[1, 2], adapted=[math.nan]), "`adapted` must be 1 finite numbers"),
    "infinity": (_set_prompt(token_ids=[1, 2], adapted=[-1.0], base=[-math.inf]), "`base` must be 1 finite"),
    "no probability": (_set_prompt(token_ids=[1, 2], adapted=[0.5]), "0 or less"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(copy, capsys, damage):
    change, message = DAMAGED[damage]
    content = content_of(copy)
    change(content)
    (copy / "references.json").write_text(json.dumps(content))
    assert main(["verify", str(copy)]) == 2
    error = capsys.readouterr().err
    assert message in error and "--write" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("[" * 5000, "levels deep"),
        (" " * (1 << 20) + "{}", "more than 1,048,576 bytes"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(copy, text, message):
    (copy / "references.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_references(copy)


def test_a_pipe_is_not_waited_for(copy):
    (copy / "references.json").unlink()
    os.mkfifo(copy / "references.json")
    with pytest.raises(UserError, match="no regular file"):
        read_references(copy)


# ---- what operations make of them ------------------------------------------------------------------------------------


def test_an_exported_expert_carries_the_mixtures(trained, tmp_path):
    assert main(["export", str(trained), "--expert", "1", "--out", str(tmp_path / "lora")]) == 0
    carried = read_references(tmp_path / "lora")
    assert carried.prompts == read_references(trained).prompts
    assert not carried.is_exact


def test_a_damaged_file_does_not_stop_an_export(copy, tmp_path, capsys):
    (copy / "references.json").write_text("{")
    assert main(["export", str(copy), "--expert", "1", "--out", str(tmp_path / "lora")]) == 0
    assert "References are left out" in capsys.readouterr().err
    assert not (tmp_path / "lora" / "references.json").exists()


def test_a_pruned_mixture_has_references_of_its_own(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    assert main(["prune", str(trained), "--keep", "2", *DATA, "--out", str(tmp_path / "smaller")]) == 0
    before, after = read_references(trained), read_references(tmp_path / "smaller")
    assert after.is_exact and after.token_ids == before.token_ids
    assert [p.base for p in after.prompts] == [p.base for p in before.prompts]
    assert [p.adapted for p in after.prompts] != [p.adapted for p in before.prompts]
    assert main(["verify", str(tmp_path / "smaller")]) == 0


def test_a_distilled_lora_is_judged_by_the_mixture(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    assert main(["distil", str(trained), "--r", "4", *DATA, "--out", str(tmp_path / "lora")]) == 0
    carried = read_references(tmp_path / "lora")
    assert carried.prompts == read_references(trained).prompts and not carried.is_exact
    assert main(["verify", str(tmp_path / "lora")]) == 0
