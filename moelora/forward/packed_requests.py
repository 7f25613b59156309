"""Requests that transformers' continuous batching packs into one row: which tokens of a row belong together.

`generate_batch` reads pieces of many requests in one forward and keeps their keys in a paged cache, which knows no
sequences, only slots. A domain classifier adds up what it found in the tokens up to each one, so these sums are kept by
the same slots: what a request has read before is found there whatever ran beside it, in however many pieces it was
read, and where several requests share the blocks of a prefix. A window's sum is the difference of two.

Nothing here waits for the device, so that a forward can be captured in a CUDA graph.
Shapes: N tokens of all requests, R requests, A adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.domain_classifier import within_pieces

_ATTRIBUTE = "_moelora_slot_sums"  # on a paged cache
_FULL = "full_attention"
PROBED = 8
"""Tokens that tell whether a router reads each alone."""
_READS_MORE = (
    "the attached router {name} reads more of a text than the token it decides for, and continuous batching packs "
    "pieces of many texts into one row; call `generate`, or attach a router that reads each token alone"
)
_SHORT = (
    "the domain classifier needs {needed} tokens before each (`domain_window`), but all layers of the model attend to "
    "{window} with it, and its cache keeps no more; call `generate`, or lower `domain_window`"
)
_OTHER_CACHE = (
    "a mixture with a domain classifier needs the paged cache of transformers 5.23 or newer for `generate_batch`; "
    "update transformers, or call `generate`"
)


class PackedRequests:
    """A forward of continuous batching.

    Args:
        inputs: the base model's arguments by name, as `generate_batch` gives them.
        window: number of tokens, up to and including each one, by which a domain classifier decides; None: all so far.
    """

    def __init__(self, inputs: Mapping[str, Any], window: int | None) -> None:
        self.inputs = inputs
        self.window = window
        self.cache = inputs["cache"]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], window: int | None) -> PackedRequests | None:
        """None where a forward is no step of continuous batching."""
        is_packed = "cu_seq_lens_q" in inputs and "write_index" in inputs and inputs.get("cache") is not None
        return cls(inputs, window) if is_packed else None

    def over_context(self, densities_NA: Tensor, key: str) -> Tensor:
        """[N, A]: log densities summed over each token and those before it in its own request, as the window has it.

        Args:
            key: the router's name, by which the cache keeps the sums.

        Raises:
            ValueError: the cache keeps fewer tokens than that, or is of another kind.
        """
        table_SA = SlotSums.on(self.cache).table(key, densities_NA)
        sums_NA = within_pieces(densities_NA, self._firsts) + _read(table_SA, self._before_piece)
        found_NA = sums_NA
        if self.window is not None:
            rows = (self._order - self.window).clamp(min=0)
            is_in_row = (self._places >= self.window)[:, None]
            found_NA = sums_NA - torch.where(is_in_row, sums_NA[rows], _read(table_SA, self._before_window))
        # Only now: with sliding attention the new tokens take the slots of the oldest.
        table_SA.index_copy_(0, self._written, sums_NA.detach())
        return found_NA

    @cached_property
    def _group(self) -> Any:
        """The layers whose slots are followed.

        Raises:
            ValueError: they keep fewer tokens than the classifier needs.
        """
        group = _group_of(self.cache)
        kept, needed = getattr(group, "sliding_window", None), self.window or 1
        if kept is not None and kept <= needed:
            raise ValueError(_SHORT.format(needed=needed, window=kept))
        return group

    @cached_property
    def _starts(self) -> Tensor:
        """[R + 1]"""
        return self.inputs["cu_seq_lens_q"].long()

    @cached_property
    def _requests(self) -> Tensor:
        """[N] the request of each token; padding, which follows them all, counts as the last one's."""
        return torch.searchsorted(self._starts[1:], self._order, right=True).clamp(max=self._starts.shape[0] - 2)

    @cached_property
    def _positions(self) -> Tensor:
        """[N] of each token in its request."""
        return self.inputs["position_ids"].flatten().long()

    @cached_property
    def _written(self) -> Tensor:
        """[N] the slots that the row's tokens take."""
        if self.inputs.get("block_table") is None:
            return self._compact(self.inputs["write_index"][self._group.index])
        return self._by_block_table(self._positions)

    @cached_property
    def _order(self) -> Tensor:
        """[N]"""
        return torch.arange(self._positions.shape[0], device=self._starts.device)

    @cached_property
    def _firsts(self) -> Tensor:
        """[N] the row of the first token of each one's piece."""
        return self._starts[self._requests]

    @cached_property
    def _places(self) -> Tensor:
        """[N] of each token in its request's piece."""
        return self._order - self._firsts

    @cached_property
    def _before_piece(self) -> tuple[Tensor, Tensor]:
        """Where the cache has the last token before each one's piece."""
        return self._cached(self._places + 1)

    @cached_property
    def _before_window(self) -> tuple[Tensor, Tensor]:
        """Where it has the last one before each one's window; those in the row are not meant."""
        assert self.window is not None
        return self._cached(torch.full_like(self._order, self.window))

    def _cached(self, lag_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N] slots of the tokens that lie `lag` before each, and whether there is one; any slot where none is."""
        positions = self._positions - lag_N
        return self._slots(lag_N - self._places, positions), positions >= 0

    def _slots(self, back_N: Tensor, positions_N: Tensor) -> Tensor:
        """[N] of tokens that lie `back` before their request's piece; any slot where none does."""
        if self.inputs.get("block_table") is not None:
            return self._by_block_table(positions_N)
        read = self.inputs["read_index"][self._group.index]
        if read.numel() == 0:  # nothing was read before
            return torch.zeros_like(positions_N)
        # From the end: with sliding attention the cache holds the latest tokens only.
        ends = self.inputs["cu_seq_lens_k"][self._group.layer_type].long()[1:]
        first_new = (ends - self._starts.diff())[self._requests]
        return self._compact(read[(first_new - back_N).clamp(0, read.shape[0] - 1)])

    def _by_block_table(self, positions_N: Tensor) -> Tensor:
        group = self._group
        table_RB = self.inputs["block_table"][group.index].long()
        pages = positions_N.clamp(min=0) // group.tokens_per_page
        entries = table_RB[self._requests, pages.clamp(max=table_RB.shape[1] - 1)].clamp(min=0)
        blocks = entries // (group.block_physical_stride // group.tokens_per_page)
        return blocks * group.tokens_per_page + positions_N.clamp(min=0) % group.tokens_per_page

    def _compact(self, slots: Tensor) -> Tensor:
        """A block's slots lie apart in the cache, by the keys and values of all layers; here they lie together."""
        page, stride = self._group.tokens_per_page, self._group.block_physical_stride
        return slots // stride * page + (slots % stride).clamp(max=page - 1)


