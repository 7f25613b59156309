"""Requests that transformers' continuous batching packs into one row: which tokens of a row belong together.

`generate_batch` reads pieces of many requests in one forward and keeps their keys in a paged cache, which knows no
sequences, only slots. A domain classifier adds up what it found in the WINDOW tokens up to each one, so its densities
are kept by the same slots: what a request has read before is found there whatever ran beside it, in however many
pieces it was read, and where several requests share the blocks of a prefix.

Nothing here waits for the device, so that a forward can be captured in a CUDA graph.
Shapes: N tokens of all requests, R requests, A adapters, W = WINDOW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..routing.domain_classifier import WINDOW

_ATTRIBUTE = "_moelora_slot_densities"  # on a paged cache
_FULL = "full_attention"
PROBED = 8
"""Tokens that tell whether a router reads each alone."""
_READS_MORE = (
    "the attached router {name} reads more of a text than the token it decides for, and continuous batching packs "
    "pieces of many texts into one row; call `generate`, or attach a router that reads each token alone"
)
_SHORT = (
    "the domain classifier reads {needed} tokens, but all layers of the model attend to {window} and its cache keeps "
    "no more; call `generate` in place of `generate_batch`"
)
_OTHER_CACHE = (
    "a mixture with a domain classifier needs the paged cache of transformers 5.23 or newer for `generate_batch`; "
    "update transformers, or call `generate`"
)


class _Context(NamedTuple):
    """Where the W tokens up to each one are: in this row, or among the slots of the cache; each [N, W]."""

    rows: Tensor
    is_in_row: Tensor
    slots: Tensor
    is_cached: Tensor


class PackedRequests:
    """A forward of continuous batching.

    Args:
        inputs: the base model's arguments by name, as `generate_batch` gives them.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.cache = inputs["cache"]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> PackedRequests | None:
        """None where a forward is no step of continuous batching."""
        is_packed = "cu_seq_lens_q" in inputs and "write_index" in inputs and inputs.get("cache") is not None
        return cls(inputs) if is_packed else None

    def over_context(self, densities_NA: Tensor, key: str) -> Tensor:
        """[N, A]: log densities summed over each token and the WINDOW - 1 before it in its own request.

        Args:
            key: the router's name, by which the cache keeps the densities.

        Raises:
            ValueError: the cache keeps fewer tokens than that, or is of another kind.
        """
        slots = SlotDensities.on(self.cache)
        table_SA = slots.table(key, densities_NA)
        context = self._context
        in_row = torch.where(context.is_in_row[..., None], densities_NA[context.rows], 0).sum(1)
        cached = torch.where(context.is_cached[..., None], table_SA[context.slots], 0).sum(1)
        # Only now: with sliding attention the new tokens take the slots of the oldest.
        table_SA.index_copy_(0, self._written, densities_NA.detach())
        return in_row + cached

    @cached_property
    def _group(self) -> Any:
        return _group_of(self.cache)

    @cached_property
    def _starts(self) -> Tensor:
        """[R + 1]"""
        return self.inputs["cu_seq_lens_q"].long()

    @cached_property
    def _requests(self) -> Tensor:
        """[N] the request of each token; padding, which follows them all, counts as the last one's."""
        order = torch.arange(self._positions.shape[0], device=self._starts.device)
        return torch.searchsorted(self._starts[1:], order, right=True).clamp(max=self._starts.shape[0] - 2)

    @cached_property
    def _positions(self) -> Tensor:
        """[N] of each token in its request."""
        return self.inputs["position_ids"].flatten().long()

    @cached_property
    def _written(self) -> Tensor:
        """[N] the slots that the row's tokens take."""
        if self.inputs.get("block_table") is None:
            return self._compact(self.inputs["write_index"][self._group.index])
        return self._by_block_table(self._positions[:, None]).squeeze(-1)

    @cached_property
    def _context(self) -> _Context:
        """The same for all routers of a forward."""
        starts, requests = self._starts, self._requests
        order = torch.arange(len(requests), device=starts.device)
        lags = torch.arange(WINDOW, device=starts.device)
        place = (order - starts[requests])[:, None]  # in its request's piece
        positions = self._positions[:, None] - lags
        is_in_row = lags <= place
        is_cached = ~is_in_row & (positions >= 0)
        rows = (order[:, None] - lags).clamp(min=0)
        return _Context(rows, is_in_row, self._slots(lags - place, positions), is_cached)

    def _slots(self, back_NW: Tensor, positions_NW: Tensor) -> Tensor:
        """[N, W] of tokens that lie `back` before their request's piece; any slot where none does."""
        if self.inputs.get("block_table") is not None:
            return self._by_block_table(positions_NW)
        read = self.inputs["read_index"][self._group.index]
        if read.numel() == 0:  # nothing was read before
            return torch.zeros_like(positions_NW)
        # From the end: with sliding attention the cache holds the latest tokens only.
        ends = self.inputs["cu_seq_lens_k"][self._group.layer_type].long()[1:]
        lengths = self._starts.diff()
        first_new = (ends - lengths)[self._requests][:, None]
        return self._compact(read[(first_new - back_NW).clamp(0, read.shape[0] - 1)])

    def _by_block_table(self, positions_NW: Tensor) -> Tensor:
        group = self._group
        table_RB = self.inputs["block_table"][group.index].long()
        pages = positions_NW.clamp(min=0) // group.tokens_per_page
        entries = table_RB[self._requests[:, None], pages.clamp(max=table_RB.shape[1] - 1)].clamp(min=0)
        blocks = entries // (group.block_physical_stride // group.tokens_per_page)
        return blocks * group.tokens_per_page + positions_NW.clamp(min=0) % group.tokens_per_page

    def _compact(self, slots: Tensor) -> Tensor:
        """A block's slots lie apart in the cache, by the keys and values of all layers; here they lie together."""
        page, stride = self._group.tokens_per_page, self._group.block_physical_stride
        return slots // stride * page + (slots % stride).clamp(max=page - 1)


