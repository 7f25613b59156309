"""Build and read the benchmark's data: eight domains of text and six tasks, tokenised, in two compressed files.

A folder holds `lm.npz` (arrays `<domain>/<split>`: token ids of documents, each ended by the end-of-text token),
`tasks.npz` (`<task>/<split>/ids`, `/lengths`, `/starts`: all examples end to end, how long each is and where its answer
starts) and `manifest.json` (sources, versions, licences, counts, hashes). Splits are train, validation and test.

Letters: N blocks or examples, S tokens of one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..options import make_parser
from .questions import TASKS, Question
from .texts import DOMAINS, without_repeats

MODULE = "benchmarks.quality.data"
EXAMPLES = ("", "--out .scratch/quality --only python sql en_fr")
SPLITS = ("train", "validation", "test")
BLOCK = 256
MAX_TOKENS = {"train": 500_000, "validation": 49_152, "test": 49_152}
MAX_EXAMPLES = {"train": 4_000, "validation": 512, "test": 512}
IGNORED = -100  # label of a token that the loss leaves out

Tokens = NDArray[np.uint16]
Encode = Callable[[Sequence[str]], list[list[int]]]


def split_of(key: str) -> str:
    """Which split a document or question belongs to: 80%, 10% and 10% of all keys, by their hash."""
    tenth = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    return {0: "validation", 1: "test"}.get(tenth, "train")


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Rows of one domain or task in one split.

    Args:
        ids: [N, S] token ids, padded on the right; on the left where labels are shorter.
        labels: [N, S], or those of the last K tokens, [N, K]; -100 where nothing is predicted (padding, prompts).
        mask: [N, S], False on padding; None where there is none.
        choices: token ids of the possible answers' first tokens, where the likeliest is chosen; else empty.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None
    choices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, rows: int) -> Examples:
        """So many of the rows, or all."""
        mask = None if self.mask is None else self.mask[:rows]
        return Examples(self.ids[:rows], self.labels[:rows], mask, self.choices)

    def majority(self) -> float:
        """Share of the most frequent answer among all rows' answers."""
        answers = Counter(tuple(row[row != IGNORED]) for row in self.labels)
        return answers.most_common(1)[0][1] / len(self)


Suite = dict[str, dict[str, Examples]]  # by domain or task, by split


def load_suite(folder: Path, suite: str, length: int = BLOCK) -> Suite:
    """All domains of "lm" in blocks of `length` tokens, or all of "tasks" in padded rows.

    Raises:
        FileNotFoundError: the data is not built; the message names the command.
    """
    path = folder / f"{suite}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; run: python -m {MODULE} --out {folder}")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[suite]
    with np.load(path) as arrays:
        if suite == "lm":
            return {name: {s: _blocks(arrays[f"{name}/{s}"], length) for s in SPLITS} for name in manifest}
        return {
            name: {s: _rows(arrays, f"{name}/{s}", tuple(entry["choices"])) for s in SPLITS}
            for name, entry in manifest.items()
        }


