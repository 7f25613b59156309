"""Where the text decides between adapters: densities summed up to each token in vLLM's KV cache, by its place in it.

A token's context reaches back over what other forwards computed: chunks of a prompt, a cached prefix, tokens decoded
one by one. For what stands in the KV cache there is a sum here, at the same index, which follows it as pages are
shared, reused or computed again. A window's sum is the difference of two.
Shapes: T tokens, A adapters, P places in the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available

from ...routing.domain_classifier import within_pieces
from ..slots import Rows


@dataclass(frozen=True)
class Place:
    """Of a token for each of T, in the KV cache."""

    at_T: Tensor
    is_there_T: Tensor  # bool, False before the beginning of the text

    def read(self, kept_PA: Tensor) -> Tensor:
        """[T, A]; zero where there is no token."""
        return torch.where(self.is_there_T[:, None], kept_PA[self.at_T], 0)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a group, and those that their sums begin at, stand in the KV cache."""

    own_T: Tensor
    first_T: Tensor  # among the group's tokens: the first one of each one's piece of text
    before_piece: Place
    before_window: Place | None  # None where the whole text counts
    rounds: int  # in which all sums are known, for a piece may go on behind another's of this very batch
    end: int  # one more than the largest place; a page that is kept may stand above all new ones


class KeptDensities:
    """One engine's.

    Args:
        attention: name of the attention layer whose pages are followed.
        reach: number of tokens that it keeps before each one; infinite where it keeps all.
        cache: vLLM's settings of the KV cache, which it may change until it has measured its memory.
    """

    def __init__(self, attention: str, reach: float, cache: Any) -> None:
        self.attention = attention
        self.reach = reach
        self.cache = cache
        self._kept: dict[str, Tensor] = {}  # by router, [P, A]; grows with the places that are in use
        self._batch: tuple[Any, dict[int, Places]] = (None, {})  # of the batch that is under way, by first token

    @classmethod
    def of(cls, layers: Mapping[str, Any], cache: Any) -> KeptDensities | None:
        """By the attention layer that keeps the most tokens; None where there is no attention.

        Args:
            layers: vLLM's, by name, of whatever has a KV cache.
        """
        if not layers:
            return None
        reaches: dict[str, float] = {}
        for name, layer in layers.items():
            window = getattr(layer, "sliding_window", None)
            reaches[name] = math.inf if window is None else window - 1
        farthest = max(reaches, key=lambda name: reaches[name])
        return cls(farthest, reaches[farthest], cache)

    @property
    def page_size(self) -> int:
        """Tokens in a page of the KV cache."""
        return self.cache.block_size

    def reaches(self, window: int | None) -> bool:
        """Whether enough is kept for a `domain_window`."""
        return (window or 1) <= self.reach

    def over_context(self, router: str, rows: Rows, densities_TA: Tensor, window: int | None) -> Tensor:
        """[T, A]: densities of some of the batch's tokens, summed over the context of each as `window` has it.

        The rows, and so the window, are those of one mixture.
        """
        places = self._places(rows, window)
        if places is None:
            return densities_TA  # vLLM measures its memory: there is no text
        kept_PA = self._room(router, places.end, densities_TA)
        in_piece_TA = within_pieces(densities_TA, places.first_T)
        for _ in range(places.rounds):
            kept_PA[places.own_T] = in_piece_TA + places.before_piece.read(kept_PA)
        sums_TA = kept_PA[places.own_T]
        return sums_TA if places.before_window is None else sums_TA - places.before_window.read(kept_PA)

    def _room(self, router: str, size: int, like: Tensor) -> Tensor:
        kept = self._kept.get(router)
        if kept is None or kept.shape[0] < size or kept.shape[1] < like.shape[1]:
            before = like.new_zeros(0, 0) if kept is None else kept
            shape = max(size, 2 * before.shape[0]), max(like.shape[1], before.shape[1])
            kept = self._kept[router] = like.new_zeros(shape)
            kept[: before.shape[0], : before.shape[1]] = before
        return kept[:, : like.shape[1]]

    def _places(self, rows: Rows, window: int | None) -> Places | None:
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
            known[key] = self._look_up(batch, rows, window)
        return known[key]

    def _look_up(self, batch: Any, rows: Rows, window: int | None) -> Places:
        slots, starts = batch.slot_mapping.long(), batch.query_start_loc.long()
        token_T = torch.arange(slots.shape[0], device=slots.device)[rows]
        request_T = torch.bucketize(token_T, starts[1:], right=True)
        new = starts[1:] - starts[:-1]
        in_piece_T = token_T - starts[request_T]
        position_T = (batch.seq_lens.long() - new)[request_T] + in_piece_T
        own_T = slots[token_T]
        if not torch.equal(own_T, self._at(batch, request_T, position_T).at_T):
            raise RuntimeError(
                f"moelora: vLLM's KV cache has other pages than of {self.page_size} tokens, so texts cannot be followed"
            )
        before_piece = self._at(batch, request_T, position_T - in_piece_T - 1)
        before_window = None if window is None else self._at(batch, request_T, position_T - window)
        read = [place.at_T for place in (before_piece, before_window) if place is not None]
        end = int(torch.cat([own_T, *read]).max()) + 1
        first_T = torch.arange(len(token_T), device=slots.device) - in_piece_T
        return Places(own_T, first_T, before_piece, before_window, _rounds(own_T, before_piece, end), end)

    def _at(self, batch: Any, request_T: Tensor, position_T: Tensor) -> Place:
        at_T = position_T.clamp(min=0)
        pages_T = batch.block_table.long()[request_T, at_T // self.page_size]
        return Place(pages_T * self.page_size + at_T % self.page_size, position_T >= 0)


def _rounds(own_T: Tensor, before_piece: Place, end: int) -> int:
    """1, and as many more as pieces of this batch go on one behind the other: requests that begin alike do.

    vLLM lets a request share the pages of another as soon as that one is scheduled, before they are computed.
    """
    row_P = own_T.new_full((end,), -1)
    row_P[own_T] = torch.arange(len(own_T), device=own_T.device)
    behind_T = torch.where(before_piece.is_there_T, row_P[before_piece.at_T], -1)
    rounds, row_T = 1, behind_T
    while bool((row_T >= 0).any()):
        rounds += 1
        row_T = torch.where(row_T >= 0, behind_T[row_T.clamp(min=0)], -1)
    return rounds
