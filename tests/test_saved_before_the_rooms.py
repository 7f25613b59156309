"""Folders and pickles of the last commit before modules moved into folders: they load, and give the same bits.

To the last bit on a machine like the one that made them; others may round the products otherwise.
"""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from saved_before_the_rooms.make import (
    BATCH,
    FOLDERS,
    PICKLED_MODELS,
    base_model,
    config,
    fields_of,
    libraries,
    observe,
    this_machine,
)
from torch.utils._pytree import tree_flatten

SAVED = Path(__file__).parent / "saved_before_the_rooms"
TENSORS = load_file(SAVED / "expected.safetensors")
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
IS_THEIRS = this_machine() == EXPECTED["machine"]
RTOL, ATOL = (0.0, 0.0) if IS_THEIRS else (1e-5, 1e-5)


def assert_same_numbers(actual, expected):
    leaves, structure = tree_flatten(actual)
    expected_leaves, expected_structure = tree_flatten(expected)
    assert structure == expected_structure
    assert leaves == pytest.approx(expected_leaves, rel=RTOL, abs=ATOL)


def assert_as_before(model, key):
    tensors, numbers = observe(model)
    for kind, tensor in tensors.items():
        torch.testing.assert_close(tensor, TENSORS[f"{key}/{kind}"], rtol=RTOL, atol=ATOL)
    assert_same_numbers(numbers, EXPECTED[key])


def unpickled(name):
    return torch.load(SAVED / "pickles" / f"{name}.pt", weights_only=False)


@pytest.fixture
def trained():
    """A mixture after a training forward, with its output: the class of the output is made then."""
    model = get_peft_model(base_model(), config()).train()
    return model, model(**BATCH)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_gives_the_same_bits(name):
    model = PeftModel.from_pretrained(base_model(), SAVED / "folders" / name, is_trainable=True)
    assert_as_before(model, f"folders/{name}")


@pytest.mark.skipif(
    libraries() != EXPECTED["libraries"],
    reason="a whole model's pickle holds objects of transformers and PEFT, which other versions need not understand",
)
@pytest.mark.parametrize("name", PICKLED_MODELS)
def test_a_pickled_model_gives_the_same_bits(name, trained):
    model = unpickled(f"model_{name}")
    living, _ = trained
    assert type(model) is type(living) and type(model.base_model.routing) is type(living.base_model.routing)
    assert_as_before(model, f"pickles/model_{name}")


def test_a_pickled_configuration_holds_what_it_held():
    saved = unpickled("config")
    assert type(saved) is type(config())
    fields = fields_of(saved)
    assert {name: fields.get(name) for name in EXPECTED["pickles/config"]} == EXPECTED["pickles/config"]


def test_a_pickled_output_holds_what_it_held(trained):
    output = unpickled("output")
    assert type(output) is type(trained[1])
    assert {name: value.tolist() for name, value in output.items()} == EXPECTED["pickles/output"]
    assert output.balancing_loss is output["balancing_loss"]


def test_pickled_statistics_hold_what_they_held(trained):
    saved = unpickled("stats")
    living = trained[0].routing_stats().values()
    assert {type(stats) for stats in saved} == {type(stats) for stats in living}
    assert [asdict(stats) for stats in saved] == EXPECTED["pickles/stats"]


def test_every_name_in_a_pickle_is_found(trained):
    """Those of other pickles than the small ones kept here too, such as fixed routers and KV caches."""
    names = (SAVED / "names_in_pickles.txt").read_text(encoding="utf-8").split()
    assert len(names) > 15
    found = {name: getattr(import_module(name.partition(":")[0]), name.partition(":")[2], None) for name in names}
    assert [name for name, value in found.items() if not isinstance(value, type)] == []
