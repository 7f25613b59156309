"""references.json: what an adapter made of a few prompts when it was saved, by which `moelora verify` knows it again.

It holds token ids and, for each token after a prompt's first, its log-probability with the adapter and without. The
ids are the text: whoever has the base model's tokenizer can read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import console
from ..files.adapter_files import read_adapter
from ..files.atomic_save import checksum
from ..files.opening import NotReadableError, read_json
from ..schema import UserError
from .run_record import write_json

REFERENCES_FILE = "references.json"
VERSION = 1
MOST_PROMPTS = 8
MOST_TOKENS = 64
"""Of a prompt."""
DTYPES = ("float32", "bfloat16", "float16")
_MOST_BYTES = 1 << 20
_WRITE_ANEW = "remove the file, or restore it from a copy; `moelora verify ADAPTER --write` writes one"


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt of S tokens.

    Attributes:
        token_ids: [S].
        adapted: [S - 1] log-probability of each token after the first, in nats, with the adapter.
        base: [S - 1] the same without it.
    """

    token_ids: list[int]
    adapted: list[float]
    base: list[float]


@dataclass(frozen=True)
class References:
    """What an adapter did.

    Attributes:
        save: of which save; see [`identify_save`].
        base_model: name of the base model.
        dtype: precision that it ran in, "float32", "bfloat16" or "float16".
        prompts: at least one.
        is_exact: whether the adapter is to compute just that; False where it was made to come near to another, which
            the references are of.
    """

    save: str
    base_model: str
    dtype: str
    prompts: list[ReferencePrompt]
    is_exact: bool = True

    @property
    def token_ids(self) -> list[list[int]]:
        return [prompt.token_ids for prompt in self.prompts]


def identify_save(folder: Path) -> str:
    """What tells the save of an adapter from any other: its id, or the checksum of its weights where it has none.

    Raises:
        ValueError: there is no adapter, or its files are damaged or of different saves.
        OSError: they cannot be read.
    """
    files = read_adapter(folder)
    files.refuse_damage()
    return files.save_id or checksum(files.weights)


def pair_up(
    token_ids: Sequence[Sequence[int]], adapted: Sequence[Sequence[float]], base: Sequence[Sequence[float]]
) -> list[ReferencePrompt]:
    """Prompts with what was computed for them."""
    return [ReferencePrompt(list(ids), list(a), list(b)) for ids, a, b in zip(token_ids, adapted, base, strict=True)]


def write_references(
    folder: Path, base_model: str, dtype: str, prompts: list[ReferencePrompt], *, is_exact: bool = True
) -> None:
    """Write what the adapter in a folder does, in one step; see [`References`] for the rest.

    Raises:
        ValueError: a log-probability is not finite, or the adapter is damaged; nothing is written then.
        OSError: the adapter cannot be read, or the file not be written.
    """
    if not all(map(_are_log_probs, (row for prompt in prompts for row in (prompt.adapted, prompt.base)))):
        raise ValueError("a log-probability of a prompt is not finite, so nothing could be compared with it")
    references = References(identify_save(folder), base_model, dtype, prompts, is_exact)
    write_json(folder / REFERENCES_FILE, {"version": VERSION} | dataclasses.asdict(references))


def write_or_tell(folder: Path, base_model: str, dtype: str, prompts: list[ReferencePrompt]) -> None:
    """[`write_references`] for work that is done with or without them: what is wrong with them is printed."""
    try:
        write_references(folder, base_model, dtype, prompts)
    except ValueError as error:
        console.print(f"No {REFERENCES_FILE} is written: {error}", soft_wrap=True)


def read_references(folder: Path) -> References | None:
    """The references that lie beside an adapter; None where there are none.

    Raises:
        UserError: they are damaged, of a later version, or of another save than the adapter's.
    """
    path = folder / REFERENCES_FILE
    try:
        content = read_json(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except NotReadableError as error:
        raise UserError(f"{path}: {error}; {_WRITE_ANEW}") from None
    if problem := _problem(content):
        raise UserError(f"{path}: {problem}; {_WRITE_ANEW}")
    prompts = [ReferencePrompt(**prompt) for prompt in content.pop("prompts")]
    references = References(prompts=prompts, **{key: content[key] for key in content if key != "version"})
    try:
        save = identify_save(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    if references.save != save:
        raise UserError(
            f"{path} is of another save than the adapter beside it ({references.save}, and {save}), so it does not "
            f"say what this one did; {_WRITE_ANEW}"
        )
    return references


# ---- checks ----------------------------------------------------------------------------------------------------------


def _problem(content: Any) -> str | None:
    """What is wrong with the content of a references file."""
    if not isinstance(content, Mapping):
        return "must be a JSON object"
    if (version := content.get("version")) != VERSION:
        return f"`version` is {version!r}, and this moelora reads {VERSION}"
    kinds = {"version": int, "save": str, "base_model": str, "dtype": str, "prompts": list, "is_exact": bool}
    if strange := [name for name in content if name not in kinds]:
        return f"unknown key {strange[0]!r}"
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        return f"`{wrong[0]}` is missing or of the wrong kind"
    if content["dtype"] not in DTYPES:
        return f"`dtype` is {content['dtype']!r}, and must be one of {', '.join(DTYPES)}"
    prompts = content["prompts"]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        return f"{len(prompts)} prompts, and there must be 1 to {MOST_PROMPTS}"
    found = ((number, _prompt_problem(prompt)) for number, prompt in enumerate(prompts))
    return next((f"prompt {number}: {problem}" for number, problem in found if problem), None)


def _prompt_problem(prompt: Any) -> str | None:
    if not isinstance(prompt, Mapping) or prompt.keys() != {"token_ids", "adapted", "base"}:
        return "must hold `token_ids`, `adapted` and `base`"
    ids = prompt["token_ids"]
    if not isinstance(ids, list) or not 2 <= len(ids) <= MOST_TOKENS or not all(map(_is_token, ids)):
        return f"`token_ids` must be 2 to {MOST_TOKENS} whole numbers, 0 or greater"
    for name in ("adapted", "base"):
        if not _are_log_probs(prompt[name]) or len(prompt[name]) != len(ids) - 1:
            return f"`{name}` must be {len(ids) - 1} finite numbers, 0 or less: one for each token after the first"
    return None


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _are_log_probs(values: Sequence[float] | Any) -> bool:
    return isinstance(values, list) and all(type(v) is float and math.isfinite(v) and v <= 0 for v in values)