def _blocks(tokens: Tokens, length: int) -> Examples:
    ids = tokens[: len(tokens) // length * length].reshape(-1, length).astype(np.int64)
    return Examples(ids, ids)


def _rows(arrays: Any, key: str, choices: tuple[int, ...]) -> Examples:
    flat, lengths, starts = (arrays[f"{key}/{name}"].astype(np.int64) for name in ("ids", "lengths", "starts"))
    positions = np.arange(BLOCK)[None, :]
    inside = positions < lengths[:, None]
    ids = np.zeros((len(lengths), BLOCK), dtype=np.int64)
    ids[inside] = flat
    labels = np.where(inside & (positions >= starts[:, None]), ids, IGNORED)
    return Examples(ids, labels, inside, choices)


# ---- building --------------------------------------------------------------------------------------------------------


def build_text(documents: Iterable[tuple[str, str]], encode: Encode, end: int) -> dict[str, Tokens]:
    """Tokens of a domain by split, documents in an order that their keys' hashes decide, up to the split's cap."""
    chosen = sorted(without_repeats(documents), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    tokens: dict[str, list[int]] = {split: [] for split in SPLITS}
    for start in range(0, len(chosen), 64):
        batch = [(split_of(key), text[:200_000]) for key, text in chosen[start : start + 64]]
        batch = [(split, text) for split, text in batch if len(tokens[split]) < MAX_TOKENS[split]]
        for (split, _), ids in zip(batch, encode([text for _, text in batch]), strict=True):
            tokens[split] += [*ids, end]
    return {split: np.array(tokens[split][: MAX_TOKENS[split]], dtype=np.uint16) for split in SPLITS}


def build_task(questions: Iterable[Question], encode: Encode, end: int) -> tuple[dict[str, Tokens], dict[str, Any]]:
    """Arrays of a task by `<split>/<name>`, and counts by split; repeated prompts and long examples are left out."""
    unique = {question.prompt: question for question in questions}
    order = sorted(unique.values(), key=lambda q: hashlib.sha256(q.prompt.encode()).digest())
    arrays, counts = {}, {}
    for split in SPLITS:
        mine = [question for question in order if split_of(question.key) == split][: 4 * MAX_EXAMPLES[split]]
        prompts, answers = encode([q.prompt for q in mine]), encode([q.answer for q in mine])
        rows = [(p, [*a, end], q.answer) for p, a, q in zip(prompts, answers, mine, strict=True)]
        rows = [row for row in rows if len(row[0]) + len(row[1]) <= BLOCK][: MAX_EXAMPLES[split]]
        arrays[f"{split}/ids"] = np.array([i for p, a, _ in rows for i in (*p, *a)], dtype=np.uint16)
        arrays[f"{split}/lengths"] = np.array([len(p) + len(a) for p, a, _ in rows], dtype=np.uint16)
        arrays[f"{split}/starts"] = np.array([len(p) for p, _, _ in rows], dtype=np.uint16)
        most = Counter(answer for _, _, answer in rows).most_common(1)[0][1] if rows else 0
        counts[split] = {"examples": len(rows), "majority": round(most / max(1, len(rows)), 4)}
    return arrays, counts


def build(out: Path, downloads: Path, only: Sequence[str], encode: Encode, end: int) -> None:
    """Write the data of the named domains and tasks.

    Args:
        encode: texts to token ids below 65,536, without special tokens.
        end: id of the end-of-text token.
    """
    manifest: dict[str, Any] = {"block": BLOCK, "lm": {}, "tasks": {}}
    texts: dict[str, Tokens] = {}
    for name in [name for name in DOMAINS if name in only]:
        domain = DOMAINS[name]
        arrays = build_text(domain.documents(downloads), encode, end)
        texts |= {f"{name}/{split}": array for split, array in arrays.items()}
        counts = {split: len(array) for split, array in arrays.items()}
        manifest["lm"][name] = {**_origin((domain.package,)), "tokens": counts, "sha256": _hash(arrays)}
        print(f"{name}: {counts} tokens", flush=True)
    rows: dict[str, Tokens] = {}
    for name in [name for name in TASKS if name in only]:
        task = TASKS[name]
        arrays, counts = build_task(task.questions(downloads), encode, end)
        rows |= {f"{name}/{key}": array for key, array in arrays.items()}
        choices = [ids[0] for ids in encode(task.choices)] if task.choices else []
        manifest["tasks"][name] = {**_origin(task.packages), **counts, "choices": choices, "sha256": _hash(arrays)}
        print(f"{name}: {counts}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    _save(out / "lm.npz", texts)
    _save(out / "tasks.npz", rows)
    part = out / "manifest.json.part"
    part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(part, out / "manifest.json")


def _origin(packages: Sequence[Any]) -> dict[str, Any]:
    return {"source": [f"{p.registry}: {p.pin}" for p in packages], "licence": [p.licence for p in packages]}


def _hash(arrays: dict[str, Tokens]) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()


def _save(path: Path, arrays: dict[str, Tokens]) -> None:
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, **arrays)
    os.replace(part, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(MODULE, __doc__, EXAMPLES)
    names = [*DOMAINS, *TASKS]
    add, build = parser.add_argument, Path("build/quality")
    add("--out", type=Path, default=build / "data", help="folder to write to")
    add("--downloads", type=Path, default=build / "downloads", help="where archives are kept")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Build with SmolLM2's tokenizer."""
    args = parse(argv)
    from .base import load_tokenizer

    tokenizer = load_tokenizer()

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    build(args.out, args.downloads, args.only, encode, tokenizer.eos_token_id)
    size = sum(file.stat().st_size for file in args.out.glob("*.npz")) / 2**20
    print(f"{args.out}: {size:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
