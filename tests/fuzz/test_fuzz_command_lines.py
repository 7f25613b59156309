"""Any command line ends with what is wrong in a few lines and a status of 2, or does what it says; nothing is read that
never ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import at_most, examples, lay_out, words
from tiny import save_tiny_adapter, tiny_recipe, write_recipe

from moelora.cli.commands import COMMANDS, main
from moelora.schema import settable_fields, type_hints

GOOD = [
    "adapter",
    "model",
    "recipe.yaml",
    "counting.jsonl",
    "code=counting.jsonl",
    "new=shouting.jsonl",
    "out",
    "0",
    "0,1",
    "1",
]
SECONDS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small adapter, its base and a recipe among hostile files; the model is never loaded."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_tiny_adapter(folder)
    recipe = tiny_recipe(folder)
    recipe["training"]["output_dir"] = "trained"
    write_recipe(folder, recipe)
    lay_out(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    """No model is loaded, for that takes time, and nothing is wrong with the command line any more by then."""
    monkeypatch.chdir(folder)
    for place in ("storage.finding", "training.run", "cli.build", "cli.export", "serving.verify.in_transformers"):
        monkeypatch.setattr(f"moelora.{place}.load_model", _end)
    monkeypatch.setattr("moelora.serving.transformers_server.Server", _end)


class LoadsError(Exception):
    """Everything was in order, so that the model would be loaded."""


def _end(*arguments, **options):
    raise LoadsError


@st.composite
def command_lines(draw):
    """A command with options of its own, most of them, and values that fit or do not."""
    name = draw(st.sampled_from([*COMMANDS, "nothing", ""]))
    values = st.sampled_from(GOOD) | words
    if name not in COMMANDS:
        return [name, *draw(st.lists(values, max_size=3))]
    cls = COMMANDS[name][0]
    hints, arguments = type_hints(cls), [name]
    for field, spec in settable_fields(cls).items():
        flag = f"--{field.replace('_', '-')}"
        if spec.metadata.get("positional"):
            arguments.append(draw(values))
        elif draw(st.integers(0, 2)) == 0:
            continue
        elif hints[field] is bool:
            arguments.append(flag)
        else:
            arguments += [f"{flag}={value}" for value in draw(st.lists(values, min_size=1, max_size=2))]
    return [*arguments, *draw(st.lists(words, max_size=1))]


def run(arguments, capsys):
    """The status of a command line, once what it printed was looked at."""
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    except LoadsError:
        status = 0
    printed = "".join(capsys.readouterr())
    assert status in (0, 2), arguments
    assert "Traceback" not in printed and not any(mark in printed for mark in "\x1b\x00\u202e"), arguments
    return status


@pytest.mark.timeout(0)
@examples()
@given(arguments=command_lines())
def test_any_command_line_ends_with_a_word(arguments, request):
    capsys = request.getfixturevalue("capsys")
    with at_most(SECONDS):
        run(arguments, capsys)
