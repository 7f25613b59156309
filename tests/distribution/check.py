"""Install what a release uploads as a stranger does, in bare environments, and run README's example there.

    python tests/distribution/check.py dist python3.11 python3.12 python3.13

torch has the version that the rest is tested with. All else is the newest that the requirements allow, as a stranger
gets it. On Linux the index gives torch's build for CUDA (3 GB, once); `UV_TORCH_BACKEND=cpu` asks for the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UV = "uv"
TORCH = importlib.metadata.version("torch").partition("+")[0]
_NAMES = "import moelora, peft, torch; print(moelora.__file__, moelora.__version__, torch.__version__, sep='\\n')"


def main(arguments: Sequence[str]) -> None:
    """Check the files of a release.

    Raises:
        SystemExit: naming what is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="the folder that `python -m build` has filled")
    parser.add_argument("pythons", nargs="+", help="a Python each")
    given = parser.parse_args(arguments)
    wheel, sdist = (_only(given.dist, pattern) for pattern in ("*.whl", "*.tar.gz"))
    check_contents(wheel, sdist)
    check_extras()
    with tempfile.TemporaryDirectory(prefix="moelora-dist-") as made:
        _save_model(Path(made))
        for number, python in enumerate(given.pythons):
            check_python(python, Path(made, str(number)), Path(made), (wheel, sdist))


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.resolve().glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} files {pattern}, not one; remove it and build again")
    return found[0]


# ---- what is in them -------------------------------------------------------------------------------------------------


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold every file of the package that git knows, and no other of it; the sdist what builds the wheel, too."""
    tracked = set(_run("git", "-C", str(ROOT), "ls-files", "moelora").split())
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    _same("the wheel", in_wheel, tracked)
    _same("the sdist", {name for name in in_sdist if name.startswith("moelora/") and Path(name).suffix}, tracked)
    beside = {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "pyproject.toml"}
    if lacking := beside - in_sdist:
        raise SystemExit(f"the sdist lacks {', '.join(sorted(lacking))}")
    if strange := [name for name in in_sdist if name.startswith("tests/")]:
        raise SystemExit(f"the sdist holds part of the tests ({strange[0]}), which do not run without the repository")


def _same(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        raise SystemExit(f"{what} lacks {sorted(expected - found)} of the package, and has {sorted(found - expected)}")


def check_extras() -> None:
    """For every extra there are versions of all packages that go together, on the oldest and the newest Python."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in extras:
        for version in ("3.11", "3.13"):
            resolve = (UV, "pip", "compile", "--quiet", "--no-header", "--python-version", version, "--extra", extra)
            _run(*resolve, "--output-file", os.devnull, "pyproject.toml")
    print(f"extras that can be installed: {', '.join(extras)}")


# ---- what they do ----------------------------------------------------------------------------------------------------


def check_python(python: str, environment: Path, folder: Path, artefacts: Sequence[Path]) -> None:
    """Install each artefact in an environment of this Python's, and run README's example in the folder."""
    _run(UV, "venv", "--quiet", "--no-project", "--python", python, environment)
    own = environment / "bin" / "python"
    for number, artefact in enumerate(artefacts):
        again = ("--reinstall-package", "moelora", "--no-deps") if number else ()
        _run(UV, "pip", "install", "--quiet", "--python", own, *again, f"torch=={TORCH}", artefact)
        _run(UV, "pip", "check", "--quiet", "--python", own)
        file, version, torch = _run(own, "-c", _NAMES, cwd=folder).split()
        if not Path(file).is_relative_to(environment):
            raise SystemExit(f"{python} imports moelora from {file}, not from its environment; unset PYTHONPATH")
        printed = _run(own, ROOT / "examples" / "first_steps.py", cwd=folder)
        if "loss before training:" not in printed:
            raise SystemExit(f"README's example with {artefact.name} printed {printed!r}")
        _run(environment / "bin" / "moelora", "train", "--help", cwd=folder)
        print(f"{_run(own, '--version').strip()}, torch {torch}: {artefact.name} ({version}) runs README's example")


def _save_model(folder: Path) -> None:
    """A tiny model where the example looks for one."""
    code = "import sys, tiny, pathlib; tiny.save_tiny_model(pathlib.Path(sys.argv[1]))"
    place = folder / "runs" / "quickstart" / "model"
    place.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", code, place], check=True, cwd=ROOT / "tests", capture_output=True)


def _run(*command: object, cwd: Path = ROOT) -> str:
    """What a command prints.

    Raises:
        SystemExit: it failed; with all that it printed.
    """
    # Without the modules and the environment of whoever calls.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = f"{done.stdout}{done.stderr}".strip()
        raise SystemExit(f"{' '.join(map(str, command))}\nended with status {done.returncode}:\n{said}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
