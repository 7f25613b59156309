"""The tokens of one document."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import apply_template


def token_ids(document: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens, with those that the tokenizer or the chat template adds and the end of the text."""
    text, special = plain_text(document, tokenizer)
    return with_end(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"], tokenizer)


def plain_text(document: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """A document's text, and whether the tokenizer is to add special tokens: a chat template has written its own."""
    if isinstance(document, str):
        return document, True
    return apply_template(tokenizer, document, tokenize=False), False


def with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A document's tokens, ended by the end-of-text token where there is one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
