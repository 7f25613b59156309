"""Whether texts are new to a mixture, and `--grow auto`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mixture_of
from test_domain_classifier import HIGH, LOW, mixture_of_domains, texts
from tiny import counting, save_tiny_adapter, shouting, tiny_recipe, write_jsonl, write_recipe

from moelora.cli.commands import main
from moelora.experts import novelty
from moelora.experts.novelty_score import _Domain, auc, judge, measure
from moelora.routing.domain_classifier import DomainStatistics

MIDDLE = (24, 34)
RECIPE = str(Path(__file__).parent.parent / "examples" / "quickstart.yaml")


def rows(span, count=24, length=16, seed=3):
    return texts(span, rows=count, length=length, seed=seed)["input_ids"].tolist()


def test_distances_are_mahalanobis_distances():
    statistics = DomainStatistics(torch.randn(6), torch.randn(3, 6), torch.rand(6) + 0.1)
    x = torch.randn(5, 6)
    covariance = statistics.covariance() + 1e-3 * statistics.covariance().diagonal().mean() * torch.eye(6)
    moved = x - statistics.mean
    exact = (moved @ torch.linalg.inv(covariance) * moved).sum(-1) / 6
    torch.testing.assert_close(_Domain.of(statistics).distance(x).float(), exact, rtol=1e-4, atol=1e-5)


def test_a_domain_that_nobody_learned_scores_high_and_known_ones_do_not():
    model = mixture_of_domains()
    calibration = rows(LOW) + rows(HIGH)
    new = novelty(model, calibration, rows(MIDDLE, seed=4))
    known = novelty(model, calibration, rows(LOW, seed=5) + rows(HIGH, seed=5))
    assert new.number == known.number == "distance"
    np.testing.assert_array_equal(new.z_scores[:, 0], new.scores)
    assert auc(known.scores, new.scores) > 0.95
    assert new.share_new > 0.8 and known.share_new < 0.25


@pytest.mark.parametrize("number", ["distance", "loss"])
def test_the_number_of_a_text_does_not_depend_on_its_neighbours(number):
    model = mixture_of_domains()
    short, long = rows(LOW, count=1, length=5)[0], rows(HIGH, count=1, length=20)[0]
    _, together = measure(model, [short, long], batch_size=2, number=number)
    _, apart = measure(model, [short, long], batch_size=1, number=number)
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    assert abs(together[0] - together[1]) > 1e-3


def test_a_distance_grows_with_the_root_of_the_length():
    """Of the embeddings, whose mean over a text and over the same text twice is one."""
    model = mixture_of_domains(router_scope="model")
    text = rows(MIDDLE, count=1, length=12)[0]
    (once, twice) = measure(model, [text, text + text])[1]
    np.testing.assert_allclose(twice, once * 2**0.5, rtol=1e-4)


def test_without_memories_the_loss_counts_and_statistics_stay():
    model = mixture_of("llama")
    with torch.no_grad():
        model(**texts(LOW))
    before = model.routing_stats()
    assert novelty(model, rows(LOW), rows(LOW, seed=9)).names == ("loss",)
    assert model.routing_stats() == before


def test_too_little_or_constant_routing_is_refused():
    with pytest.raises(ValueError, match="8 or more"):
        novelty(mixture_of("llama"), rows(LOW, count=3), rows(LOW))
    with pytest.raises(ValueError, match="1 tokens"):
        novelty(mixture_of("llama"), rows(LOW), [[5]])
    with pytest.raises(ValueError, match="no texts"):
        novelty(mixture_of("llama"), rows(LOW), [])
    with pytest.raises(ValueError, match="routers know nothing"):
        novelty(mixture_of("llama", router_type="fixed"), rows(LOW), rows(LOW))


def test_the_threshold_lets_one_in_twenty_known_texts_pass():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    judged = judge("loss", values, values)
    assert abs(judged.share_new - 0.05) < 0.01
    assert judged.scores.mean() == pytest.approx(0, abs=1e-9) and judged.scores.std(ddof=1) == pytest.approx(1)


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture trained on counting; recipes for more of it and for shouting."""
    folder = tmp_path_factory.mktemp("auto")
    recipe = tiny_recipe(folder)
    write_jsonl(folder / "counting.jsonl", [row for n, row in enumerate(counting(240)) if n % 3])
    recipe["data"] = [recipe["data"][0] | {"eval_fraction": 0.3}]
    recipe["training"] |= {"max_steps": 30, "save_steps": 30}
    assert main(["train", str(write_recipe(folder, recipe).rename(folder / "first.yaml"))]) == 0
    recipe["mixture"] = {}
    recipe["training"]["max_steps"] = 2
    write_jsonl(folder / "more.jsonl", counting(240)[::3])
    write_jsonl(folder / "shouting.jsonl", shouting(60))
    for name in ("more", "shouting"):
        recipe["data"] = [{"name": name, "path": f"{name}.jsonl"}]
        recipe["training"]["output_dir"] = f"with-{name}"
        write_recipe(folder, recipe).rename(folder / f"{name}.yaml")
    return folder


