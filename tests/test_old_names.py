"""Modules and functions import by the names that they had before, and say by which they do now."""

from importlib import import_module
from pathlib import Path

import pytest

from moelora import experts
from moelora.moved import MOVED, RENAMED

MODULES = (Path(__file__).parent / "saved_before_the_rooms" / "modules.txt").read_text(encoding="utf-8").split()
"""All there were before they moved into folders."""


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_by_its_old_name(name):
    if name.startswith("moelora.ops.triton."):
        pytest.importorskip("triton")
    assert import_module(name).__name__ == name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_hands_out_the_new_ones_names(old):
    new = import_module(f"moelora.{MOVED[old]}")
    names = [name for name in vars(new) if not name.startswith("_") and f"{old}.{name}" not in RENAMED]
    assert names
    for name in names:
        with pytest.warns(DeprecationWarning) as told:
            assert getattr(import_module(f"moelora.{old}"), name) is getattr(new, name)
        assert [str(each.message) for each in told] == [f"`moelora.{old}.{name}` is now `moelora.{MOVED[old]}.{name}`"]


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_hands_out_what_is_called_otherwise_now(old):
    (module, _, name), (new_module, _, new_name) = old.rpartition("."), RENAMED[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"`moelora.{old}` is now `moelora.{RENAMED[old]}`"):
        found = getattr(import_module(f"moelora.{module}"), name)
    assert found is getattr(import_module(f"moelora.{new_module}"), new_name)


def test_an_old_module_has_no_other_names():
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = import_module("moelora.gate").nothing_of_that_name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("remember", "learn_domain"),
        ("remembers", "knows_domain"),
        ("forget", "forget_domain"),
        ("refresh_gate", "refresh_domain_classifier"),
    ],
)
def test_functions_of_experts_keep_their_old_names(old, new):
    with pytest.warns(DeprecationWarning, match=f"`moelora.experts.{old}` is now `{new}`"):
        assert getattr(experts, old) is getattr(experts, new)
