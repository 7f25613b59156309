"""Recipes and `--set` that no YAML is: one line that says what is wrong, soon, whatever they hold."""

import os
import re

import pytest
from tiny import problems, write_recipe

from moelora.files.opening import NotReadableError
from moelora.training import RecipeError, load_recipe
from moelora.training.recipe_file import parse_yaml

NESTED = 3000
BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9))])
VALUES = {
    "2024-13-45": "no timestamp: month must be in 1..12",
    "!!int x": "no int: invalid literal",
    "!!map x": "expected a mapping node",
    "!!float x": "no float: could not convert",
    "!!bool x": "no bool",
    "!!timestamp x": "no timestamp",
    "!!int ''": "no int",
    "!!seq x": "expected a sequence node",
    "!!binary \xe9": "failed to convert base64 data into ascii",
    "!!python/object/apply:os.system [x]": "could not determine a constructor",
    "9" * 5000: "a whole number of more than 4096 bits",
    "0x" + "f" * 5000: "a whole number of more than 4096 bits",
    "[" * NESTED: "more than 50 levels deep",
    "{a: " * NESTED: "more than 50 levels deep",
    "- " * NESTED: "more than 50 levels deep",
    '"\\0"': "must not hold a zero byte",
    '"\\ud800"': "it holds half a character",
    "a\0b": "special characters are not allowed",
    "&a [*a]": "an anchor holds itself",
    "&a {x: {y: *a}}": "an anchor holds itself",
    "*nowhere": "found undefined alias",
    BOMB: "holds more than 50,000 values",
    MERGES: "holds more than 50,000 values",
    "{[1]: 2}": "found unhashable key",
    "<<: 3": "expected a mapping or list of mappings for merging",
    "\tx: 1": "cannot start any token",
    "--- a\n--- b": "expected a single document",
    "x" * 200_001: "longer than 200,000 characters",
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", VALUES, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_a_value_that_no_recipe_needs_is_refused(folder, recipe, text):
    assert VALUES[text] in problems(folder, recipe, f"mixture.r={text}")["--set"]
    path = folder / "hostile.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="1 problem") as caught:
        load_recipe(path)
    assert VALUES[text] in caught.value.problems[0].fix


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["1" * 190_000 + "e", "1." + "1" * 190_000 + "x"])
def test_long_digits_in_a_text_do_not_take_long(text):
    assert parse_yaml(text) == text


@pytest.mark.timeout(10)
def test_a_number_of_too_many_digits_is_refused_before_it_is_computed():
    with pytest.raises(NotReadableError, match="4096 bits"):
        parse_yaml("1" * 190_000)


def test_what_recipes_need_is_read():
    assert parse_yaml("a: &a {r: 2, b: 2e-4, c: no, d: 1.}\ne: {<<: *a, r: 4}\nf: [*a, *a, -3, 0x10, 1e5]") == {
        "a": {"r": 2, "b": 2e-4, "c": "no", "d": 1.0},
        "e": {"r": 4, "b": 2e-4, "c": "no", "d": 1.0},
        "f": [{"r": 2, "b": 2e-4, "c": "no", "d": 1.0}] * 2 + [-3, 16, 1e5],
    }


@pytest.mark.parametrize("where", ["", "model.", "mixture.", "training."])
def test_keys_that_are_no_text_are_unknown(folder, recipe, where):
    section = recipe[where[:-1]] if where else recipe
    section |= {7: 1, None: 2, 2.5: 3}
    found = problems(folder, recipe)
    assert all("unknown key" in found[f"{where}{key}"] for key in (7, None, 2.5))


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", ["folder", "pipe", "device", "loop", "bytes"])
def test_a_recipe_that_is_no_text_file_is_refused(tmp_path, make):
    path = tmp_path / "recipe.yaml"
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)
    elif make == "device":
        path.symlink_to("/dev/zero")
    elif make == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match=r"no regular file|not readable as YAML|symbolic links"):
        load_recipe(path)


@pytest.mark.parametrize(
    "override", ["=", "=3", "mixture", "..=1", ".r=1", "mixture.=1", "a.b.c=1", "data.=x", "data.0.x=1"]
)
def test_settings_without_a_key_are_refused(folder, recipe, override):
    assert problems(folder, recipe, override)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("block_size=1" + "0" * 400, "block_size"),
        ("training.max_steps=1" + "0" * 30, "training.max_steps"),
        ("mixture.r=1" + "0" * 30, "mixture.r"),
        ("mixture.num_experts=-9" + "0" * 30, "mixture.num_experts"),
        ("training.weight_decay=.inf", "training.weight_decay"),
        ("training.learning_rate=.nan", "training.learning_rate"),
    ],
)
def test_numbers_that_no_tensor_takes_are_refused(folder, recipe, setting, key):
    assert key in problems(folder, recipe, setting)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f"data.counting.path=./{'x' * 300}", "File name too long"),
        (f"model.name=./{'x' * 300}", "File name too long"),
        (f"training.output_dir={'x/' * 3000}", "File name too long"),
        ("mixture.rank_pattern=7", "must be a mapping"),
        ("mixture.rank_pattern={q_proj: }", "pass a mapping of names to ranks"),
        ("mixture.target_modules=(", "or a regular expression of them"),
    ],
)
def test_what_only_fails_when_it_is_tried_is_told(folder, recipe, setting, said):
    assert re.search(said, " ".join(problems(folder, recipe, setting).values()))


def test_an_empty_recipe_is_told(folder):
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(write_recipe(folder, None))
