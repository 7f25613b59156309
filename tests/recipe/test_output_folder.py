"""Which folder a run may write into, and what --resume goes on from."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import problems, write_jsonl, write_recipe

from moelora.files.atomic_save import checksum, new_id
from moelora.storage.run_record import write_json
from moelora.storage.trainer_checkpoints import last_whole_checkpoint, what_it_lacks
from moelora.training import load_recipe


@pytest.fixture
def record(folder, recipe):
    resolved = load_recipe(write_recipe(folder, recipe)).as_dict()
    path = folder / "out" / "run.json"
    yield lambda status, **changes: write_json(
        path, {"status": status, "recipe": {**resolved, **changes}, "domains": {}}
    )
    path.unlink(missing_ok=True)


@pytest.fixture
def checkpoint(folder):
    path = folder / "out" / "checkpoint-2"
    write_checkpoint(path)
    yield path
    shutil.rmtree(path)


def write_checkpoint(path):
    """What the Trainer leaves after a step, as small as it goes."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, path / "adapter_model.safetensors")
    torch.save({"state": {}, "param_groups": []}, path / "optimizer.pt")
    torch.save({"last_epoch": 2}, path / "scheduler.pt")
    torch.save({"python": (), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}, path / "rng_state.pth")
    torch.save({}, path / "training_args.bin")
    step = int(path.name.rpartition("-")[2])
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 0.5, "log_history": []}))


def test_a_finished_run_is_not_overwritten_unasked(folder, recipe, record):
    record("finished")
    assert "--overwrite" in problems(folder, recipe)["training.output_dir"]
    assert load_recipe(write_recipe(folder, recipe), overwrite=True)


def test_an_adapter_that_no_run_made_is_not_overwritten_unasked(folder, recipe):
    config = folder / "out" / "adapter_config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text("{}")
    try:
        assert "holds an adapter" in problems(folder, recipe)["training.output_dir"]
        assert load_recipe(write_recipe(folder, recipe), overwrite=True)
    finally:
        config.unlink()


def test_overwriting_a_folder_that_holds_what_is_read_is_refused(folder, recipe):
    found = problems(folder, recipe, "training.output_dir=.", overwrite=True)
    assert f"holds {folder / 'recipe.yaml'}, which is only read" in found["training.output_dir"]
    found = problems(folder, recipe, "training.output_dir=model", overwrite=True)
    assert f"holds {folder / 'model'}, which is only read" in found["training.output_dir"]


def test_an_id_of_the_hub_lies_in_no_output_folder(folder, recipe, monkeypatch):
    (folder / "out").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "out")
    assert set(problems(folder, recipe, "data.counting.path=nobody/nothing", overwrite=True)) == {"data.counting.path"}


@pytest.mark.parametrize("path", ["out/text.jsonl", "*/text.jsonl", "link.jsonl"])
def test_overwriting_a_folder_that_holds_texts_is_refused(folder, recipe, path):
    text = write_jsonl((folder / "out").joinpath("text.jsonl"), [{"text": "a"}, {"text": "b"}])
    (folder / "link.jsonl").symlink_to(text)
    try:
        for key in ("path", "eval_path"):
            found = problems(folder, recipe, f"data.counting.{key}='{path}'", overwrite=True)
            assert f"holds {text}, which is only read" in found["training.output_dir"]
    finally:
        text.unlink()
        (folder / "link.jsonl").unlink()


@pytest.mark.parametrize("out", ["texts", "texts/new/out"])
def test_an_output_folder_among_texts_is_refused(folder, recipe, out):
    (folder / "texts").mkdir(exist_ok=True)
    write_jsonl(folder / "texts" / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    found = problems(folder, recipe, "data.counting.path=texts", f"training.output_dir={out}")
    assert f"lies in {folder / 'texts'}, where `datasets` would read" in found["training.output_dir"]


def test_an_unfinished_run_is_resumed_or_overwritten(folder, recipe, record, checkpoint):
    record("training")
    assert "--resume" in problems(folder, recipe)["training.output_dir"]
    assert load_recipe(write_recipe(folder, recipe), resume=True)
    (checkpoint / "trainer_state.json").unlink()
    assert load_recipe(write_recipe(folder, recipe)), (
        "a run that died before its first checkpoint leaves nothing to lose"
    )


def test_resume_needs_a_complete_checkpoint(folder, recipe, record, checkpoint):
    assert "no readable run.json" in problems(folder, recipe, resume=True)["training.output_dir"]
    record("training")
    (checkpoint / "trainer_state.json").unlink()
    assert "no complete checkpoint" in problems(folder, recipe, resume=True)["training.output_dir"]


def test_a_folder_with_something_elses_run_is_left_alone(folder, recipe, record, checkpoint):
    assert "something else" in problems(folder, recipe)["training.output_dir"]
    shutil.move(checkpoint / "trainer_state.json", folder / "out" / "run.json")
    assert "something else" in problems(folder, recipe)["training.output_dir"]
    assert load_recipe(write_recipe(folder, recipe), overwrite=True)


class Runs:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "cut": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another": lambda path: torch.save([1], path) if path.suffix != ".json" else path.write_text("[1]"),
}
FILES = ["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trainer_state.json", "training_args.bin"]  # fmt: skip
DAMAGED = [
    *((name, "cut") for name in FILES),
    *((name, "another") for name in FILES if name != "training_args.bin"),  # nothing reads what that holds
    *((name, how) for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt")
      for how in ("empty", "noise", "folder", "pipe")),
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "how"), DAMAGED)
def test_resume_passes_over_a_damaged_checkpoint(folder, recipe, record, checkpoint, name, how):
    record("training")
    DAMAGE[how](checkpoint / name)
    found = problems(folder, recipe, resume=True)["training.output_dir"]
    assert f"nothing to resume: checkpoint-2 is damaged: {name} cannot be read" in found and "Traceback" not in found
    write_checkpoint(folder / "out" / "checkpoint-1")
    try:
        assert load_recipe(write_recipe(folder, recipe), resume=True)
        whole, damaged = last_whole_checkpoint(folder / "out")
        assert whole.name == "checkpoint-1" and len(damaged) == 1 and name in damaged[0]
    finally:
        shutil.rmtree(folder / "out" / "checkpoint-1")


