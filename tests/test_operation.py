"""What every operation on experts shares: checks, dry run, whole folders, backups and undo."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import mixture_of
from peft import PeftModel, get_peft_model
from tiny import DATA, save_tiny_model, tiny_recipe, write_recipe
from transformers import AutoModelForCausalLM

import moelora.cli.operation
from moelora import MoELoraConfig
from moelora.cli.commands import main
from moelora.cli.operation import Plan, carry_out, check_only_read, check_output, read_source
from moelora.cli.options import OperationOptions
from moelora.files.staging import kept_numbers
from moelora.recipe import DomainOptions, ModelOptions
from moelora.report.history import read_history
from moelora.schema import UserError, at_least, option
from moelora.storage.finding import find_base
from moelora.storage.run_record import noted_base, record_of, write_json


@dataclass(frozen=True, kw_only=True)
class HalveOptions(OperationOptions):
    """An operation for tests."""

    keep: int = option("experts to keep", default=1, check=at_least(1))


PLAN = Plan("Halve", ("expert", "norm"), [("0", "1.5"), ("1", "0.25")], ["Nothing else changes."])


def write_one(folder):
    (folder / "adapter_config.json").write_text("{}")
    return {"loss": 1.5}


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    options = HalveOptions(out=str(tmp_path / "out"), dry_run=True)
    assert carry_out(options, PLAN, lambda _: pytest.fail("worked")) is None
    text = capsys.readouterr().out
    assert "Halve" in text and "0.25" in text and "Nothing else changes." in text
    assert f"Dry run: nothing was written to {tmp_path / 'out'}." in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    options = HalveOptions(out=str(tmp_path / "out"), dry_run=True, overwrite=True)
    assert carry_out(options, PLAN, lambda _: pytest.fail("worked")) is None
    assert f"what it holds would be kept in {tmp_path / 'out.backup-1'}." in capsys.readouterr().out


def test_the_folder_says_what_made_it(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "adapter_model.safetensors").write_bytes(b"abc")
    options = HalveOptions(out=str(tmp_path / "deep" / "out"))
    out = carry_out(
        options, PLAN, write_one, inputs=[tmp_path / "in"], base=ModelOptions(name="base", dtype="bfloat16")
    )
    record = json.loads((out / "operation.json").read_text())
    assert record["operation"] == "halve"
    assert record["options"]["keep"] == 1
    assert record["outcome"] == {"loss": 1.5}
    assert record["inputs"][str(tmp_path / "in")].startswith("ba7816bf")  # SHA-256 of "abc"
    assert record["base"]["dtype"] == "bfloat16"
    assert record["environment"]["packages"]["torch"]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out"]
    assert out.stat().st_mode & 0o700 == 0o700


def test_what_an_operation_left_inside_a_run_is_not_of_that_run(tmp_path):
    values = {"expert_load": [1.0], "maturity": [0.0], "entropy": 0.0, "top1_probability": 1.0, "dropped": 0.0,
              "balancing_loss": 1.0}  # fmt: skip
    log = [{"step": 1, "loss": 2.0, "routers": {"": values}}]
    recipe = {"model": {"name": "run's base"}, "data": [], "training": {}}
    run = {"status": "finished", "recipe": recipe, "domains": {}, "log": log}
    write_json(tmp_path / "run.json", run)
    (tmp_path / "checkpoint-1").mkdir()
    assert noted_base(tmp_path / "checkpoint-1") == {"name": "run's base"}
    assert read_history(tmp_path / "checkpoint-1").steps == read_history(tmp_path).steps == [1]
    out = carry_out(
        HalveOptions(out=str(tmp_path / "half")), PLAN, write_one, inputs=[], base=ModelOptions(name="another")
    )
    assert noted_base(out)["name"] == "another"
    assert record_of(out) is None and read_history(out) is None


def test_failing_work_leaves_the_old_folder_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()

    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        carry_out(HalveOptions(out=str(out), overwrite=True), PLAN, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


def test_overwriting_keeps_a_backup_that_undo_brings_back(tmp_path, capsys):
    out = tmp_path / "out"
    carry_out(HalveOptions(out=str(out)), PLAN, lambda folder: (folder / "first").touch())
    options = HalveOptions(out=str(out), overwrite=True)
    check_output(options)
    carry_out(options, PLAN, lambda folder: (folder / "second").touch())
    assert (out / "second").exists() and (tmp_path / "out.backup-1" / "first").exists()
    assert f"moelora undo {out}" in capsys.readouterr().out
    assert main(["undo", str(out), "--dry-run"]) == 0
    assert (out / "second").exists()
    assert main(["undo", str(out)]) == 0
    assert (out / "first").exists() and (tmp_path / "out.undone-1" / "second").exists()
    assert not (tmp_path / "out.backup-1").exists()
    assert main(["undo", str(out)]) == 2
    assert "nothing to undo" in capsys.readouterr().err


def test_a_second_backup_does_not_replace_the_first(tmp_path):
    options = HalveOptions(out=str(tmp_path / "out"), overwrite=True)
    for name in ("first", "second", "third"):
        carry_out(options, PLAN, lambda folder, name=name: (folder / name).touch())
    assert (tmp_path / "out.backup-1" / "first").exists()
    assert (tmp_path / "out.backup-2" / "second").exists()
    main(["undo", str(tmp_path / "out")])
    main(["undo", str(tmp_path / "out")])
    assert (tmp_path / "out" / "first").exists()


def test_every_problem_is_told_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").touch()
    with pytest.raises(UserError) as stop:
        check_output(HalveOptions(out=str(tmp_path / "out"), keep=0))
    assert "--keep = 0" in str(stop.value) and "must be 1 or greater" in str(stop.value)
    assert "--overwrite to replace it" in str(stop.value)
    check_output(HalveOptions(out=str(tmp_path / "out"), overwrite=True))
    check_output(HalveOptions(out=str(tmp_path / "new" / "deep")))
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="--out"):
            check_output(HalveOptions(out=str(tmp_path / place), overwrite=True))
    with pytest.raises(UserError, match="--out = ''"):
        check_output(HalveOptions(out="", overwrite=True))
    if os.geteuid() != 0:
        (tmp_path / "out").chmod(0o500)
        with pytest.raises(UserError, match="may be written"):
            check_output(HalveOptions(out=str(tmp_path / "out" / "below")))


def test_what_only_looks_like_a_number_is_no_backups(tmp_path):
    (tmp_path / "out.backup-²").mkdir()
    (tmp_path / "out.backup-2").mkdir()
    assert kept_numbers(tmp_path / "out", "backup") == [2]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make another")
def test_a_folder_that_cannot_be_made_is_refused_though_permissions_allow_it(tmp_path, capsys):
    with pytest.raises(UserError, match="/proc is no folder that may be written"):
        check_output(HalveOptions(out="/proc/x/y"))
    recipe = tiny_recipe(tmp_path)
    recipe["training"]["output_dir"] = "/proc/x"
    assert main(["train", str(write_recipe(tmp_path, recipe))]) == 2
    assert "may not be written to" in capsys.readouterr().err


ENTRY = {"name": "default", "active": 0, "config": {"peft_type": "MOELORA", "num_experts": 2}}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"name": "default", "active": 0}], "entry 0 of `adapters`"),
        ([ENTRY, ENTRY | {"config": None}], "entry 1 of `adapters`"),
        ([ENTRY, {"active": None, "config": {}}], "no usable `name`"),
        (["default"], "no usable `name`"),
        ([ENTRY | {"active": None}], "no active adapter"),
        ([ENTRY | {"config": {"num_experts": 1}}], "`num_experts` (1) is not valid"),
    ],
)
def test_a_damaged_list_of_adapters_is_refused(tmp_path, capsys, entries, expected):
    base = save_tiny_model(tmp_path / "base")
    config = MoELoraConfig(r=2, num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.add_adapter("more", config)
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": entries}))
    with pytest.raises(ValueError, match=re.escape(expected)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    for command in (["inspect"], ["generate", "--prompt", "a", "--adapter"]):
        assert main([*command, str(tmp_path / "adapter")]) == 2, command
        assert expected in capsys.readouterr().err


def test_a_folder_without_an_adapter_is_named_without_a_flag_that_is_none(tmp_path, capsys):
    data = ["--data", f"a={tmp_path / 'a.txt'}", "--out", str(tmp_path / "out")]
    (tmp_path / "a.txt").write_text("Some text.")
    for place, expected in (("gone", "no such folder"), ("", "no adapter_config.json")):
        for command in (["inspect"], ["prune", *data, "--keep", "1"], ["distil", *data, "--r", "2"]):
            assert main([*command, str(tmp_path / place)]) == 2
            error = capsys.readouterr().err
            assert str(tmp_path / place) in error and expected in error and "--adapter" not in error, error


def test_a_source_is_checked_against_its_base_without_loading_it(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = MoELoraConfig(r=2, num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    source = read_source(tmp_path / "adapter")
    assert source.base.name == str(base) and source.stored[0].num_experts == 2
    loaded = source.load()
    assert isinstance(loaded, PeftModel) and not loaded.training
    other = save_tiny_model(tmp_path / "other", hidden_size=16)
    with pytest.raises(UserError, match="was not trained on"):
        read_source(tmp_path / "adapter", str(other))
    with pytest.raises(UserError, match="no such folder"):
        read_source(tmp_path / "gone")


@pytest.mark.parametrize("fits", [True, False])
def test_an_adapter_that_another_process_replaces_while_it_is_read_is_told(adapter_folder, capsys, monkeypatch, fits):
    """As a second `prune --overwrite` of the same folder does, which is a moment ahead."""
    folder = adapter_folder()
    assert main(["prune", "adapter", "--drop", "0", *DATA, "--out", "smaller"]) == 0
    load = moelora.cli.operation.load_mixture

    def overtaken(base, place):
        (folder / "adapter").rename(folder / "adapter.backup-1")
        (folder / ("smaller" if fits else "model")).rename(folder / "adapter")
        return load(base, place)

    monkeypatch.setattr("moelora.cli.operation.load_mixture", overtaken)
    base = ["--base", str(save_tiny_model(folder / "base"))]
    assert main(["prune", "adapter", "--drop", "1", *DATA, *base, "--out", "adapter", "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "moelora: the adapter adapter: another process has replaced or changed it while it was read; run" in said
    assert {path.name for path in folder.glob("adapter*")} == {"adapter", "adapter.backup-1"}


def test_a_base_noted_by_an_operation_is_found(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    model = mixture_of("llama")
    options = HalveOptions(out=str(tmp_path / "out"))
    noted = ModelOptions(name=str(base), dtype="bfloat16")
    out = carry_out(options, PLAN, lambda folder: model.save_pretrained(str(folder)), base=noted)
    assert find_base(out, None) == noted


def test_a_folder_that_somebody_else_has_written_meanwhile_is_kept(tmp_path):
    def overtaken(folder):
        write_one(folder)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("theirs")
        return {}

    with pytest.raises(UserError, match="another process"):
        carry_out(HalveOptions(out=str(tmp_path / "out")), PLAN, overtaken)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "theirs"]


def test_a_folder_that_holds_what_is_read_is_not_replaced(tmp_path):
    adapter = tmp_path / "runs" / "adapter"
    adapter.mkdir(parents=True)
    options = HalveOptions(out=str(tmp_path / "runs"), overwrite=True)
    with pytest.raises(UserError, match="is only read"):
        carry_out(options, PLAN, write_one, inputs=[adapter])
    assert adapter.is_dir()


@dataclass(frozen=True, kw_only=True)
class InPlaceOptions(HalveOptions):
    """An operation whose result may take the adapter's place."""

    @property
    def in_place(self):
        return True


