"""transformers' continuous batching: it answers as `generate` does to each prompt alone, or refuses."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import ARCHITECTURES, SCOPES, VOCAB, RandomRouter, awaken, every_pair, llama, mixture_of
from test_domain_classifier import texts
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig, MistralConfig, MistralForCausalLM

from moelora.config import MoELoraConfig
from moelora.experts import grow, learn_domain
from moelora.forward.packed_requests import PackedRequests, SlotSums
from moelora.routing.domain_classifier import over_context

ANSWER = 12
WINDOW = MoELoraConfig.domain_window
LOW, HIGH = (2, 44), (20, VOCAB)  # domains that overlap, so that a classifier is never quite sure


def gated(scope="block", **options):
    """A mixture of two adapters that are told apart by their domains."""
    model = mixture_of("llama", router_scope=scope, **options)
    learn_domain(model, "default", [texts(LOW, rows=64)])
    grow(model, 3)
    awaken(model, seed=3)
    learn_domain(model, "grown_1", [texts(HIGH, rows=64, seed=1)])
    return model.eval()


def prompts(*lengths, seed=0):
    """Of the two domains in turn, each changing to the other halfway: what a classifier says changes with them."""
    generator = torch.Generator().manual_seed(seed)
    spans = [(LOW, HIGH), (HIGH, LOW)]
    found = []
    for i, length in enumerate(lengths):
        first, second = spans[i % 2]
        half = length // 2
        ids = [
            torch.randint(*first, (length - half,), generator=generator),
            torch.randint(*second, (half,), generator=generator),
        ]
        found.append(torch.cat(ids).tolist())
    return found


PROMPTS = prompts(5, 90, 1, 33, 12)


def settings(**options):
    defaults = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**(defaults | options))


def small(**options):
    """A cache for tests; prompts longer than 64 tokens are read in pieces."""
    return ContinuousBatchingConfig(**({"page_size": 16, "num_blocks": 64, "max_batch_tokens": 64} | options))


def alone(model, given):
    """What `generate` answers to each prompt by itself, with the logits of every step [ANSWER, VOCAB]."""
    answers = []
    for ids in given:
        out = model.generate(
            torch.tensor([ids]), generation_config=settings(), return_dict_in_generate=True, output_logits=True
        )
        answers.append((out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits)))
    return answers


def together(model, given, generation=None, **config):
    outputs = model.generate_batch(
        given, generation or settings(), small(return_logprobs=True, **config), progress_bar=False
    )
    assert not [output.error for output in outputs.values() if output.error]
    return list(outputs.values())


def assert_same_as_alone(model, given=PROMPTS, **config):
    expected = alone(model, given)
    for output, (tokens, logits) in zip(together(model, given, **config), expected, strict=True):
        assert output.generated_tokens == tokens
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), wanted, rtol=0, atol=1e-4)


def with_attention(model, attention):
    model.get_base_model().set_attn_implementation(attention)
    return model


@every_pair(scope=SCOPES, attention=["sdpa", "eager"], window=[WINDOW, None, 5])
def test_a_mixture_with_a_domain_classifier(scope, attention, window):
    assert_same_as_alone(with_attention(gated(scope, domain_window=window), attention))


def test_the_classifier_is_what_the_tests_above_are_about():
    """A prompt that is read behind another's end, in one row, is answered otherwise."""
    model, (first, second) = gated(), prompts(40, 40)
    with torch.no_grad():
        behind = model(torch.tensor([first + second])).logits[0, -1]
        by_itself = model(torch.tensor([second])).logits[0, -1]
    assert (behind - by_itself).abs().max() > 0.01


MIXTURES = {
    "sparse": {},
    "dense": {"top_k_experts": 4},
    "one expert a token": {"top_k_experts": 1},
    "capacity": {"expert_capacity_factor": 1.0},
    "fixed": {"router_type": "fixed"},
    "sigmoid": {"router_type": "sigmoid"},
    "two layers": {"router_hidden_size": 8},
}


