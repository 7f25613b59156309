"""What is summed up beside the KV cache, with tables of pages as vLLM would make them."""

import math
from types import SimpleNamespace

import pytest
import torch

from moelora.routing.domain_classifier import over_context
from moelora.serving.vllm import densities

PAGE = 4
WINDOWS = [None, 64, 5, 1]


def kept_in(monkeypatch, page):
    """What an engine keeps, and what lets a batch begin: requests (pages, past, new)."""
    batch = {}
    monkeypatch.setattr(densities, "is_forward_context_available", lambda: True)
    monkeypatch.setattr(densities, "get_forward_context", lambda: SimpleNamespace(attn_metadata=batch))

    def begin(*requests):
        starts, slots, lengths = [0], [], []
        table = torch.zeros(len(requests), max(len(pages) for pages, _, _ in requests), dtype=torch.int32)
        for row, (pages, past, new) in enumerate(requests):
            starts.append(starts[-1] + new)
            lengths.append(past + new)
            slots += [pages[at // page] * page + at % page for at in range(past, past + new)]
            table[row, : len(pages)] = torch.tensor(pages)
        batch["attention"] = SimpleNamespace(
            slot_mapping=torch.tensor(slots),
            query_start_loc=torch.tensor(starts),
            seq_lens=torch.tensor(lengths),
            block_table=table,
        )

    return densities.KeptDensities("attention", math.inf, SimpleNamespace(block_size=page)), begin


def said(tokens, seed):
    return torch.randn(tokens, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
def test_texts_that_are_read_in_pieces(monkeypatch, window):
    kept, begin = kept_in(monkeypatch, PAGE)
    one, other = said(11, 0), said(9, 1)
    pages = [7, 2, 5], [3, 9, 1]
    found = [[], []]
    for first, second in (((0, 5), (0, 2)), ((5, 1), (2, 6)), ((6, 5), (8, 1))):
        begin((pages[0], *first), (pages[1], *second))
        cut = one[first[0] : sum(first)], other[second[0] : sum(second)]
        both = kept.over_context("router", slice(0, first[1] + second[1]), torch.cat(cut), window)
        for parts, part in zip(found, both.split([first[1], second[1]]), strict=True):
            parts.append(part)
    for text, parts in zip((one, other), found, strict=True):
        torch.testing.assert_close(torch.cat(parts), over_context(text[None], window)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_only_the_tokens_of_one_mixture(monkeypatch, window):
    """Those of others stand between them; each mixture has a window of its own."""
    kept, begin = kept_in(monkeypatch, PAGE)
    first, others, last = said(6, 0), said(3, 1), said(4, 2)
    begin(([1, 2], 0, 6), ([3], 0, 3), ([4], 0, 4))
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 9, 10, 11, 12])
    found = kept.over_context("router", rows, torch.cat([first, last]), window)
    between = kept.over_context("router", slice(6, 9), others, 2)
    for text, part, its in ((first, found[:6], window), (last, found[6:], window), (others, between, 2)):
        torch.testing.assert_close(part, over_context(text[None], its)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_prefix_that_is_computed_in_the_same_batch(monkeypatch, window):
    """In an order in which the last one's pages come first."""
    kept, begin = kept_in(monkeypatch, PAGE)
    text, middle, end = said(8, 0), said(4, 1), said(3, 2)
    begin(([1, 2, 3, 4], 12, 3), ([1, 2, 3], 8, 4), ([1, 2], 0, 8))
    found = kept.over_context("router", slice(0, 15), torch.cat([end, middle, text]), window)
    expected = over_context(torch.cat([text, middle, end])[None], window)[0]
    torch.testing.assert_close(torch.cat([found[7:], found[3:7], found[:3]]), expected, rtol=1e-4, atol=1e-5)


def test_a_page_that_was_kept_above_all_new_ones(monkeypatch):
    """Of an adapter that learned domains after its folder was first served: nothing of the page is known."""
    for window in WINDOWS:
        kept, begin = kept_in(monkeypatch, 32)
        begin(([9, 0], 32, 1))
        assert kept.over_context("router", slice(0, 1), torch.ones(1, 2), window).tolist() == [[1.0, 1.0]]


def test_other_pages_than_those_of_the_cache_are_refused(monkeypatch):
    kept, begin = kept_in(monkeypatch, PAGE)
    begin(([1, 2], 0, 6))
    kept.cache.block_size = 8
    with pytest.raises(RuntimeError, match="has other pages than of 8 tokens"):
        kept.over_context("router", slice(0, 6), torch.ones(6, 2), None)


@pytest.mark.parametrize(
    ("attention", "window", "is_enough"),
    [([None], None, True), ([16, None, 8], 64, True), ([16, 65], 64, True), ([64], 64, False), ([2], None, True),
     ([1], None, False), ([2], 1, True)],
)  # fmt: skip
def test_the_layer_that_keeps_the_most_is_followed(attention, window, is_enough):
    layers = {f"layer {i}": SimpleNamespace(sliding_window=size) for i, size in enumerate(attention)}
    assert densities.KeptDensities.of(layers, None).reaches(window) == is_enough


def test_a_model_without_attention_keeps_nothing():
    assert densities.KeptDensities.of({}, None) is None
