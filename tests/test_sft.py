"""The balancing loss under TRL's SFTTrainer, which ignores `output.loss` from 1.15 on.

Each version of TRL runs in a process of its own: the installed one, and, where `make` has put it beside, the last one
before 1.15.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OLD_TRL = Path(sys.prefix) / "trl-1.14"  # see the Makefile
SCRIPT = Path(__file__).with_name("sft_gradients.py")


def gradients(version, packing):
    path = [str(SCRIPT.parents[1])]
    if version == "1.14":
        if not OLD_TRL.is_dir():
            pytest.skip(f"TRL 1.14 is not in {OLD_TRL}; `make second` installs it")
        path.insert(0, str(OLD_TRL))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "packing" if packing else "padding"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("version", "packing"),
    [
        pytest.param("installed", False, id="installed-padding"),
        pytest.param("installed", True, id="installed-packing", marks=pytest.mark.slow),
        pytest.param("1.14", False, id="1.14-padding", marks=pytest.mark.slow),
        pytest.param("1.14", True, id="1.14-packing", marks=pytest.mark.slow),
    ],
)
def test_the_routers_gradient_contains_the_balancing_term(version, packing):
    result = gradients(version, packing)
    major, minor = (int(part) for part in result["trl"].split(".")[:2])
    assert (major, minor) >= (1, 15) if version == "installed" else (major, minor) == (1, 14)
    # B is zero, so the task gives the routers no gradient at all: what is there is the balancing term.
    assert result["without"] == pytest.approx([0.0] * len(result["without"]), abs=1e-12)
    assert max(abs(value) for value in result["expected"]) > 1e-3
    assert result["with"] == pytest.approx(result["expected"], rel=1e-4, abs=1e-7)
