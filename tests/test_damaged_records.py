"""run.json, operation.json and training logs of any shape: passed over with a word, never a traceback."""

import json

import pytest
from tiny import tiny_recipe, write_recipe

from moelora.cli.commands import main
from moelora.report.history import history_of, read_history
from moelora.storage.run_record import learned_domains, noted_base, read_record, write_json
from moelora.training import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What run.json says of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(write_recipe(folder, tiny_recipe(folder))).as_dict()
    sizes = {"train_blocks": 3, "train_tokens": 90, "loss_before": 2.0, "loss_after": None}
    return {
        "status": "finished",
        "steps": 4,
        "recipe": recipe,
        "domains": {"counting": sizes},
        "seconds": {},
        "log": [],
    }


def at(record, path, value):
    """The record with another value at a dotted path."""
    record = json.loads(json.dumps(record, default=str))
    *parents, last = path.split(".")
    place = record
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[int(last) if isinstance(place, list) else last] = value
    return record


NO_TEXT, NO_MAPPING = [7, [1], {"a": 1}, True, None], [7, "x", [1], True, None]
WRONG = {
    "status": NO_TEXT,
    "steps": ["x", [1], {"a": 1}, None],
    "recipe": NO_MAPPING,
    "recipe.model": NO_MAPPING,
    "recipe.model.name": [*NO_TEXT, ""],
    "recipe.data": [7, "x", [1], {"a": 1}, None],
    "recipe.data.0": NO_MAPPING,
    "recipe.data.0.path": NO_TEXT,
    "recipe.data.0.eval_fraction": ["x", 2, None],
    "recipe.data.0.unheard_of": [1],
    "recipe.block_size": ["x", 1, 10**30, None],
    "recipe.mixture": NO_MAPPING,
    "recipe.training": NO_MAPPING,
    "domains": NO_MAPPING,
    "domains.counting": NO_MAPPING,
    "domains.counting.loss_before": ["x", [1], {"a": 1}],
    "seconds": NO_MAPPING,
    "learned_before": [7, "x", [1], {"a": 1}, None],
}


@pytest.mark.parametrize("place", WRONG)
def test_a_run_of_wrong_types_is_passed_over_and_said_once(tmp_path, run, capsys, place):
    for number, value in enumerate(WRONG[place]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_json(folder / "run.json", at(run, place, value))
        assert read_record(folder) is None and learned_domains(folder) == [] and noted_base(folder) is None
        assert read_history(folder) is None
        assert capsys.readouterr().err.count(f"{folder / 'run.json'} is damaged and passed over") == 1, value


def test_a_whole_run_is_read(tmp_path, run, capsys):
    write_json(tmp_path / "run.json", run)
    assert read_record(tmp_path)["steps"] == 4 and len(learned_domains(tmp_path)) == 2
    assert noted_base(tmp_path)["name"] == run["recipe"]["model"]["name"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"status": ' + "9" * 5000 + "}", "\xff", "\x1b[2J"])
@pytest.mark.parametrize("name", ["run.json", "operation.json"])
def test_records_that_are_no_json_are_passed_over(tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert learned_domains(tmp_path) == [] and noted_base(tmp_path) is None
    said = capsys.readouterr().err
    assert f"{name} is damaged and passed over" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "operation",
    [[1], {"base": 7}, {"base": {"name": 7}}, {"base": {"name": "x", "else": 1}}, {"base": []},
     {"learned_before": 7}, {"learned_before": [7]}, {"learned_before": [{"name": "a"}]}],
)  # fmt: skip
def test_an_operation_of_wrong_types_is_passed_over(tmp_path, capsys, operation):
    write_json(tmp_path / "operation.json", operation)
    assert learned_domains(tmp_path) == [] and noted_base(tmp_path) is None
    assert "operation.json is damaged and passed over" in capsys.readouterr().err


def test_commands_work_on_an_adapter_whose_records_are_damaged(adapter_folder, capsys):
    folder = adapter_folder()
    (folder / "adapter" / "run.json").write_text('{"status": 1, "recipe": [], "domains": []}')
    (folder / "adapter" / "operation.json").write_text('{"base": "x"}')
    data = ["--data", "counting=counting.jsonl", "--base", "model"]
    assert main(["prune", "adapter", "--drop", "0", *data, "--out", "out"]) == 0
    assert main(["generate", "--adapter", "adapter", "--prompt", "a", "--max-new-tokens", "1", "--base", "model"]) == 0
    said = capsys.readouterr().err
    assert said.count("adapter/run.json is damaged and passed over") == 1


ENTRY = {"expert_load": [0.5, None], "maturity": [0.0, 0.0], "entropy": None, "top1_probability": 1.0, "dropped": 0.0,
         "balancing_loss": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "log",
    [7, "x", {"a": 1}, [7], [[1]], [{"routers": 7}], [{"routers": {"a": 7}}], [{"routers": {"a": ENTRY}}],
     [{"step": "x", "routers": {"a": ENTRY}}], [{"step": 1, "routers": {"a": {"expert_load": [1]}}}],
     [{"step": 1, "routers": [ENTRY]}], [{"step": 1, "routers": {"a": ENTRY | {"expert_load": 1.0}}}],
     [{"step": 1, "routers": {"a": ENTRY | {"entropy": "x"}}}],
     [{"step": 1, "routers": {"a": ENTRY | {"maturity": ["x"]}}}]],
)  # fmt: skip
def test_logs_of_other_shapes_are_no_history(log):
    assert history_of(log) is None
    good = {"step": 3, "routers": {"a": ENTRY}}
    if isinstance(log, list):
        assert history_of([*log, good]).steps == [3]


@pytest.mark.parametrize("state", ["{", "7", "[]", '{"log_history": 7}', '{"log_history": [7]}', "[" * 100_000])
def test_states_of_other_shapes_hold_no_history(tmp_path, state):
    (tmp_path / "trainer_state.json").write_text(state)
    assert read_history(tmp_path) is None