@pytest.mark.parametrize(
    "state", ["{}", '{"global_step": 3, "epoch": 1.0, "log_history": []}', '{"global_step": 2, "epoch": "x"}',
              '{"global_step": 2, "epoch": 1, "log_history": {}}', '{"global_step": 2, "epoch": 1, "x": 1}',
              "[" * 100_000, '{"epoch": ' + "9" * 5000 + "}", "\xff"],
)  # fmt: skip
def test_resume_passes_over_a_state_of_another_run(folder, recipe, record, checkpoint, state):
    record("training")
    (checkpoint / "trainer_state.json").write_text(state, encoding="latin-1")
    assert "trainer_state.json cannot be read" in problems(folder, recipe, resume=True)["training.output_dir"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_looking_at_a_checkpoint_runs_nothing_in_it(folder, recipe, record, checkpoint, monkeypatch, name):
    monkeypatch.chdir(folder)
    record("training")
    torch.save({"state": Runs()}, checkpoint / name)
    if name != "training_args.bin":
        assert f"{name} cannot be read" in problems(folder, recipe, resume=True)["training.output_dir"]
    else:
        assert load_recipe(write_recipe(folder, recipe), resume=True)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [("optimizer.pt", "no state of the optimizer"), ("scheduler.pt", "no state of the learning rate schedule"),
     ("rng_state.pth", "no state of the random number generators")],
)  # fmt: skip
def test_what_a_checkpoint_lacks_is_told(checkpoint, missing, said):
    assert what_it_lacks(checkpoint) == []
    (checkpoint / missing).unlink()
    (found,) = what_it_lacks(checkpoint)
    assert said in found and "begins anew" in found


def test_another_number_of_processes_is_told(checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = what_it_lacks(checkpoint)
    assert "checkpoint-2 was written by 1 process(es), and 2 go on from it" in found
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    assert what_it_lacks(checkpoint) == []


def test_a_number_of_processes_that_is_none_counts_for_nothing(checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert what_it_lacks(checkpoint) == []


def test_a_checkpoint_whose_weights_are_not_those_that_were_saved_is_passed_over(folder, recipe, record, checkpoint):
    record("training")
    weights = checkpoint / "adapter_model.safetensors"
    settings = {"checkpoint": {"id": new_id(), "files": {weights.name: checksum(load_file(weights))}}}
    (checkpoint / "adapter_config.json").write_text(json.dumps(settings))
    assert load_recipe(write_recipe(folder, recipe), resume=True)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = problems(folder, recipe, resume=True)["training.output_dir"]
    assert "adapter_model.safetensors cannot be read" in found and "is damaged" in found


def test_a_checkpoint_without_weights_is_passed_over(folder, recipe, record, checkpoint):
    record("training")
    (checkpoint / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in problems(folder, recipe, resume=True)["training.output_dir"]


def test_resume_refuses_another_recipe(folder, recipe, record, checkpoint):
    record("training")
    found = problems(folder, recipe, "mixture.r=4", "data.shouting.weight=1", resume=True)
    assert set(found) == {"mixture.r", "data.shouting.weight"}
    assert "was 2 when the run began" in found["mixture.r"]
    assert load_recipe(write_recipe(folder, recipe), ["training.max_steps=8"], resume=True).training["max_steps"] == 8


def test_resume_refuses_fewer_steps_than_the_checkpoint_has(folder, recipe, record, checkpoint):
    record("training")
    found = problems(folder, recipe, "training.max_steps=1", resume=True)["training.max_steps"]
    assert found == "checkpoint-2 is beyond it; give 2 to end the run there, or more to train on"
    assert load_recipe(write_recipe(folder, recipe), ["training.max_steps=2"], resume=True)


@pytest.mark.parametrize(
    ("override", "epoch", "is_done"),
    [("training.max_steps=4", 0.1, True), ("training.max_steps=2", 0.1, True), ("training.max_steps=5", 0.1, False),
     ("training.max_steps=-1", 3.0, True), ("training.max_steps=-1", 2.9, False)],
)  # fmt: skip
def test_a_run_that_is_done_is_not_resumed(folder, recipe, record, checkpoint, override, epoch, is_done):
    path = folder / "out" / "run.json"
    record("finished")
    write_json(path, json.loads(path.read_text()) | {"steps": 4})
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "epoch": epoch, "log_history": []}))
    if is_done:
        found = problems(folder, recipe, override, resume=True)["training.output_dir"]
        assert "finished, at step 4; raise training.max_steps" in found
    else:
        assert load_recipe(write_recipe(folder, recipe), [override], resume=True)


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    class Unwritable:
        def __str__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": Unwritable()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