@pytest.mark.parametrize("options", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_that_reads_each_token_alone(options):
    assert_same_as_alone(mixture_of("llama", **options))


def test_eager_attention():
    assert_same_as_alone(with_attention(mixture_of("llama"), "eager"))


@pytest.mark.parametrize("scope", ["model", "module"])
def test_other_scopes(scope):
    assert_same_as_alone(mixture_of("llama", router_scope=scope))


def test_experts_that_have_not_matured():
    model = mixture_of("llama", router_type="learned_with_maturity")
    for expert, maturity in enumerate((0.0, 0.3, 0.7, 1.0)):
        model.set_expert_maturity(expert, maturity)
    assert_same_as_alone(model)


def test_an_attached_router_that_reads_each_token_alone():
    model = mixture_of("llama")
    model.attach_router(RandomRouter())
    assert_same_as_alone(model)


def test_a_mixture_that_is_switched_off():
    model = gated()
    with model.disable_adapter():
        assert_same_as_alone(model)


@pytest.mark.parametrize("window", [WINDOW, None])
def test_a_prefix_whose_keys_are_in_the_cache(window):
    """The second prompt's first 64 tokens are not read again, yet count in the window of those behind them."""
    model, start = gated(domain_window=window), prompts(70)[0]
    given = [start, start[:65] + prompts(6, seed=1)[0]]
    with model.continuous_batching_context_manager(settings(), continuous_batching_config=small()) as manager:
        for ids, (tokens, _) in zip(given, alone(model, given), strict=True):
            manager.add_request(ids, max_new_tokens=ANSWER)
            assert manager.get_result(timeout=60).generated_tokens == tokens
        assert manager.batch_processor.cache.use_prefix_sharing


@pytest.mark.parametrize("window", [WINDOW, None])
def test_several_answers_to_a_prompt(window):
    """Its last block, which is not full, is copied for each further answer."""
    model, given = gated(domain_window=window), prompts(60, 37)
    sampling = settings(num_return_sequences=3, do_sample=True, top_k=1)  # several greedy ones are not allowed
    outputs = together(model, given, sampling, page_size=64, num_blocks=16)
    for i, (tokens, _) in enumerate(alone(model, given)):
        assert [output.generated_tokens for output in outputs[3 * i : 3 * i + 3]] == [tokens] * 3


@pytest.mark.parametrize("window", [WINDOW, None])
def test_requests_that_lose_their_cache_and_are_read_again(window):
    assert_same_as_alone(gated(domain_window=window), prompts(60, 61, 62, 63), num_blocks=11, page_size=16)


def mistral(window):
    options = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = MistralConfig(
        **options, num_attention_heads=4, num_key_value_heads=2, sliding_window=window, pad_token_id=0
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize(("attention", "window"), [(72, WINDOW), (WINDOW + 1, WINDOW), (72, None), (2, None), (2, 1)])
def test_a_model_whose_cache_keeps_a_window_only(monkeypatch, attention, window):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], build=lambda: mistral(attention)))
    assert_same_as_alone(gated(domain_window=window), prompts(150, 5, 90), num_blocks=128)


@pytest.mark.parametrize(("attention", "window", "needed"), [(WINDOW, WINDOW, 64), (1, None, 1)])
def test_a_window_shorter_than_the_classifiers_is_refused(monkeypatch, attention, window, needed):
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], build=lambda: mistral(attention)))
    with pytest.raises(AssertionError, match=rf"needs {needed} tokens before each .* attend to {attention} "):
        together(gated(domain_window=window), PROMPTS)


# ---- refusals, before anything is generated --------------------------------------------------------------------------


def refused(match, model, **arguments):
    calls = []
    model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    for ask in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        given = {"inputs": PROMPTS} if ask == model.generate_batch else {}
        with pytest.raises(ValueError, match=match):
            ask(**given, generation_config=settings(), **arguments)
    assert not calls


def test_weights_by_hand_are_refused():
    refused("call `generate`, or use a mixture with fixed", mixture_of("llama"), routing_weights=torch.ones(5, 4))


class Recurrent(nn.Module):
    """Its weights for a token depend on the tokens before it."""

    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(32, 4, batch_first=True)

    def forward(self, hidden):
        return self.memory(hidden)[0].softmax(-1)


def test_an_attached_router_that_reads_a_text_is_refused():
    model = mixture_of("llama")
    model.attach_router(Recurrent())
    refused("the attached router Recurrent reads more of a text", model)
    outputs = model.get_base_model().generate_batch(PROMPTS, settings(), small(), progress_bar=False)
    assert all("Recurrent reads more of a text" in output.error for output in outputs.values())


def test_a_cache_that_moves_to_the_cpu_is_refused_under_a_classifier():
    config = ContinuousBatchingConfig(cpu_offload_space=0.5)
    refused("`cpu_offload_space` is 0.5", gated(), continuous_batching_config=config)
    mixture_of("llama").init_continuous_batching(settings(), config)  # there, nothing would be lost


# ---- what is left afterwards -----------------------------------------------------------------------------------------


def test_nothing_is_counted_and_nothing_stays():
    model = gated()
    model(torch.tensor([PROMPTS[0]]))
    counted, state = copy.deepcopy(model.routing_stats()), model.base_model.routing
    together(model, PROMPTS)
    assert model.routing_stats() == counted
    assert state.in_force.context is None and state.in_force.entry is None
    assert not state.in_force.call.prefilled and state.in_force.copies is None


def test_a_model_answers_alone_as_before():
    model = gated()
    before = alone(model, PROMPTS[:2])
    together(model, PROMPTS)
    for (tokens, logits), (again, anew) in zip(before, alone(model, PROMPTS[:2]), strict=True):
        assert tokens == again and torch.equal(logits, anew)


# ---- where a token's densities lie -----------------------------------------------------------------------------------


def paged_cache():
    manager = llama().init_continuous_batching(settings(), small(page_size=4))
    cache = manager._create_batch_processor().cache
    for _ in range(16):
        cache.pool.allocate_sector(0)
    return cache