@pytest.mark.parametrize("given", ["out/text.jsonl", "*/text.jsonl", "link.jsonl", "out"])
@pytest.mark.parametrize("kind", [HalveOptions, InPlaceOptions])
def test_a_folder_that_holds_texts_is_not_replaced(tmp_path, given, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out" / "text.jsonl")
    texts = DomainOptions(name="a", path="elsewhere", eval_path=str(tmp_path / given))
    with pytest.raises(UserError, match="is only read, and would be put aside"):
        check_only_read(kind(out=str(tmp_path / "out"), overwrite=True), [], None, [texts])


def test_a_folder_among_texts_is_not_written(tmp_path):
    texts = DomainOptions(name="a", path=str(tmp_path / "texts"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").touch()
    options = HalveOptions(out=str(tmp_path / "texts" / "new" / "out"))
    with pytest.raises(UserError, match=r"lies in .*texts, where `datasets` would read the files written as texts"):
        check_only_read(options, [], None, [texts])


@pytest.mark.parametrize("told_by", ["train.jsonl", "train/a.jsonl", "dataset_info.json"])
def test_a_folder_beside_texts_that_are_told_apart_is_written(tmp_path, told_by):
    (tmp_path / told_by).parent.mkdir(exist_ok=True)
    (tmp_path / told_by).touch()
    check_only_read(HalveOptions(out=str(tmp_path / "out")), [], None, [DomainOptions(name="a", path=str(tmp_path))])


@pytest.mark.parametrize("given", ["adapter", "link", "adapter/../adapter"])
def test_a_folder_that_is_read_is_not_replaced(tmp_path, given):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "link").symlink_to(adapter)
    options = HalveOptions(out=str(adapter), overwrite=True)
    for read in ({"inputs": [tmp_path / given]}, {"base": ModelOptions(name=str(tmp_path / given))}):
        with pytest.raises(UserError, match=r"is .*, which is only read, and would be put aside; give another folder"):
            carry_out(options, PLAN, lambda _: pytest.fail("worked"), **read)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "link"]


def test_a_link_to_what_is_read_is_replaced_alone(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    options = HalveOptions(out=str(tmp_path / "link"), overwrite=True)
    carry_out(options, PLAN, write_one, inputs=[tmp_path / "adapter"])
    assert (tmp_path / "adapter" / "old").is_file() and not (tmp_path / "link").is_symlink()


def test_a_folder_with_the_name_of_a_hub_id_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = ModelOptions(name="owner/base")
    assert carry_out(HalveOptions(out="owner/base"), PLAN, write_one, inputs=["owner/base"], base=base)


def test_a_place_with_dots_is_where_they_lead(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    options = HalveOptions(out=str(tmp_path / "out" / "deeper" / ".."), overwrite=True)
    assert carry_out(options, PLAN, write_one) == tmp_path / "out"
    assert (tmp_path / "out.backup-1" / "old").is_file()


def test_a_name_that_is_too_long_is_told():
    with pytest.raises(UserError, match="too long"):
        check_output(HalveOptions(out="x" * 300))


def test_a_mount_point_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(UserError, match=r"is a mount point, which nothing can take the place of; give a folder in it"):
        check_output(HalveOptions(out=str(tmp_path / "volume"), overwrite=True), [])
