"""Texts as the analysis reads them: domains of documents of tokens, which know the text they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..console import track
from .tokens import plain_text, with_end

FEWEST_UNITS = 5
"""Documents a domain needs for permutations of whole documents to mean anything."""


@dataclass(frozen=True)
class Document:
    """One document's tokens. pieces are the text of each; joined they are the document."""

    token_ids: list[int]
    pieces: list[str]


@dataclass(frozen=True)
class Domain:
    """Documents of one kind.

    Attributes:
        is_held_out: the documents are known not to have been trained on.
        left_out: documents that the limit on tokens kept out.
    """

    name: str
    documents: list[Document]
    is_held_out: bool = False
    left_out: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)


@dataclass(frozen=True)
class TextBlock:
    """A run of tokens that the model reads at once; never of two documents.

    unit is what permutations move and errors are counted over: the document, or the block where documents are few.
    """

    domain: int
    document: int
    unit: int
    token_ids: list[int]


def read_domain(
    name: str,
    documents: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    is_held_out: bool = False,
) -> Domain:
    """Tokenise documents (texts or conversations) until max_tokens; the last document is cut there."""
    found: list[Document] = []
    room = max_tokens
    for document in track(documents, f"Reading {name}", transient=True):
        if room is not None and room <= 0:
            break
        tokenised = tokenise(document, tokenizer)
        if room is not None:
            tokenised = Document(tokenised.token_ids[:room], tokenised.pieces[:room])
            room -= len(tokenised.token_ids)
        found.append(tokenised)
    return Domain(name, found, is_held_out, len(documents) - len(found))


def tokenise(document: Any, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokens as training cuts them, and the text that each one stands for.

    A character of several tokens (an emoji in a byte-level vocabulary) is the text of its first; the others are empty.
    Special tokens, which stand for no text, go by their names.
    """
    text, special = plain_text(document, tokenizer)
    encoded = tokenizer(text, add_special_tokens=special, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = with_end(list(encoded["input_ids"]), tokenizer)
    if not tokenizer.is_fast:
        return Document(ids, [tokenizer.decode([token]) for token in ids])
    pieces, end = [], 0
    for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=False):
        if start == stop:
            pieces.append(str(tokenizer.convert_ids_to_tokens(token)) if token in tokenizer.all_special_ids else "")
        else:
            # From the end of the last token, for some tokenizers leave the space between two out of both.
            pieces.append(text[end:stop] if stop > end else "")
            end = max(end, stop)
    pieces += [str(tokenizer.convert_ids_to_tokens(token)) for token in ids[len(pieces) :]]
    return Document(ids, pieces)


def cut(domains: Sequence[Domain], block_size: int) -> tuple[list[TextBlock], bool]:
    """Blocks of at most block_size tokens, and whether units are documents (False: too few of them somewhere)."""
    by_document = all(len(domain.documents) >= FEWEST_UNITS for domain in domains)
    blocks: list[TextBlock] = []
    unit = -1
    for index, domain in enumerate(domains):
        for number, document in enumerate(domain.documents):
            unit += by_document
            for at in range(0, len(document.token_ids), block_size):
                unit += not by_document
                blocks.append(TextBlock(index, number, unit, document.token_ids[at : at + block_size]))
    return blocks, by_document


def sample(blocks: Sequence[TextBlock], domain: int, max_tokens: int) -> list[int]:
    """Positions of blocks of one domain, evenly spread over it, that together hold at most about max_tokens."""
    own = [i for i, block in enumerate(blocks) if block.domain == domain and len(block.token_ids) > 1]
    total = sum(len(blocks[i].token_ids) for i in own)
    if total <= max_tokens or not own:
        return own
    count = max(1, round(len(own) * max_tokens / total))
    return [own[position * len(own) // count] for position in range(count)]
