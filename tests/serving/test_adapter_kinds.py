"""Every kind of adapter that moelora saves, on one engine with fewer slots than adapters."""

import pytest
import torch
from adapters import KINDS
from harness import BASE, assert_greedy, for_all, prompts

TEXTS = prompts((3, 40, 77, 131))


@pytest.fixture
def engine(llama):
    return llama.engine()


@pytest.mark.parametrize("kind", KINDS)
def test_is_served_as_transformers_runs_it(llama, engine, kind):
    assert engine.llm_engine.add_lora(llama.lora(kind))
    requests = for_all([kind], TEXTS)
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_what_the_base_says(llama, kind):
    """An adapter that does nothing would pass for one that is served well."""
    there = llama.reference(kind).logprobs(TEXTS[2])
    assert (there - llama.reference(BASE).logprobs(TEXTS[2])).abs().max() > 0.05


def test_all_kinds_and_the_base_in_one_batch(llama, engine):
    requests = for_all([BASE, *KINDS], TEXTS[1:3])
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)
    assert len(engine.llm_engine.list_loras()) < len(KINDS)


@pytest.fixture
def dirty_memory():
    """New memory holds no numbers until it is written; what an engine leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["sparse", "few_layers", "per_model", "per_module", "domains"])
def test_reads_no_memory_that_it_has_not_written(llama, engine, dirty_memory, kind):
    requests = for_all([kind], TEXTS[1:3])
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)
