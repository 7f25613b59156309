"""Where the text decides between adapters: the densities of the tokens in vLLM's KV cache, kept by their place in it.

A token's window reaches back over what other forwards computed: chunks of a prompt, a cached prefix, tokens decoded
one by one. What stands in the KV cache stands here too, at the same index, and follows it as pages are shared, reused
or computed again. Shapes: T tokens, A adapters, W = WINDOW, P places in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from ...routing.domain_classifier import WINDOW
from ..slots import Rows


@dataclass(frozen=True)
class Places:
    """Where the tokens of a group, and those before each, stand in the KV cache."""

    own_T: Tensor
    window_TW: Tensor
    is_there_TW: Tensor  # bool, False before the beginning of the text
    end: int  # one more than the largest place; a page that is kept may stand above all new ones


class KeptDensities:
    """One engine's.

    Args:
        attention: name of an attention layer that keeps WINDOW tokens or more.
        cache: vLLM's settings of the KV cache, which it may change until it has measured its memory.
    """

    def __init__(self, attention: str, cache: Any) -> None:
        self.attention = attention
        self.cache = cache
        self._kept: dict[str, Tensor] = {}  # by router, [P, A]; grows with the places that are in use
        self._batch: tuple[Any, dict[int, Places]] = (None, {})  # of the batch that is under way, by first token

    @property
    def page_size(self) -> int:
        """Tokens in a page of the KV cache."""
        return self.cache.block_size

    def over_context(self, router: str, rows: Rows, densities_TA: Tensor) -> Tensor:
        """[T, A]: densities of some of the batch's tokens, summed over the window of each; they are kept."""
        places = self._places(rows)
        if places is None:
            return densities_TA  # vLLM measures its memory: there is no text
        kept = self._room(router, places.end, densities_TA)
        kept[places.own_T] = densities_TA
        return (kept[places.window_TW] * places.is_there_TW[..., None]).sum(1)

    def _room(self, router: str, size: int, like: Tensor) -> Tensor:
        kept = self._kept.get(router)
        if kept is None or kept.shape[0] < size or kept.shape[1] < like.shape[1]:
            before = like.new_zeros(0, 0) if kept is None else kept
            shape = max(size, 2 * before.shape[0]), max(like.shape[1], before.shape[1])
            kept = self._kept[router] = like.new_zeros(shape)
            kept[: before.shape[0], : before.shape[1]] = before
        return kept[:, : like.shape[1]]

    def _places(self, rows: Rows) -> Places | None:
        """Looked up once a batch, for all routers.

        Raises:
            RuntimeError: vLLM's tables do not agree about where the tokens stand.
        """
        described = get_forward_context().attn_metadata if is_forward_context_available() else None
        if not isinstance(described, dict) or self.attention not in described:
            return None
        batch = described[self.attention]
        if self._batch[0] is not batch:
            self._batch = batch, {}
        known = self._batch[1]
        key = rows.start if isinstance(rows, slice) else int(rows[0])
        if key not in known:
            known[key] = self._look_up(batch, rows)
        return known[key]

    def _look_up(self, batch: Any, rows: Rows) -> Places:
        own, starts = batch.slot_mapping.long(), batch.query_start_loc.long()
        token_T = torch.arange(own.shape[0], device=own.device)[rows]
        request_T = torch.bucketize(token_T, starts[1:], right=True)
        new = starts[1:] - starts[:-1]
        position_T = (batch.seq_lens.long() - new)[request_T] + token_T - starts[request_T]
        back_TW = position_T[:, None] - torch.arange(WINDOW, device=own.device)
        at_TW = back_TW.clamp(min=0)
        pages_TW = batch.block_table.long()[request_T[:, None], at_TW // self.page_size]
        window_TW = pages_TW * self.page_size + at_TW % self.page_size
        places = Places(own[token_T], window_TW, back_TW >= 0, int(window_TW.max()) + 1)
        if not torch.equal(places.own_T, places.window_TW[:, 0]):
            raise RuntimeError(
                f"moelora: vLLM's KV cache has other pages than of {self.page_size} tokens, so texts cannot be followed"
            )
        return places
