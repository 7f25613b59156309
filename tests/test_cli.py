import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_recipe, write_recipe

from moelora import MoELoraCallback
from moelora.cli import options
from moelora.cli.commands import COMMANDS, build_parser, main
from moelora.cli.docs_tables import render
from moelora.experts.importing import MIXTURES
from moelora.experts.merging import METHODS
from moelora.experts.prune import CRITERIA

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "quickstart.yaml")
SLOW_TO_IMPORT = {"torch", "transformers", "peft", "datasets"}


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["train", "--help"], 0), (["prune", "x"], 2), (["distil", "gone", "--out", "x", "--r", "0"], 2)],
)
def test_help_and_mistyped_options_are_answered_at_once(arguments, status):
    command = [sys.executable, "-X", "importtime", "-m", "moelora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "moelora.cli.commands" in imported and not imported & SLOW_TO_IMPORT


def test_a_command_registers_before_it_works(tmp_path):
    program = """
import sys
sys.argv[0] = "/usr/bin/moelora"
import moelora.cli.commands
assert "peft" not in sys.modules
assert moelora.cli.commands.main(["undo", sys.argv[1]]) == 2
from peft import MoELoraConfig
assert moelora.MoELoraConfig is MoELoraConfig
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing to undo" in done.stderr


@pytest.mark.slow
def test_the_callback_and_operations_on_experts_need_no_datasets():
    program = "import sys; sys.modules['datasets'] = None; import moelora.experts; moelora.MoELoraCallback()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_options_offer_is_what_there_is():
    assert tuple(MIXTURES) == options.ROUTERS
    assert tuple(CRITERIA) == options.CRITERIA
    assert METHODS == options.METHODS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_and_a_call_that_parses(capsys, command):
    text = " ".join(help_of(capsys, command).split())
    cls, _, example = COMMANDS[command]
    for name, field in cls.__dataclass_fields__.items():
        assert name.replace("_", "-") in text.lower()
        assert " ".join(field.metadata["help"].split()) in text
    assert example in text
    build_parser().parse_args(shlex.split(example)[1:])


def test_help_shows_a_call_for_every_command(capsys):
    text = help_of(capsys)
    for _, _, example in COMMANDS.values():
        assert example in text


def test_a_bad_recipe_ends_with_status_2_and_no_traceback(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {nam: x}\n")
    assert main(["train", str(recipe)]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "did you mean `name`?" in printed.err
    assert "  training\n    missing" in printed.err
    assert printed.out == ""


def test_bad_settings_name_the_setting(tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    assert main(["train", str(path), "--set", "training.max_step=3", "--set", "mixture.num_experts=1"]) == 2
    error = capsys.readouterr().err
    assert "2 problems" in error
    assert "did you mean `max_steps`?" in error
    assert "num_experts" in error


def test_resume_without_a_run_is_refused(tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_recipe(tmp_path))
    assert main(["train", str(path), "--resume"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_resume_and_overwrite_exclude_each_other(capsys):
    assert main(["train", EXAMPLE, "--resume", "--overwrite"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "said"), [(1, "stopped\n"), (3, "stopped; --resume continues from checkpoint-2\n")])
def test_interrupting_says_how_to_go_on_if_there_is_a_checkpoint(tmp_path, capsys, monkeypatch, step, said):
    class Interrupted(MoELoraCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    monkeypatch.setattr("moelora.training.run.MoELoraCallback", Interrupted)
    assert main(["train", str(write_recipe(tmp_path, tiny_recipe(tmp_path)))]) == 130
    assert capsys.readouterr().err.endswith(f"moelora: {said}")


def test_an_unreadable_file_is_named(tmp_path, capsys, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "texts.jsonl"))

    monkeypatch.setattr("moelora.training.load.load_recipe", closed)
    assert main(["train", EXAMPLE]) == 2
    assert capsys.readouterr().err == f"moelora: {tmp_path / 'texts.jsonl'}: Permission denied\n"


def test_generate_without_an_adapter_is_refused(tmp_path, capsys):
    assert main(["generate", "--adapter", str(tmp_path / "gone"), "--prompt", "a"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "a"]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "adapter_config.json").touch()
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "a"]) == 2
    assert "try" in capsys.readouterr().err


def test_generate_checks_its_options(tmp_path, capsys):
    options = ["--max-new-tokens", "0", "--temperature", "-1"]
    assert main(["generate", "--adapter", str(tmp_path), "--prompt", "a", *options]) == 2
    error = capsys.readouterr().err
    assert "--max-new-tokens = 0" in error
    assert "--temperature = -1.0" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["prune", "adapter", "--keep", "1", "--data", "a=counting.jsonl", "--out", "loop/x"],
            "loop is no folder that may be written to",
        ),
        (["report", "--adapter", "adapter", "--data", "a=./loop", "--out", "a.html"], "no such file"),
        (["inspect", "~nobodyoftheirs"], "no such folder"),
        (["export", "~nobodyoftheirs", "--expert", "0", "--out", "out"], "no such folder"),
        (["build", "--expert", "a=~nobodyoftheirs", "--out", "out"], "~nobodyoftheirs"),
        (["inspect", "a\0b"], "must not hold a zero byte"),
        (["inspect", "\udcff"], "must be UTF-8 text"),
        (["generate", "--adapter", "adapter", "--prompt", "a\0b"], "must not hold a zero byte"),
        (["generate", "--adapter", "adapter", "--prompt", "a", "--max-new-tokens", "1" + "0" * 30], "64 bits at most"),
        (["generate", "--adapter", "adapter", "--prompt", "a", "--temperature", "1e999"], "must be a finite number"),
        (["undo", "x/" * 3000], "File name too long"),
    ],
)
def test_places_and_numbers_that_the_system_has_not_are_told(adapter_folder, capsys, arguments, said):
    folder = adapter_folder()
    (folder / "loop").symlink_to("loop")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("configuration.md", 3),
        ("training.md", 5),
        ("report.md", 2),
        ("experts-import.md", 2),
        ("experts-export.md", 1),
        ("experts-novelty.md", 1),
        ("experts-prune-merge.md", 2),
        ("experts-distil.md", 1),
        ("verify.md", 1),
    ],
)
def test_the_reference_is_up_to_date(name, tables):
    text = (Path(__file__).parent.parent / "docs" / name).read_text(encoding="utf-8")
    assert render(text) == text, f"run: python -m moelora.cli.docs_tables docs/{name}"
    assert text.count("<!-- end -->") == tables
