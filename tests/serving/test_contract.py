"""What the plug-in relies on in vLLM is there, and is called what it calls it."""

import ast
import inspect
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import get_args

import pytest
import vllm
from vllm.config.lora import MaxLoRARanks
from vllm.v1.worker import lora_model_runner_mixin as runner

import moelora
from moelora.serving.vllm import register
from moelora.serving.vllm.blocks import IS_SPLIT, BlockInput
from moelora.serving.vllm.contract import ATTRIBUTES, NAMES, PARAMETERS, SERVED_RANKS, is_known

PLUG_IN = Path(moelora.__file__).parent / "serving" / "vllm"


def find(path):
    """A module, or what is in one, by its dotted name."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        holder, _, name = path.rpartition(".")
        return getattr(find(holder), name)


def test_the_version_is_known():
    assert is_known(vllm.__version__)


@pytest.mark.parametrize("path", NAMES)
def test_names(path):
    holder = find(path)
    known = {*dir(holder), *getattr(holder, "__annotations__", {})}
    assert [name for name in NAMES[path] if name not in known] == []


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes(path):
    """Read, not imported: some need a GPU."""
    module, _, name = path.rpartition(".")
    file = Path(vllm.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    (source,) = (node for node in ast.parse(file.read_text()).body if getattr(node, "name", None) == name)
    fields = {node.target.id for node in source.body if isinstance(node, ast.AnnAssign)}
    set_on_self = {node.attr for node in ast.walk(source) if isinstance(node, ast.Attribute)}
    assert [name for name in ATTRIBUTES[path] if name not in fields | set_on_self] == []


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path):
    there = inspect.signature(find(path)).parameters
    assert [name for name in PARAMETERS[path] if name not in there] == []


def test_every_import_of_vllm_is_listed():
    found = set()
    for file in PLUG_IN.glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].split(".")[0] == "vllm":
                found |= {f"{words[1]}.{name.strip(',')}" for name in words[3:] if name not in ("as", "runner", "envs")}
    listed = {f"{path}.{name}" for path, names in NAMES.items() for name in names} | set(NAMES)
    assert found - listed == set()
    assert len(found) > 8


def test_ranks():
    assert get_args(MaxLoRARanks) == SERVED_RANKS


@pytest.mark.parametrize("name", IS_SPLIT)
def test_blocks_take_what_the_list_says(name):
    block = find(name)
    assert BlockInput.of(object.__new__(block), IS_SPLIT[name]).hidden_at >= 0


def test_the_entry_point_registers_once():
    (point,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "moelora")
    assert point.load() is register
    register()
    manager = runner.LRUCacheWorkerLoRAManager
    register()
    assert runner.LRUCacheWorkerLoRAManager is manager
    assert manager.takes_mixtures is True
