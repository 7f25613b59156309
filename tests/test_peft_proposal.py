"""The change that docs/peft-proposal.md proposes applies to the installed PEFT, and does what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "peft_proposal"
METADATA = "Metadata-Version: 2.1\nName: gated-lora\nVersion: 1\n"


@pytest.fixture
def source(tmp_path):
    """A copy of PEFT's source, beside the change."""
    page = (ROOT / "docs" / "peft-proposal.md").read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "proposal.diff").write_text(diff, encoding="utf-8")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "src" / "peft", ignore=ignore)
    return tmp_path


def apply(source, *options):
    # Not git's own repository: within one, git passes over paths that it does not track.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(source.parent)}
    command = ["git", "apply", *options, "proposal.diff"]
    return subprocess.run(command, cwd=source, env=environment, check=False, capture_output=True, text=True)


def test_the_change_applies(source):
    checked = apply(source, "--check")
    assert checked.returncode == 0, f"not to PEFT {peft.__version__}: {checked.stderr}"
    assert apply(source).returncode == 0 and "peft.methods" in (source / "src/peft/utils/peft_types.py").read_text()
    assert apply(source, "--check").returncode == 1  # it is in force


def test_a_method_of_another_package_needs_no_private_name(source):
    assert apply(source).returncode == 0
    package = source / "package"
    installed = package / "gated_lora-1.dist-info"
    installed.mkdir(parents=True)
    shutil.copy(HERE / "gated_lora.py", package)
    (installed / "METADATA").write_text(METADATA)
    (installed / "entry_points.txt").write_text("[peft.methods]\ngated = gated_lora\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source / "src"), str(package)])}
    for what in ("make", "load"):
        command = [sys.executable, HERE / "use.py", what, source / "adapter"]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    public = re.compile(r"(?:\.|def )_(?!_)\w+")
    assert not public.findall((HERE / "gated_lora.py").read_text())
