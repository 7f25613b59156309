"""Any recipe and any `--set` is read or refused with what is wrong, soon, and runs nothing."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from strategies import at_most, examples, lay_out, words
from tiny import tiny_recipe, write_recipe
from transformers import TrainingArguments

from moelora import MoELoraConfig
from moelora.recipe import DomainOptions, ModelOptions
from moelora.schema import settable_fields
from moelora.training import Recipe, RecipeError, load_recipe

SECONDS = 10
SNIPPETS = [
    *(
        "&a",
        "*a",
        "<<: *a",
        "!!int",
        "!!map",
        "!!binary",
        "!!python/object:os.system",
        "!x",
        "- ",
        "? ",
        ": ",
        "[",
        "]",
    ),
    *("{", "}", "|", ">", '"', "'", "#", "\t", "\n", "\n  ", "---\n", "...", "%YAML 1.2\n", "2024-13-45", "12:30:45"),
    *(
        "~",
        ".nan",
        ".inf",
        "yes",
        "0o17",
        "0b1",
        "1" * 5000,
        "[" * 200,
        "{a: " * 200,
        "\\ud800",
        '"\\ud800"',
        "\x85",
        "é",
    ),
]
SECTIONS = {"": Recipe, "model.": ModelOptions, "data.counting.": DomainOptions, "mixture.": MoELoraConfig,
            "training.": TrainingArguments}  # fmt: skip
# What these say is fetched, imported or shared with other processes when arguments are made: not for a test.
LEFT_OUT = {"training.deepspeed", "training.accelerator_config", "training.fsdp_config", "training.push_to_hub",
            "training.fsdp", "training.report_to", "training.use_cpu", "training.logging_dir"}  # fmt: skip
KEYS = [f"{prefix}{name}" for prefix, cls in SECTIONS.items() for name in settable_fields(cls)]
values = words | st.sampled_from(SNIPPETS) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
).map(lambda value: yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip())  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_recipe(folder, tiny_recipe(folder))
    lay_out(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def read(path, *overrides):
    """Read a recipe, which is refused or not."""
    with at_most(SECONDS):
        try:
            recipe = load_recipe(path, overrides)
        except RecipeError as error:
            assert error.problems and "\x1b" not in str(error) and "\0" not in str(error)
        else:
            assert isinstance(recipe, Recipe)


@st.composite
def settings_of(draw):
    """A few of `--set`, for keys that there are and others."""
    keys = st.sampled_from([key for key in KEYS if key not in LEFT_OUT]) | st.sampled_from(list(SECTIONS)) | words
    return [f"{draw(keys)}={draw(values)}" for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.timeout(0)
@examples(0.5)
@given(overrides=settings_of())
def test_any_setting_is_taken_or_refused(folder, overrides):
    read(folder / "recipe.yaml", *overrides)


@st.composite
def torn(draw, text):
    """A text with pieces replaced by others, longer or shorter."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = start + draw(st.sampled_from([0, 0, 1, 4, 40]))
        text = text[:start] + draw(st.sampled_from(SNIPPETS) | words) + text[stop:]
    return text


@pytest.mark.timeout(0)
@examples(0.5)
@given(data=st.data())
def test_any_file_is_taken_or_refused(folder, data):
    text = data.draw(torn((folder / "recipe.yaml").read_text()))
    path = folder / "torn.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape" if "\udcff" in text else "replace")
    read(path)