def inputs_of(cache, requests, by_table):
    """What the model is given for requests (past, new) in this order, by indices or by a table of blocks."""
    starts, keys, positions, write, read = [0], [0], [], [[]], [[]]
    table = torch.full((1, len(requests), 8), -1, dtype=torch.int32)
    group = cache.cache_allocators["full_attention"]
    for i, (past, new) in enumerate(requests):
        starts.append(starts[-1] + new)
        keys.append(keys[-1] + past + new)
        positions += range(past, past + new)
        group.allocate_cache_to_request(str(i), past, new)
        cache.extend_read_and_write_indices(str(i), past, new, read, write)
        cache.fill_block_table(str(i), past, new, table[:, i])
    return {
        "cache": cache,
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens_q": torch.tensor(starts),
        "cu_seq_lens_k": {"full_attention": torch.tensor(keys)},
        "write_index": [torch.tensor(write[0])],
        "read_index": [torch.tensor(read[0])],
        "block_table": table if by_table else None,
    }


def read_by_pieces(cache, pieces, densities, window):
    """What is found for requests whose pieces (past, new) come one forward after the other; [N, A] of each forward."""
    found, at = [], 0
    for forward in pieces:
        new = sum(length for _, length in forward)
        packed = PackedRequests(inputs_of(cache, forward, by_table=False), window)
        found.append(packed.over_context(densities[at : at + new], "a"))
        at += new
    return found


@pytest.mark.parametrize("window", [None, 64, 4, 1])
def test_requests_in_a_row_are_judged_each_by_its_own_text(window):
    """Against the formula, text by text; the second request goes on where the others only begin."""
    densities = torch.randn(22, 2, generator=torch.Generator().manual_seed(0))
    pieces = [[(0, 5), (0, 3)], [(5, 2), (3, 6)], [(7, 5), (9, 1)]]
    first, second, third = read_by_pieces(paged_cache(), pieces, densities, window)
    one, other = [0, 1, 2, 3, 4, 8, 9, 16, 17, 18, 19, 20], [5, 6, 7, 10, 11, 12, 13, 14, 15, 21]
    together = torch.cat([first, second, third])
    for rows in (one, other):
        expected = over_context(densities[rows][None], window)[0]
        torch.testing.assert_close(together[rows], expected, rtol=1e-4, atol=1e-5)


def test_a_request_that_is_not_finite_reaches_no_other():
    densities = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([densities[:3], torch.full((1, 2), torch.nan), densities[4:]])
    expected, found = (read_by_pieces(paged_cache(), [[(0, 5), (0, 3)]], each, None)[0] for each in (densities, broken))
    torch.testing.assert_close(found[5:], expected[5:])


@pytest.mark.parametrize("window", [None, WINDOW, 2])
def test_a_table_of_blocks_names_the_same_slots(window):
    """The fast path of decoding on a GPU, which gives no indices."""
    cache = paged_cache()
    by_index = PackedRequests(inputs_of(cache, [(5, 1), (0, 1), (19, 1)], by_table=False), window)
    by_table = PackedRequests(inputs_of(cache, [(5, 1), (0, 1), (19, 1)], by_table=True), window)
    before = torch.rand(24, 2)
    SlotSums.on(cache).table("a", before)[:] = torch.rand(SlotSums.on(cache).num_slots, 2) + 1
    now = torch.rand(3, 2)
    expected = by_index.over_context(now, "a")
    torch.testing.assert_close(by_table.over_context(now, "a"), expected)
    assert not torch.isclose(expected[0], now[0]).any()  # what was there before counts
    torch.testing.assert_close(expected[1], now[1])


@pytest.mark.parametrize("window", [None, WINDOW, 2])
def test_padding_of_a_captured_graph_changes_nothing(window):
    """Tokens behind the last request, requests without tokens, and slots that are nobody's."""
    cache = paged_cache()
    inputs = inputs_of(cache, [(5, 3), (0, 2)], by_table=False)
    now = torch.rand(5, 2)
    expected = PackedRequests(inputs, window).over_context(now, "a")
    group, padding = cache.cache_allocators["full_attention"], torch.zeros(3, dtype=torch.long)
    padded = inputs | {
        "position_ids": torch.cat([inputs["position_ids"], padding[None]], dim=1),
        "cu_seq_lens_q": torch.tensor([0, 3, 5, 5, 5]),
        "cu_seq_lens_k": {
            "full_attention": torch.cat([inputs["cu_seq_lens_k"]["full_attention"], torch.tensor([10, 10])])
        },
        "write_index": [torch.cat([inputs["write_index"][0], padding + group.write_trash_index])],
        "read_index": [torch.cat([inputs["read_index"][0], padding + group.read_trash_index])],
    }
    found = PackedRequests(padded, window).over_context(torch.cat([now, torch.full((3, 2), torch.nan)]), "a")
    torch.testing.assert_close(found[:5], expected)


def test_another_kind_of_paged_cache_is_refused():
    with pytest.raises(ValueError, match=r"needs the paged cache of transformers 5\.23 or newer"):
        SlotSums.on(object())