class SlotDensities:
    """The densities of the tokens in a paged cache, by router and slot."""

    def __init__(self, cache: Any) -> None:
        group = _group_of(cache)
        self.page = group.tokens_per_page
        self.layer_type = group.layer_type
        self.num_slots = cache.cache_tensor.numel() // group.bytes_per_block * self.page
        self.tables: dict[str, Tensor] = {}  # by router: [slots, A]

    @classmethod
    def on(cls, cache: Any) -> SlotDensities:
        """What a paged cache keeps, from now on; it follows where the cache copies blocks.

        Raises:
            ValueError: the cache keeps too few tokens, or is of another kind.
        """
        kept = getattr(cache, _ATTRIBUTE, None)
        if kept is None:
            kept = cls(cache)
            setattr(cache, _ATTRIBUTE, kept)
            cache.__class__ = _followed(cache.__class__)
        return kept

    def table(self, key: str, like_NA: Tensor) -> Tensor:
        """[slots, A] of a router."""
        if key not in self.tables or self.tables[key].shape[1] != like_NA.shape[1]:
            self.tables[key] = like_NA.new_zeros(self.num_slots, like_NA.shape[1], requires_grad=False)
        return self.tables[key]

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Do to the densities what the cache did to its blocks."""
        for table_SA in self.tables.values():
            by_block = table_SA.view(-1, self.page, table_SA.shape[1])
            source, target = (torch.tensor(blocks, device=table_SA.device) for blocks in (sources, targets))
            by_block.index_copy_(0, target, by_block[source])


def _group_of(cache: Any) -> Any:
    """The layers whose slots are followed, as the cache allocates them: those that keep every token, if there are any.

    Raises:
        ValueError: it keeps fewer tokens than the classifier reads, or the cache has no such groups.
    """
    groups = getattr(cache, "cache_allocators", None)
    if not groups:
        raise ValueError(_OTHER_CACHE)
    group = groups.get(_FULL) or next(iter(groups.values()))
    window = getattr(group, "sliding_window", None)
    if window is not None and window < WINDOW:
        raise ValueError(_SHORT.format(needed=WINDOW, window=window))
    return group


_CacheBase: Any = object  # of whose class `_followed` makes a mixture


class _FollowedPagedCache(_CacheBase):
    """Mixed into a paged cache's class: blocks that it copies, for several answers to a prompt, take theirs along."""

    def perform_cache_copy(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        """See transformers."""
        super().perform_cache_copy(copy_src_and_dst)
        kept = getattr(self, _ATTRIBUTE)
        if blocks := copy_src_and_dst.get(kept.layer_type):
            kept.copy_blocks(*blocks)


@cache
def _followed(cls: type) -> type:
    """A paged cache's class with [`_FollowedPagedCache`] mixed in."""
    return type(f"Followed{cls.__name__}", (_FollowedPagedCache, cls), {})


def check_reads_tokens_alone(router: nn.Module, hidden: Tensor) -> None:
    """Raise ValueError where an attached router's weights for a token depend on the others in its row.

    Args:
        hidden: [1, S, H], any hidden states; with fewer than PROBED tokens it cannot always be told.
    """
    hidden = hidden[:, :PROBED]
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 1e-2
    with torch.no_grad():
        together = router(hidden)
        alone = torch.cat([router(token) for token in hidden.split(1, dim=1)], dim=1)
    if not torch.allclose(together, alone, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(_READS_MORE.format(name=type(router).__name__))
