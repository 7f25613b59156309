"""Arms in a process of their own, for libraries that patch what all other arms would compute with.

The child imports such a library before anything else, builds its arms, and answers one question a line. It computes
only while it is asked, so the arms of several processes take turns like those of one. Both ends of the pipe are here.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol


class Bench(Protocol):
    """The arms of one process. A benchmark's module has a class of this name, made from its parsed options."""

    arms: Sequence[str]

    def use(self, *setting: Any) -> None:
        """Measure under this setting from now on: what it consists of, the benchmark decides."""

    def seconds(self, arm: str) -> float:
        """Mean seconds of one call of an arm."""

    def peak_bytes(self, arm: str) -> int:
        """GPU memory of one call of an arm, as if no other arm were there; 0 where it is not measured."""


class RemoteError(RuntimeError):
    """What failed in the other process."""


class Remote:
    """A Bench in a process of its own. It is built while this process goes on; `wait` for it before the first question.

    Args:
        package: the library that the process imports before anything else.
        module: of the benchmark.
        arguments: the benchmark's command line.
        arms: those of `package`.
    """

    def __init__(self, package: str, module: str, arguments: Sequence[str], arms: Sequence[str]) -> None:
        self.package = package
        self.arms = arms
        command = [sys.executable, "-m", "benchmarks.worker", package, module, *arguments, "--arms", *arms]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=root
        )

    def wait(self) -> None:
        """Until its arms are built.

        Raises:
            RemoteError: they could not be.
        """
        self._answer()

    def use(self, *setting: Any) -> None:
        """See Bench."""
        self._ask("use", *setting)

    def seconds(self, arm: str) -> float:
        """See Bench."""
        return float(self._ask("seconds", arm))

    def peak_bytes(self, arm: str) -> int:
        """See Bench."""
        return int(self._ask("peak_bytes", arm))

    def close(self) -> None:
        """End the process, which ends by itself when nobody is there to ask."""
        self.process.communicate()

    def _ask(self, *question: Any) -> Any:
        with suppress(BrokenPipeError):  # it has ended: there will be no answer either
            self.process.stdin.write(json.dumps(question) + "\n")  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RemoteError(f"the process with {self.package} ended with status {self.process.wait()}; see its error")
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer["value"]


def answer_to(bench: Bench, line: str) -> dict[str, Any]:
    """The value that a line asks for, or the error that it met."""
    name, *arguments = json.loads(line)
    try:
        return {"value": getattr(bench, name)(*arguments)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Build the arms that the command line names, then answer until standard input ends."""
    package, name, *arguments = sys.argv[1:]
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what libraries start must not read the questions,
    os.dup2(2, 1)  # and what they print must not stand among the answers
    importlib.import_module(package)
    torch, module = importlib.import_module("torch"), importlib.import_module(name)  # the library patches both
    bench = module.Bench(module.parse(arguments))
    print(json.dumps({"value": "ready"}), file=answers)
    for line in questions:
        print(json.dumps(answer_to(bench, line)), file=answers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other processes need it


if __name__ == "__main__":
    main()
