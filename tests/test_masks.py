"""Padding masks of every form a transformers model takes."""

import pytest
import torch
from helpers import ARCHITECTURES, every_pair, mixture_of

from moelora.forward import state
from moelora.forward.masks import decoder_mask_from_labels, token_mask, without_nothing

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
PADDINGS = {"left": LEFT, "right": RIGHT, "none": torch.ones(3, 5, dtype=torch.int64)}


def four_d(mask, *, causal, opened, kind):
    """[B, 1, S, S] as transformers makes it; opened: rows of padded queries see everything (softmax of nothing)."""
    length = mask.shape[1]
    visible = mask[:, None, None, :].bool().expand(-1, 1, length, -1)
    if causal:
        visible = visible & torch.ones(length, length, dtype=torch.bool).tril()
    if opened:
        visible = visible | ~visible.any(-1, keepdim=True)
    if kind == "bool":
        return visible
    if kind == "int":
        return visible.long()
    minimum = float("-inf") if kind == "inf" else torch.finfo(getattr(torch, kind)).min
    return torch.zeros(visible.shape, dtype=torch.float32 if kind == "inf" else getattr(torch, kind)).masked_fill(
        ~visible, minimum
    )


@every_pair(
    padding=PADDINGS,
    causal=[True, False],
    opened=[True, False],
    kind=["bool", "int", "float32", "bfloat16", "float16", "inf"],
)
def test_four_dimensions_say_what_two_do(padding, causal, opened, kind):
    mask = PADDINGS[padding]
    given = four_d(mask, causal=causal, opened=opened, kind=kind)
    assert token_mask(given, 5).tolist() == mask.bool().tolist()


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_one_row_for_all_queries(kind):
    """[B, 1, 1, S], BERT's extended mask."""
    given = four_d(RIGHT, causal=False, opened=False, kind=kind)[:, :, :1]
    assert token_mask(given, 5).tolist() == RIGHT.bool().tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_two_dimensions(dtype):
    assert token_mask(LEFT.to(dtype), 5).tolist() == LEFT.bool().tolist()


def test_a_dictionary_by_attention_type():
    masks = {"sliding_attention": torch.zeros(3, 1, 5, 5), "full_attention": LEFT}
    assert token_mask(masks, 5).tolist() == LEFT.bool().tolist()
    assert token_mask({"sliding_attention": LEFT}, 5).tolist() == LEFT.bool().tolist()
    assert token_mask({}, 5) is None


@pytest.mark.parametrize("past", [0, 2, 4, torch.tensor(4)], ids=str)
def test_cached_steps_read_their_own_columns(past):
    length = 1 if past == 4 else 2
    expected = LEFT[:, int(past) : int(past) + length].bool()
    assert token_mask(LEFT, length, past).tolist() == expected.tolist()


def test_static_cache_is_longer_than_the_text():
    mask = torch.cat([LEFT, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    assert token_mask(mask, 5, 0).tolist() == LEFT.bool().tolist()


@pytest.mark.parametrize("given", [None, torch.ones(5), torch.ones(3, 5, 5), "causal"], ids=["none", "1d", "3d", "str"])
def test_what_says_nothing(given):
    assert token_mask(given, 5) is None


def test_a_mask_that_hides_something_stays():
    for mask in (torch.tensor([[True, False]]), torch.tensor([[False, False]])):
        assert without_nothing(mask) is mask
    assert without_nothing(torch.ones(2, 3, dtype=torch.bool)) is None and without_nothing(None) is None
    hidden = torch.ones(1, 2, dtype=torch.bool, device="meta")
    assert without_nothing(hidden) is hidden  # whose values nobody knows


def test_all_padding_row():
    assert token_mask(torch.tensor([[0, 0], [1, 0]]), 2).tolist() == [[False, False], [True, False]]


def test_decoder_mask_from_labels():
    labels = torch.tensor([[7, 8, -100], [7, -100, -100], [-100, -100, -100]])
    expected = [[True, True, True], [True, True, False], [True, False, False]]
    assert decoder_mask_from_labels(labels).tolist() == expected
    assert decoder_mask_from_labels(None) is None and decoder_mask_from_labels(torch.tensor([1])) is None
    assert decoder_mask_from_labels(torch.tensor([[5]])).tolist() == [[True]]


@pytest.mark.parametrize(("name", "stacks"), [("llama", 1), ("t5", 2)])
def test_blocks_share_the_mask_of_their_stack(name, stacks, monkeypatch):
    calls, original = [], state.token_mask
    monkeypatch.setattr(state, "token_mask", lambda *arguments: calls.append(1) or original(*arguments))
    model, inputs = mixture_of(name), ARCHITECTURES[name].batch(2, 5)
    for forwards in (1, 2):
        model(**inputs)
        assert len(calls) == stacks * forwards
