"""Blocks of diffusion transformers that read two kinds of tokens: a picture's, which enter first, and a text's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache

_OF_TEXT = frozenset(("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"))
_JOIN = re.compile(r"torch\.cat\(\s*\[\s*(encoder_)?hidden_states,\s*(encoder_)?hidden_states\s*\],\s*dim=1")


def reads_text(module: str) -> bool:
    """Whether a linear of this name reads the text's tokens, as diffusers names them.

    Example:
        >>> reads_text("transformer_blocks.0.attn.add_k_proj"), reads_text("transformer_blocks.0.attn.to_k")
        (True, False)
    """
    return not _OF_TEXT.isdisjoint(module.split("."))


@cache
def text_comes_first(forward: Callable) -> bool | None:
    """Whether a block's linears read its text's tokens before its picture's, in one row; None where no row joins them.

    Read from the source, where the block joins them itself.
    """
    try:
        joined = _JOIN.search(inspect.getsource(inspect.unwrap(forward)))
    except (OSError, TypeError):
        return None
    if joined is None or bool(joined[1]) == bool(joined[2]):
        return None
    return bool(joined[1])
