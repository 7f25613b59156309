"""However vLLM cuts a batch: prompts in parts, kept prefixes, preempted requests, several answers, new slots."""

import math

import pytest
from harness import BASE, TOLERANCE, Request, assert_greedy, for_all, prompts
from vllm.sampling_params import BeamSearchParams

from moelora.serving.vllm import densities

ADAPTERS = [BASE, "plain", "sparse", "domains", "domains_whole_text"]
"""All four slots are taken, and the base is asked beside them."""
TEXTS = prompts((3, 40, 77, 131))


@pytest.fixture
def engine(llama):
    return llama.engine()


@pytest.fixture
def caching(llama):
    return llama.engine(enable_prefix_caching=True)


def test_long_prompts(llama, engine):
    requests = for_all(ADAPTERS, prompts((1000, 1000, 1000, 1000))[2:])
    outputs = llama.ask(engine, requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_several_answers_to_a_prompt(llama, engine):
    requests = for_all(ADAPTERS, TEXTS[1:3])
    outputs = llama.ask(engine, requests, n=3, temperature=1.0)  # no seed of its own, which vLLM 0.32 fails at on a CPU
    llama.assert_same(requests, outputs)
    for output in outputs:
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3


def test_the_likeliest_tokens_of_each_place(llama, engine):
    requests = for_all(ADAPTERS, TEXTS[1:3])
    for request, output in zip(requests, llama.ask(engine, requests, logprobs=5, prompt_logprobs=5), strict=True):
        answer = output.outputs[0]
        expected = llama.reference(request.adapter).logprobs([*request.prompt, *answer.token_ids])
        places = [*output.prompt_logprobs[1:], *answer.logprobs]
        for place, row in zip(places, expected, strict=False):
            likeliest = row.topk(5)
            ranked = sorted(place.values(), key=lambda found: found.rank)[:5]
            assert [found.logprob for found in ranked] == pytest.approx(likeliest.values.tolist(), abs=TOLERANCE)


def beams_of(reference, prompt, width, length):
    """The likeliest continuations and the logarithms of their probabilities, by beams over the whole vocabulary."""
    beams = [((), 0.0)]
    for _ in range(length):
        longer = []
        for tokens, total in beams:
            best = reference.logprobs([*prompt, *tokens])[-1].topk(width)
            longer += [
                ((*tokens, i), total + v) for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    return beams


def test_beam_search(llama, engine):
    requests = for_all(ADAPTERS, TEXTS[2:])
    outputs = engine.beam_search(
        [{"prompt_token_ids": list(request.prompt)} for request in requests],
        BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True),
        lora_request=[llama.lora(request.adapter) for request in requests],
    )
    for request, output in zip(requests, outputs, strict=True):
        expected = beams_of(llama.reference(request.adapter), request.prompt, 3, 5)
        found = [(tuple(beam.tokens[len(request.prompt) :]), beam.cum_logprob) for beam in output.sequences]
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected], request.adapter
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            assert math.isclose(ours, theirs, abs_tol=5 * TOLERANCE)


def test_an_adapter_that_is_removed_and_added_while_it_serves(llama, engine):
    requests = for_all(["sparse", "plain"], TEXTS[:2])
    llama.ask(engine, requests)
    engine.llm_engine.remove_lora(llama.lora("sparse").lora_int_id)
    assert llama.lora("sparse").lora_int_id not in engine.llm_engine.list_loras()
    llama.assert_same(requests, llama.ask(engine, requests))


def test_prompts_that_are_read_in_parts(llama):
    requests = for_all(ADAPTERS, [*TEXTS, *prompts((300,), seed=1)])
    outputs = llama.ask(llama.engine(max_num_batched_tokens=32), requests)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_prefixes_that_are_kept(llama, caching):
    requests = for_all(ADAPTERS, TEXTS)
    llama.assert_same(requests, llama.ask(caching, requests))
    longer = [Request(request.adapter, request.prompt + TEXTS[1][:9]) for request in requests]
    for again in (requests, longer):
        outputs = llama.ask(caching, again, prompt_logprobs=None)  # with them a prompt is read anew
        assert sum(output.num_cached_tokens for output in outputs) >= len(ADAPTERS) * (32 + 64 + 128)
        llama.assert_same(again, outputs)
        assert_greedy(llama, again, outputs)


def test_prompts_that_begin_alike_in_one_batch(llama, caching, monkeypatch):
    """vLLM has a prompt share pages that are computed in the very same forward, and these may share others."""
    rounds, count = [], densities._rounds
    monkeypatch.setattr(densities, "_rounds", lambda *places: rounds.append(count(*places)) or rounds[-1])
    start, middle, end = prompts((70, 70, 70), seed=7)
    alike = [start, start[:64] + middle, start[:64] + middle[:64] + end]
    requests = for_all(ADAPTERS, alike)
    outputs = llama.ask(caching, requests, prompt_logprobs=None)
    assert max(rounds) == 3
    assert sum(output.num_cached_tokens for output in outputs) >= len(ADAPTERS) * (64 + 128)
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_log_probabilities_of_prompts_whose_prefix_is_kept(llama, caching):
    requests = for_all(ADAPTERS, TEXTS)
    llama.ask(caching, requests, prompt_logprobs=None)
    llama.assert_same(requests, llama.ask(caching, requests))


def preemptions(engine):
    return sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def test_requests_that_are_preempted_and_computed_again(llama):
    requests = for_all(ADAPTERS, prompts((70, 90)))
    cache = {"num_gpu_blocks_override": 14, "max_model_len": 256, "disable_log_stats": False}
    engine = llama.engine(**cache)
    outputs = llama.ask(engine, requests, max_tokens=40)
    assert preemptions(engine) > 0
    llama.assert_same(requests, outputs)
    assert_greedy(llama, requests, outputs)


def test_slots_that_are_emptied_and_filled_again(llama):
    adapters = [*ADAPTERS, "set_weights", "of_every_age"]
    engine = llama.engine(max_loras=2)
    for order in (adapters, adapters[::-1]):  # a slot holds a mixture now and a plain LoRA later
        requests = [Request(name, text) for name in order for text in TEXTS[:2]]
        outputs = llama.ask(engine, requests)
        llama.assert_same(requests, outputs)
        assert_greedy(llama, requests, outputs)
        assert len(engine.llm_engine.list_loras()) <= 2
