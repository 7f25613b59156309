"""Which folder a run may write into, and what --resume goes on from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import problems, write_jsonl, write_recipe

from moelora.training import load_recipe
from moelora.training.record import write_json


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
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, path / "adapter_model.safetensors")
    yield path
    shutil.rmtree(path)


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


def test_resume_refuses_a_damaged_checkpoint(folder, recipe, record, checkpoint):
    record("training")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"\x10\0\0")
    assert "checkpoint-2 is damaged" in problems(folder, recipe, resume=True)["training.output_dir"]


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
    (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
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
