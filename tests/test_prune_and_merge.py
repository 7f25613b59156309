"""`moelora prune` and `moelora merge`, from a folder to a folder."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_analysis import TEXTS, TOKENIZER, tiny
from tiny import DATA, counting, shouting, write_jsonl
from transformers import AutoModelForCausalLM

from moelora.cli.commands import main
from moelora.experts.evaluation import Texts
from moelora.experts.parts import put_together, select, take_apart
from moelora.experts.prune import drop, prune
from moelora.tuner.layer import MoELoraLayer


def texts():
    return Texts.of(TEXTS, TOKENIZER, block_size=64)


def test_a_reading_is_what_analysis_says():
    model, found = tiny(), texts()
    reading = found.read(model)
    import moelora

    expected = moelora.analyze(model, TEXTS, TOKENIZER, block_size=64, permutations=1)
    np.testing.assert_allclose(reading.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(reading.share, expected.weight.mean(axis=(0, 1)), rtol=1e-6)


def test_load_removes_the_least_used_and_counts_anew():
    model = tiny(num_experts=4)
    reading = texts().read(model)
    found = prune(model, texts(), "load", 2)
    assert found.removals[0].number == int(np.argmin(reading.share))
    assert f"{reading.share.min():.1%}" in found.removals[0].reason
    assert found.model.base_model.routing.num_experts == 2
    assert len({removal.number for removal in found.removals}) == 2
    np.testing.assert_allclose(found.after.loss, texts().read(found.model).loss)
    np.testing.assert_array_equal(found.before.loss, reading.loss)


def test_worth_is_measured_anew_after_each_removal():
    def worth_of(model):
        return np.mean(texts().worth(model, texts().read(model)).worth, axis=0)

    first = worth_of(tiny())
    model = put_together(tiny(), select(take_apart(tiny()), [i for i in range(4) if i != int(np.argmin(first))]))
    second = worth_of(model)
    assert second.min() not in first, "what remains is worth something else now"
    found = prune(tiny(), texts(), "worth", 2)
    assert found.removals[0].number == int(np.argmin(first))
    assert f"{first.min():+.4f}" in found.removals[0].reason
    left = [i for i in range(4) if i != found.removals[0].number]
    assert found.removals[1].number == left[int(np.argmin(second))]
    assert f"{second.min():+.4f}" in found.removals[1].reason


def test_similarity_removes_the_twin_that_is_used_less():
    model = tiny(num_experts=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoELoraLayer):
                for factor in (module.lora_A["default"].weight, module.lora_B["default"].weight.T):
                    factor[6:8] = factor[2:4]
    share = texts().read(model).share
    found = prune(model, texts(), "similarity", 3)
    assert found.removals[0].number == (1 if share[1] < share[3] else 3)
    assert "cosine +1.000" in found.removals[0].reason


def test_dropping_by_number():
    found = drop(tiny(), texts(), [1, 3])
    assert [removal.number for removal in found.removals] == [1, 3]
    assert found.model.base_model.routing.num_experts == 2
    with pytest.raises(ValueError, match="no expert is left"):
        drop(tiny(), texts(), [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"`keep` \(4\) must be between 1 and 3"):
        prune(tiny(), texts(), "load", 4)


# The commands


@pytest.fixture
def folder(adapter_folder):
    return adapter_folder()


def load(folder):
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "model")
    return PeftModel.from_pretrained(base, folder).eval()


def loss_of(model, rows):
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*TOKENIZER(row["text"])["input_ids"], 0]])
        with torch.no_grad():
            logits = model(ids).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def test_prune_says_what_goes_and_what_it_costs(folder, capsys):
    before = loss_of(load(folder / "adapter"), counting(10))
    assert main(["prune", "adapter", "--keep", "2", "--by", "worth", *DATA, "--out", "smaller"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((folder / "smaller" / "operation.json").read_text())
    removed = [removal["number"] for removal in record["outcome"]["removed"]]
    model = load(folder / "smaller")
    assert model.base_model.routing.num_experts == 2 and list(model.peft_config) == ["default"]
    losses = record["outcome"]["domains"]["counting"]
    assert losses["loss_before"] == pytest.approx(before, rel=1e-5)
    assert losses["loss_after"] == pytest.approx(loss_of(model, counting(10)), rel=1e-5)
    assert f"counting: {losses['loss_before']:.4f} -> {losses['loss_after']:.4f}" in printed
    assert "4 experts to 2" in printed and "worth least" in printed and "goes (2)" in printed
    whole = load(folder / "adapter")
    kept = [number for number in range(4) if number not in removed]
    whole_A = whole.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight
    left_A = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight
    assert torch.equal(left_A, torch.cat([whole_A[2 * number : 2 * number + 2] for number in kept]))


def test_a_dry_run_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert main(["prune", "adapter", "--drop", "0,2", *DATA, "--out", "smaller", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "named by --drop" in printed and "Dry run" in printed and "->" in printed
    assert main(["merge", "adapter", "--experts", "0,2", *DATA, "--out", "smaller", "--dry-run"]) == 0
    assert sorted(folder.rglob("*")) == before


def test_one_expert_left_is_said(folder, capsys):
    assert main(["prune", "adapter", "--drop", "0", "--drop", "1,2", *DATA, "--out", "one"]) == 0
    assert "One expert is left" in capsys.readouterr().out
    assert list(load(folder / "one").peft_config) == ["expert_0"]


@pytest.mark.parametrize("method", ["average", "svd", "ties", "dare"])
def test_merge_says_what_becomes_of_whom(folder, capsys, method):
    assert main(["merge", "adapter", "--experts", "3,1", "--method", method, *DATA, "--out", "merged"]) == 0
    printed = capsys.readouterr().out
    model = load(folder / "merged")
    outcome = json.loads((folder / "merged" / "operation.json").read_text())["outcome"]
    assert outcome["becomes"] == [0, 2, 1, 2]
    assert list(model.peft_config) == (["default", "expert_0"] if method == "average" else ["default"])
    assert outcome["domains"]["shouting"]["loss_after"] == pytest.approx(loss_of(model, shouting(10)), rel=1e-5)
    assert "experts 3, 1 become one" in printed and "merged with a share of" in printed
    assert f"-> {outcome['domains']['shouting']['loss_after']:.4f}" in printed


ONE = ["--data", "one=one.jsonl"]
TIES = ["--experts", "1,2", "--method", "ties"]
INSIDE = ["--data", "one=kept/one.jsonl"]


def test_mistakes_are_told_before_a_model_is_loaded(folder, capsys, monkeypatch):
    write_jsonl(folder / "one.jsonl", [{"text": "<end>"}] * 3)  # of one token each
    (folder / "kept").mkdir(exist_ok=True)
    write_jsonl(folder / "kept" / "one.jsonl", [{"text": "one"}])
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    cases = {
        ("prune", "adapter", *DATA, "--out", "o"): "give either --keep N or --drop EXPERT",
        ("prune", "adapter", *DATA, "--out", "o", "--keep", "2", "--drop", "1"): "give either",
        ("prune", "adapter", *DATA, "--out", "o", "--keep", "4"): "must leave 1 to 3 of the 4 experts",
        ("prune", "adapter", *DATA, "--out", "o", "--drop", "default"): "must leave 1 to 3",
        ("prune", "adapter", *DATA, "--out", "o", "--drop", "7"): "--drop: there is no expert '7'",
        ("prune", "adapter", *DATA, "--out", "o", "--keep", "2", "--by", "luck"): "--by = 'luck'",
        ("prune", "adapter", "--out", "o", "--keep", "2"): "give texts: --data NAME=FILE",
        ("prune", "gone", *DATA, "--out", "o", "--keep", "2"): "gone",
        ("prune", "adapter", *DATA, "--out", "adapter", "--keep", "2"): "--overwrite to replace it",
        ("prune", "adapter", *DATA, "--out", ".", "--overwrite", "--keep", "2"): "holds adapter, which is only read",
        ("prune", "adapter", *ONE, "--out", "o", "--keep", "2"): "'one' holds no text of two tokens",
        ("prune", "adapter", *DATA, "--out", "model", "--overwrite", "--keep", "2"): "model, which is only read",
        ("prune", "adapter", *INSIDE, "--out", "kept", "--overwrite", "--keep", "2"): "one.jsonl, which is only read",
        ("merge", "adapter", *DATA, "--out", "adapter", "--overwrite", "--experts", "0,1"): "is adapter, which is only",
        ("merge", "adapter", *DATA, "--out", "o"): "--experts",
        ("merge", "adapter", *ONE, "--out", "o", "--experts", "0,1"): "'one' holds no text of two tokens",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1"): "two experts or more",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1,5"): "--experts: there is no expert '5'",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1,2", "--method", "sum"): "--method = 'sum'",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1,2", "--method", "average", "--rank", "4"): "--rank",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1,2", "--rank", "5"): "exceeds 4, the",
        ("merge", "adapter", *DATA, "--out", "o", *TIES, "--rank", "33"): "exceeds 32, the",
        ("merge", "adapter", *DATA, "--out", "o", "--experts", "1,2", "--density", "1.5"): "--density = 1.5",
    }
    for arguments, words in cases.items():
        assert main(list(arguments)) == 2, arguments
        assert words in capsys.readouterr().err
    assert not (folder / "o").exists()


def test_an_operation_can_be_applied_to_what_another_wrote_and_undone(folder, capsys):
    assert main(["merge", "adapter", "--experts", "0,1", "--method", "average", *DATA, "--out", "next"]) == 0
    weights = (folder / "next" / "adapter_model.safetensors").read_bytes()
    assert main(["prune", "next", "--drop", "expert_0", *DATA, "--out", "next", "--overwrite"]) == 0
    assert load(folder / "next").base_model.routing.num_experts == 2
    assert main(["undo", "next"]) == 0
    assert (folder / "next" / "adapter_model.safetensors").read_bytes() == weights


def test_the_same_mixture_is_put_together_again():
    model = tiny()
    before = texts().read(model)
    after = texts().read(put_together(model, take_apart(model)))
    np.testing.assert_array_equal(before.loss, after.loss)