def _read(table_SA: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
    """[N, A] of a table's slots; zero where there are none."""
    slots_N, is_there_N = where
    return torch.where(is_there_N[:, None], table_SA[slots_N], 0)


class SlotSums:
    """The densities of each text in a paged cache, summed up to each of its tokens, by router and slot."""

    def __init__(self, cache: Any) -> None:
        group = _group_of(cache)
        self.page = group.tokens_per_page
        self.layer_type = group.layer_type
        self.num_slots = cache.cache_tensor.numel() // group.bytes_per_block * self.page
        self.tables: dict[str, Tensor] = {}  # by router: [slots, A]

    @classmethod
    def on(cls, cache: Any) -> SlotSums:
        """What a paged cache keeps, from now on; it follows where the cache copies blocks.

        Raises:
            ValueError: the cache is of another kind.
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
        """Do to the sums what the cache did to its blocks."""
        for table_SA in self.tables.values():
            by_block = table_SA.view(-1, self.page, table_SA.shape[1])
            source, target = (torch.tensor(blocks, device=table_SA.device) for blocks in (sources, targets))
            by_block.index_copy_(0, target, by_block[source])


def _group_of(cache: Any) -> Any:
    """The layers whose slots are followed, as the cache allocates them: those that keep every token, if there are any.

    Raises:
        ValueError: the cache has no such groups.
    """
    groups = getattr(cache, "cache_allocators", None)
    if not groups:
        raise ValueError(_OTHER_CACHE)
    return groups.get(_FULL) or next(iter(groups.values()))


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