@pytest.mark.parametrize(("name", "grown"), [("shouting", "grown_1"), ("more", None)])
def test_auto_adds_experts_only_for_what_is_new(folder, capsys, name, grown):
    assert main(["train", str(folder / f"{name}.yaml"), "--grow", "auto", "--adapter", str(folder / "out")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("is added for them" if grown else "nothing is added") in said, said[said.find("Novelty") :][:300]
    record = json.loads((folder / f"with-{name}" / "run.json").read_text())
    assert record["grown_adapter"] == grown and record["learned"] == (grown or "default")
    config = json.loads((folder / f"with-{name}" / "adapter_config.json").read_text())
    names = [entry["name"] for entry in config["adapters"] or [{"name": "default"}]]
    assert names == (["default", "grown_1"] if grown else ["default"])


@pytest.mark.parametrize(("kept", "expected"), [(5, "fewer than 8 do not tell"), (0, "cannot be read")])
def test_auto_looks_at_the_known_texts_before_it_loads_anything(folder, capsys, monkeypatch, kept, expected):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    counting_file = folder / "counting.jsonl"
    lines = counting_file.read_text().splitlines(keepends=True)
    counting_file.unlink()
    if kept:
        counting_file.write_text("".join(lines[:kept]))
    try:
        arguments = ["train", str(folder / "shouting.yaml"), "--grow", "auto", "--adapter", str(folder / "out")]
        assert main([*arguments, "--set", "training.output_dir=early"]) == 2
    finally:
        counting_file.write_text("".join(lines))
    assert expected in capsys.readouterr().err


def test_the_command_tells_new_texts_from_known_ones(folder, capsys):
    arguments = ["novelty", str(folder / "out"), "--calibration", f"counting={folder / 'counting.jsonl'}"]
    arguments += ["--data", f"shouting={folder / 'shouting.jsonl'}"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if "shouting" in line)
    assert float(line.replace("│", "|").split("|")[-2]) > 0.9, table


def test_what_cannot_be_judged_is_told_before_a_model_is_loaded(folder, capsys, monkeypatch, tmp_path):
    save_tiny_adapter(tmp_path, router_type="fixed")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    few, more = (write_jsonl(tmp_path / f"{count}.jsonl", counting(count)) for count in (15, 16))
    texts = ["--calibration", f"few={few}", "--data", f"more={more}"]
    assert main(["novelty", str(folder / "out"), *texts]) == 2
    assert "15 texts of two tokens or more say too little; give 16" in capsys.readouterr().err
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "<end>"}])  # of one token
    texts = ["--calibration", f"more={more}", "--data", f"one={one}"]
    assert main(["novelty", str(folder / "out"), *texts]) == 2
    assert "--data one: no text of two tokens" in capsys.readouterr().err
    texts = ["--calibration", f"more={more}", "--data", f"few={few}"]
    assert main(["novelty", str(tmp_path / "adapter"), *texts]) == 2
    assert "router_type='fixed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", RECIPE, "--grow", "auto"], "--adapter FOLDER belong together"),
        (["train", RECIPE, "--adapter", "."], "--adapter FOLDER belong together"),
        (["train", RECIPE, "--dry-run"], "--dry-run needs --grow"),
        (["novelty", "nowhere"], "no such folder"),
        (["novelty", "."], "--calibration NAME=FILE"),
    ],
)
def test_calls_that_cannot_work_are_refused(capsys, arguments, expected):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
