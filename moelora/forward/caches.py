"""What a forward has read before: its KV cache, if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def kv_cache(values: Any) -> Any:
    """The KV cache among a model's inputs or outputs, if there is one; tuples have no names to find it by."""
    if not isinstance(values, Mapping):
        return None
    cache = values.get("cache")  # from transformers 5.24 on
    return values.get("past_key_values") if cache is None else cache


def past_length(cache: Any) -> int | Tensor:
    """Tokens in a KV cache."""
    length = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
    return length.clone() if isinstance(length, Tensor) else length
