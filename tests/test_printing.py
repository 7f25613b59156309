"""Names, paths and texts that are printed: no markup, nothing that a terminal obeys, commands that can be pasted."""

import io
import json
import shlex
import warnings

import pytest
from rich.table import Table
from tiny import tiny_tokenizer

from moelora.cli.commands import main
from moelora.cli.generate import _Printer
from moelora.cli.operation import Plan, carry_out
from moelora.cli.options import OperationOptions
from moelora.console import make_stdout, number_from_launcher, printable, track
from moelora.schema import Problem, RecipeError

HOSTILE = "[v2] [/b] :smile: \x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp.exe \r"


def is_harmless(text):
    """Whether a terminal shows a text and obeys none of it."""
    return not any(character in text for character in "\x1b\x07\x9b\u202e\r\x7f\x00")


def write_one(folder):
    (folder / "file").touch()


def test_what_steers_a_terminal_is_shown_and_the_rest_stays():
    assert printable(HOSTILE) == (r"[v2] [/b] :smile: \x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp.exe " + "\\r")
    assert printable("a\nb\tc") == r"a\nb\tc" and printable("a\nb\tc\x85", lines=True) == "a\nb\tc\\x85"
    kept = "é → 漢字 👩\u200d💻 क्\u200dष"
    assert printable(kept) == kept
    assert printable("\udcff\ud800") == r"\udcff\ud800"


@pytest.mark.parametrize("where", ["line", "cell", "head", "title"])
def test_a_console_prints_markup_and_escapes_as_text(capsys, monkeypatch, where):
    monkeypatch.setenv("COLUMNS", "200")
    table = Table(title=HOSTILE if where == "title" else "title", min_width=150)
    table.add_column(HOSTILE if where == "head" else "head")
    table.add_row(HOSTILE if where == "cell" else "cell")
    make_stdout().print(HOSTILE if where == "line" else table)
    printed = capsys.readouterr().out
    assert r"[v2] [/b] :smile: \x1b[2J" in printed and is_harmless(printed)


def test_a_progress_bar_names_what_it_is_given(capsys):
    assert list(track([1, 2], f"Reading {HOSTILE}")) == [1, 2]
    printed = capsys.readouterr().err
    assert "Reading [v2] [/b]" in printed and is_harmless(printed)


@pytest.mark.parametrize("name", ["run[v2]", "a [/b]", "it's", "new\nline", "\x1b[31m"])
def test_an_operation_prints_where_it_wrote_and_a_command_that_brings_back(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    plan = Plan(f"Write {name}", (name,), [(name,)], [f"To {name}."])
    for _ in range(2):
        carry_out(OperationOptions(out=name, overwrite=True), plan, write_one)
    printed = capsys.readouterr().out
    assert is_harmless(printed) and f"Written: {printable(name)}\n" in printed
    command = next(line.partition("to bring it back: ")[2] for line in printed.splitlines() if "bring it back" in line)
    assert f"{printable(name)}.backup-1; to bring it back" in printed
    if printable(name) == name:
        assert shlex.split(command) == ["moelora", "undo", name]
        assert main(shlex.split(command)[1:]) == 0
        assert f"{name}.backup-1 -> {name}" in capsys.readouterr().out


def test_inspect_shows_hostile_folders_and_json_keeps_their_names(adapter_folder, capsys):
    folder = adapter_folder()
    name = HOSTILE.replace("/", "|")
    (folder / "adapter").rename(folder / name)
    assert main(["inspect", name]) == 0
    printed = capsys.readouterr().out
    assert printable(name).strip() in printed and is_harmless(printed)
    assert main(["inspect", name, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["folder"] == name and is_harmless(printed)


@pytest.mark.parametrize("arguments", [["undo", "a\x1b[2J[/b]"], ["inspect", ".", "\x1b[2J[/b]"], ["\x1b[2J[/b]"]])
def test_errors_quote_arguments_harmlessly(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J[/b]" in error and is_harmless(error)


def test_a_problem_names_its_key_and_fix_harmlessly():
    error = RecipeError("re\x1bcipe", [Problem("mixture.\x1b[2J\nx", "\u202e", "only \x9b1m\nsecond line")])
    assert str(error) == ("re\\x1bcipe: 1 problem\n  mixture.\\x1b[2J\\nx = '\\u202e'\n    only \\x9b1m\nsecond line")


def test_warnings_of_a_command_quote_names_harmlessly(tmp_path, monkeypatch, capsys):
    def warn(options):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            warnings.warn("router \x1b[2J", stacklevel=1)

    def show(message, category, filename, lineno, file=None, line=None):  # pytest's own keeps warnings to itself
        print(warnings.formatwarning(message, category, filename, lineno, line))

    monkeypatch.setattr("moelora.cli.operation.undo", warn)
    assert main(["undo", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert r"router \x1b[2J" in printed and is_harmless(printed)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("kind", "expected"), [(Terminal, "\\x1b[2J\n[/b]\n"), (io.StringIO, "\x1b[2J\n[/b]\n")])
def test_text_of_a_model_steers_no_terminal_and_is_exact_elsewhere(monkeypatch, kind, expected):
    tokenizer, out = tiny_tokenizer(), kind()
    monkeypatch.setattr("sys.stdout", out)
    printer = _Printer(tokenizer)
    for token in tokenizer("\x1b[2J\n[/b]", return_tensors="pt")["input_ids"][0]:
        printer.put(token[None])
    printer.end()
    assert out.getvalue() == expected


@pytest.mark.parametrize(("value", "number"), [("3", 3), ("", 7), ("many", 7), ("²", 7), (None, 7)])
def test_what_a_launcher_says_is_a_number_or_counts_for_nothing(monkeypatch, value, number):
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert number_from_launcher("RANK", 7) == number
