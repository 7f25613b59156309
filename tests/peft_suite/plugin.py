"""pytest plugin that shows PEFT's own test modules a MoELoraConfig under the name LoraConfig.

run.py starts pytest with it and says in MOELORA_PEFT_SUITE (JSON) what to replace LoraConfig by:
    config: "LoraConfig" (nothing is replaced: the baseline) or "MoELoraConfig".
    defaults: fields that every configuration gets unless the test sets them.
    records: the file that one JSON line per case is appended to.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest

import moelora

SETTINGS = json.loads(os.environ["MOELORA_PEFT_SUITE"])
STOCK = peft.LoraConfig
CONFIG: Any = STOCK if SETTINGS["config"] == "LoraConfig" else moelora.MoELoraConfig
_made: list[str] = []  # one entry for each configuration of the class under test that the running case made


def _observe(config_cls: Any) -> None:
    original = config_cls.__init__

    @functools.wraps(original)  # PEFT reads the signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _made.append(type(self).__name__)
        original(self, *args, **{**SETTINGS["defaults"], **kwargs})

    config_cls.__init__ = init


def pytest_sessionstart() -> None:
    """Before the test modules are imported."""
    _observe(CONFIG)
    peft.LoraConfig = CONFIG
    # It would contact the hub at the first use of each model; run.py has put stand-ins into the cache.
    utilities: Any = importlib.import_module("tests.testing_utils")
    utilities.hub_online_once = lambda model_id: contextlib.nullcontext()


def _configs_of(item: Any) -> list[Any]:
    """The configuration classes that a case is parametrised with."""
    values = getattr(item, "callspec", None) and item.callspec.params.values()
    flat = [part for value in values or () for part in (value if isinstance(value, (list, tuple)) else (value,))]
    classes = [value if isinstance(value, type) else type(value) for value in flat]
    return [cls for cls in classes if issubclass(cls, peft.PeftConfig)]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Drop the cases of other PEFT methods."""
    peft.LoraConfig = STOCK  # PEFT itself goes on using its own
    foreign = [item for item in items if (configs := _configs_of(item)) and CONFIG not in configs]
    config.hook.pytest_deselected(items=foreign)
    items[:] = [item for item in items if item not in set(foreign)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """Start counting before the fixtures run."""
    _made[:] = [cls.__name__ for cls in _configs_of(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any):
    """Record each case once: after its call, or earlier when it never got there."""
    report = yield
    if call.when == "call" or (call.when == "setup" and not report.passed):
        record = {
            "test": item.location[2].partition("[")[0],
            "file": Path(item.location[0]).name,
            "case": item.nodeid.partition("[")[2].removesuffix("]"),
            "outcome": report.outcome,
            "concerns_lora": CONFIG.__name__ in _made,
            "message": _message(call, report),
        }
        with open(SETTINGS["records"], "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return report


def _message(call: Any, report: Any) -> str:
    """What ended the case, with what it was raised from."""
    if report.passed or call.excinfo is None:
        return ""
    parts: list[str] = []
    error = call.excinfo.value
    while error is not None and len(parts) < 3:
        parts.append(f"{type(error).__name__}: {str(error)[:500]}")
        error = error.__cause__ or error.__context__
    crash = call.excinfo.traceback[-1]
    return f"{' <- '.join(parts)} ({crash.path.name}:{crash.lineno + 1})"
