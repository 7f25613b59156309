"""Imports point down: the maths knows torch and nothing of the libraries it is used from."""

import subprocess
import sys

import pytest

MATHS = ["gate", "routing", "losses", "masks", "ranks", "ops", "ops.concat", "ops.reference", "ops.pool"]
MATHS += ["call", "overflow"]
FORBIDDEN = ["peft", "transformers", "accelerate", "datasets", "triton", "matplotlib", "plotly", "pandas"]

# moelora/__init__.py registers with PEFT, so the package is replaced by an empty one with the same path.
PROGRAM = """
import importlib, sys, types
import torch
already = set(sys.modules)  # what torch itself pulls in is not ours
package = types.ModuleType("moelora")
package.__path__ = [sys.argv[1]]
sys.modules["moelora"] = package
importlib.import_module("moelora." + sys.argv[2])
print("\\n".join(sorted(set(sys.modules) - already)))
"""


@pytest.mark.parametrize("module", MATHS)
def test_maths_imports_torch_only(module):
    import moelora

    command = [sys.executable, "-c", PROGRAM, moelora.__path__[0], module]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stdout.split()
    assert f"moelora.{module}" in imported
    assert not [name for name in imported if name.partition(".")[0] in FORBIDDEN]
    ours = {name.partition(".")[2].partition(".")[0] for name in imported if name.startswith("moelora.")}
    assert ours <= {name.partition(".")[0] for name in MATHS}, "maths imports a module above it"
