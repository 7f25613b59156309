"""From documents to the token blocks that training and evaluation read: split, tokenise, cut, mix."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ..recipe import DomainOptions, Recipe
from ..schema import UserError
from .sources import load_documents
from .tokens import token_ids


@dataclass(frozen=True)
class DomainBlocks:
    """One domain, ready to learn: blocks of token ids to train on and blocks held out."""

    name: str
    weight: float
    train: datasets.Dataset
    held_out: datasets.Dataset

    def sizes(self) -> dict[str, int]:
        return {
            "train_blocks": len(self.train),
            "train_tokens": count_tokens(self.train),
            "held_out_blocks": len(self.held_out),
            "held_out_tokens": count_tokens(self.held_out),
        }


def load_domains(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[DomainBlocks]:
    """Read, split and tokenise every domain of a recipe.

    Raises:
        UserError: a domain has too little text to train on and to hold out, or the model has no chat template.
    """
    return [_load_domain(domain, recipe, tokenizer) for domain in recipe.data]


def _load_domain(domain: DomainOptions, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> DomainBlocks:
    if domain.messages_field and not tokenizer.chat_template:
        raise UserError(f"data.{domain.name}.messages_field: the model has no chat template; write texts instead")
    train, held_out = split_documents(domain)
    train_blocks, held_out_blocks = (
        to_blocks(documents, tokenizer, recipe.block_size, f"{domain.name}: {part}")
        for documents, part in ((train, "training blocks"), (held_out, "held-out blocks"))
    )
    if not len(train_blocks) or not len(held_out_blocks):
        raise UserError(
            f"data.{domain.name}: {len(train_blocks)} training and {len(held_out_blocks)} held-out blocks; "
            "give more documents, or `eval_path`, or cut a text file into documents with `separator`"
        )
    if recipe.max_eval_blocks is not None:
        # A fixed shuffle: a cut of the first blocks would measure only the first documents.
        chosen = min(recipe.max_eval_blocks, len(held_out_blocks))
        held_out_blocks = held_out_blocks.shuffle(seed=0, keep_in_memory=True).select(range(chosen))
    return DomainBlocks(domain.name, domain.weight, train_blocks, held_out_blocks)


def split_documents(domain: DomainOptions) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The documents to train on and those to hold out; equal documents never stand on both sides."""
    documents = load_documents(domain, domain.path, domain.split)
    hashes = [_hash(document) for document in documents["document"]]
    if domain.eval_path or domain.eval_split:
        held_out = load_documents(domain, domain.eval_path or domain.path, domain.eval_split or domain.split)
        chosen = {_hash(document) for document in held_out["document"]}
    else:
        chosen = choose_held_out(hashes, domain.eval_fraction)
        held_out = documents.select([row for row, value in enumerate(hashes) if value in chosen])
    return documents.select([row for row, value in enumerate(hashes) if value not in chosen]), held_out


def choose_held_out(hashes: Sequence[int], fraction: float) -> set[int]:
    """The hashes to hold out: those that fall in the lowest `fraction` of the 64-bit range.

    A document keeps its side when others are added. Where chance left a side empty, the lowest or highest moves over.

    >>> choose_held_out([2**63, 2**60], 0.1) == {2**60}
    True
    >>> choose_held_out([2**63, 2**62], 0.1) == {2**62}
    True
    """
    chosen = {value for value in hashes if value < fraction * 2**64} or {min(hashes, default=0)}
    return chosen - {max(chosen)} if chosen == set(hashes) else chosen


def to_blocks(
    documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, description: str
) -> datasets.Dataset:
    """Cut every document into blocks of at most `block_size` tokens; a block never spans two documents.

    Each document ends with the end-of-text token. The last block of a document may be shorter; the collator pads it.
    """

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        documents_ids = [token_ids(document, tokenizer) for document in batch["document"]]
        blocks = [ids[at : at + block_size] for ids in documents_ids for at in range(0, len(ids), block_size)]
        # A block of one token has nothing to predict.
        blocks = [block for block in blocks if len(block) > 1]
        return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks], "labels": blocks}

    return documents.map(cut, batched=True, remove_columns=documents.column_names, desc=description)


def _hash(document: Any) -> int:
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def count_tokens(blocks: datasets.Dataset) -> int:
    batches = blocks.with_format("arrow").iter(10_000)
    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)


def mix(domains: Sequence[DomainBlocks], seed: int) -> datasets.Dataset:
    """One training set drawn from the domains in proportion to their weights.

    It ends when every block of every domain has been drawn at least once, so blocks of a small or heavy domain repeat.
    """
    if len(domains) == 1:
        return domains[0].train
    total = sum(domain.weight for domain in domains)
    return datasets.interleave_datasets(
        [domain.train for domain in domains],
        probabilities=[domain.weight / total for domain in domains],
        seed=seed,
        stopping_strategy="all_exhausted",
    )
