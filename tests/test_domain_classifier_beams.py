"""The densities of a text's tokens follow its sequence when generation reorders, repeats or copies a cache."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import VOCAB, mixture_of
from test_domain_classifier import HIGH, LOW, mixture_of_domains, texts
from transformers import DynamicCache

WINDOWS = [64, None]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
def test_what_was_said_follows_its_sequence_when_a_cache_is_reordered(how, window):
    model, rows = mixture_of_domains(domain_window=window), torch.tensor([2, 0, 0, 3])
    ids = torch.cat([texts(LOW, rows=2)["input_ids"], texts(HIGH, rows=2)["input_ids"]])
    more = texts((2, VOCAB), rows=4, length=3)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache = copy.deepcopy(cache) if how == "batch_select_indices" else cache
        first = model(input_ids=more[:, :1], past_key_values=cache, use_cache=True)
        getattr(cache, how)(rows)
        rest = model(input_ids=more[:, 1:], past_key_values=cache, use_cache=True).logits
        whole = model(input_ids=torch.cat([ids[rows], more[rows, :1], more[:, 1:]], dim=1)).logits
    torch.testing.assert_close(rest, whole[:, -2:], rtol=1e-3, atol=1e-4)
    assert isinstance(cache, type(DynamicCache())) and first.past_key_values is cache


@pytest.mark.parametrize("window", WINDOWS)
def test_what_was_said_follows_its_sequence_when_a_cache_is_repeated(window):
    model = mixture_of_domains(domain_window=window)
    ids = torch.cat([texts(LOW, rows=1)["input_ids"], texts(HIGH, rows=1)["input_ids"]])
    more = texts((2, VOCAB), rows=4, length=3)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        rest = model(input_ids=more, past_key_values=cache, use_cache=True).logits
        whole = model(input_ids=torch.cat([ids.repeat_interleave(2, dim=0), more], dim=1)).logits
    torch.testing.assert_close(rest, whole[:, -3:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_with_a_cache_finds_what_it_finds_without(cache, window):
    """The prompt is of both domains, so that beams turn to one or the other and change places."""
    model = mixture_of_domains(domain_window=window)
    prompts = torch.cat([texts(LOW, rows=6, length=3)["input_ids"], texts(HIGH, rows=6, length=3)["input_ids"]], dim=1)
    options = {"num_beams": 4, "max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
    found = model.generate(**inputs, **options, cache_implementation=cache)
    exact = model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(found.sequences, exact.sequences)
    torch.testing.assert_close(found.sequences_scores, exact.sequences_scores, rtol=1e-4, atol=1e-5)
    assert any(len(set(rows.tolist())) > 1 for rows in found.beam_indices), "no beam changed its place"


def test_a_cache_with_densities_is_copied_pickled_and_freed_at_once():
    model = mixture_of_domains()
    with torch.no_grad():
        cache = model(**texts(LOW), use_cache=True).past_key_values
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(again) is DynamicCache and torch.equal(again.layers[0].keys, cache.layers[0].keys)
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache, again
        assert alive() is None
    finally:
        gc.enable()


def test_the_cache_of_a_mixture_without_domains_is_left_alone():
    with torch.no_grad():
        cache = mixture_of("llama")(**texts(LOW), use_cache=True).past_key_values
    assert type(cache) is DynamicCache
