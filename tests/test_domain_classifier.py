"""The classifier between adapters that follows from the statistics of their domains."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCAB, awaken, llama, mixture_of, routers_of
from peft import PeftModel

from moelora.config import MoELoraConfig
from moelora.experts import forget_domain, grow, learn_domain, put_together, select, take_apart
from moelora.ops.norm_linear import norm_linear
from moelora.routing import rms_norm
from moelora.routing.domain_classifier import (
    ContextDensities,
    DomainStatistics,
    discriminants,
    logits_by_domain,
    over_context,
)

WINDOW = MoELoraConfig.domain_window
WINDOWS = [WINDOW, None, 1, 9]
LOW, HIGH = (2, 10), (VOCAB - 8, VOCAB)  # two domains: spans of token ids


def texts(span, rows=8, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*span, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mixture_of_domains(rows=64, **overrides):
    """Two adapters of 4 and 3 experts: "default" knows tokens of the lower half, "grown_1" of the upper half."""
    model = mixture_of("llama", **overrides)
    learn_domain(model, "default", [texts(LOW, rows=rows)])
    grow(model, 3)
    old = {key: value.clone() for key, value in model.state_dict().items() if "default" in key}
    awaken(model)
    model.load_state_dict(old, strict=False)
    learn_domain(model, "grown_1", [texts(HIGH, rows=rows)])
    return model.eval()


def test_discriminants_are_log_densities_up_to_a_term_they_share():
    memories = [DomainStatistics(torch.randn(5), torch.randn(5, 5), torch.rand(5)) for _ in range(3)]
    weights, biases = discriminants(memories)
    shared = torch.stack([m.covariance() for m in memories]).mean(0)
    shared += 1e-3 * shared.diagonal().mean() * torch.eye(5)
    x = torch.randn(7, 5)
    exact = torch.stack(
        [torch.distributions.MultivariateNormal(m.mean, covariance_matrix=shared).log_prob(x) for m in memories], -1
    )
    ours = x @ weights.t() + biases
    torch.testing.assert_close(ours - ours[:, :1], exact - exact[:, :1], rtol=1e-3, atol=1e-3)


def test_single_precision_decides_as_double_does():
    """At the width and the magnitudes of a 7B model: a few huge dimensions, domains little apart, 4,096 tokens."""
    H, generator = 4096, torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    common, loud = normal(H) * 0.5, normal(64, H) * torch.logspace(0.5, -1.5, 64)[:, None] / 4
    common[[7, 99]] = torch.tensor([120.0, -60.0])
    domains = common + 0.005 * normal(3, H)
    hidden = {d: domains[d] + normal(1024, 64) @ loud + 0.3 * normal(1024, H) for d in range(3)}
    scale = common.square().mean().sqrt()
    memories = [
        DomainStatistics(rms_norm(hidden[d]).mean(0), loud / scale, torch.full((H,), 0.09) / scale.square())
        for d in range(3)
    ]
    weights, biases = discriminants(memories)
    text = torch.cat([hidden[0], hidden[1], hidden[2], hidden[0]])
    found = over_context((norm_linear(text, weights) + biases)[None], WINDOW)[0]
    exact = F.rms_norm(text.double(), (H,), eps=1e-6) @ weights.double().t() + biases.double()
    exact = exact.unfold(0, WINDOW, 1).sum(-1)  # from the first token that a whole window ends at
    found = found[WINDOW - 1 :]
    best, second = exact.topk(2).values.unbind(-1)
    is_clear = best - second > 0.01  # nats
    assert is_clear.double().mean() > 0.99 and set(exact.argmax(-1).tolist()) == {0, 1, 2}
    assert torch.equal(found.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])
    torch.testing.assert_close(found.softmax(-1).double(), exact.softmax(-1), rtol=0, atol=1e-3)


def summed(densities_BSA, window):
    """The formula of docs/maths.md, token by token."""
    length = densities_BSA.shape[1]
    firsts = [0 if window is None else max(0, t - window + 1) for t in range(length)]
    return torch.stack([densities_BSA[:, first : t + 1].sum(1) for t, first in enumerate(firsts)], dim=1)


@pytest.mark.parametrize("window", [*WINDOWS, 20, 21, 2**31 - 1])
def test_a_token_is_judged_with_those_before_it(window):
    densities = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(over_context(densities, window), summed(densities, window), rtol=1e-4, atol=1e-5)


def test_padding_and_old_tokens_add_nothing():
    densities = torch.ones(1, WINDOW + 6, 2)
    mask = torch.ones(1, WINDOW + 6, dtype=torch.bool)
    mask[0, :3] = False
    for window, last in ((WINDOW, WINDOW), (None, WINDOW + 3)):
        found = over_context(densities, window, mask)[0, :, 0]
        assert found[2] == 0 and found[3] == 1 and found[-1] == last


PIECES = {"at once": [40], "token by token": [1] * 40, "a prompt": [25, *[1] * 15], "pieces": [3, 11, 1, 25]}


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", WINDOWS)
def test_text_that_is_read_in_pieces_is_judged_as_a_whole(window, pieces, is_static):
    """A static cache says on the device, in a tensor, how many tokens it holds, once it holds any."""
    densities = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    earlier, found, past = ContextDensities(is_static), [], 0
    for piece in densities.split(pieces, dim=1):
        length = torch.tensor(past) if is_static and past else past
        found.append(over_context(piece, window, None, earlier, "router", length))
        past += piece.shape[1]
        if is_static and window is None:
            kept = earlier.kept["router"][0]  # of other shapes and strides, each token would be compiled anew
            assert kept.shape == (2, 1, 3) and kept.stride() == (3, 3, 1)
    torch.testing.assert_close(torch.cat(found, dim=1), summed(densities, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_static_cache_that_is_used_again_knows_nothing_of_the_text_before(window):
    densities = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    earlier = ContextDensities(is_static=True)
    for past, piece in ((0, densities[:, :20]), (0, densities[:, :4]), (4, densities[:, 4:])):
        found = over_context(piece, window, None, earlier, "router", torch.tensor(past))
    torch.testing.assert_close(found, summed(densities, window)[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "taken_back"), [(WINDOW, 30), (9, 9), (1, 1), (None, 30), (None, 69)])
def test_what_is_taken_back_and_read_again_counts_once(window, taken_back):
    densities, earlier = torch.randn(2, 75, 3, generator=torch.Generator().manual_seed(0)), ContextDensities()
    for past, piece in ((0, densities[:, :65]), (65, densities[:, 65:70]), (70 - taken_back, densities[:, 70:])):
        found = over_context(piece, window, None, earlier, "router", past)
    left = torch.cat([densities[:, : 70 - taken_back], densities[:, 70:]], dim=1)
    torch.testing.assert_close(found, summed(left, window)[:, -5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_stands_in_padding_reaches_no_token(broken):
    """A padded row may hold anything: attention over nothing but padding is NaN in some implementations."""
    densities = torch.randn(2, WINDOW + 6, 2)
    mask = torch.ones(2, WINDOW + 6, dtype=torch.bool)
    mask[0, :3] = mask[1, 5] = False
    expected = over_context(densities, WINDOW, mask)
    densities[0, 1] = densities[1, 5] = broken
    torch.testing.assert_close(over_context(densities, WINDOW, mask), expected, rtol=0, atol=0)


def test_the_classifier_gives_each_adapter_its_domains_share_whatever_the_scores():
    logits = [torch.randn(5, 2), torch.randn(5, 3) + 100]
    densities = torch.randn(5, 2)
    probs = F.softmax(logits_by_domain(logits, densities, 2.0) / 2.0, dim=-1)
    torch.testing.assert_close(probs[:, :2].sum(-1), densities.softmax(-1)[:, 0])
    torch.testing.assert_close(probs[:, 2:] / probs[:, 2:].sum(-1, keepdim=True), (logits[1] / 2.0).softmax(-1))


@pytest.mark.parametrize("scope", ["block", "model", "module"])
def test_texts_go_to_the_adapter_whose_domain_they_are_of(scope):
    model = mixture_of_domains(router_scope=scope)
    for span, experts in ((LOW, slice(0, 4)), (HIGH, slice(4, 7))):
        model.routing_stats(reset=True)
        with torch.no_grad():
            model(**texts(span, seed=5))
        for name, stats in model.routing_stats(reset=True).items():
            assert sum(stats.mean_probability[experts]) > 0.75, (span, name)


def test_other_experts_change_a_domain_no_more():
    """The point of the classifier: with the new adapter's experts and scores far away, old texts get the old output."""
    model = mixture_of_domains()
    inputs = texts(LOW, seed=5)
    with torch.no_grad():
        both = model(**inputs).logits
        model.set_adapter("default")
        alone = model(**inputs).logits
        model.set_adapter(["default", "grown_1"])
        forget_domain(model, "default")
        without_domains = model(**inputs).logits
    late = slice(8, None)  # the first tokens of a text say too little
    change, change_without = (
        (logits - alone)[:, late].norm() / alone[:, late].norm() for logits in (both, without_domains)
    )
    assert change < 0.03 and change_without > 0.5


@pytest.mark.parametrize("scope", ["block", "model", "module"])
def test_the_whole_text_tells_what_its_end_does_not(scope):
    """A prompt that begins with an instruction of one domain, and has a long text of the other behind it."""
    start, rest = (texts(span, rows=4, length=length)["input_ids"] for span, length in ((LOW, 60), (HIGH, 40)))
    found = {}
    for window in (8, None):
        model = mixture_of_domains(router_scope=scope, domain_window=window)
        with torch.no_grad():
            model(torch.cat([start, rest], dim=1))
        found[window] = sum(next(iter(model.routing_stats().values())).mean_probability[:4])  # the first block's
    assert found[8] < 0.7 and found[None] > 0.9


@pytest.mark.parametrize("window", [WINDOW, None, 9])
def test_saved_and_loaded_it_routes_alike(tmp_path, window):
    model = mixture_of_domains(domain_window=window)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    inputs = texts(HIGH, seed=6)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert all(router.routes_by_domain for router in routers_of(loaded).values())
    assert {config.domain_window for config in loaded.peft_config.values()} == {window}


def test_a_folder_of_before_windows_were_a_choice_has_the_one_that_there_was(tmp_path):
    model = mixture_of_domains()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for entry in (settings, *(adapter["config"] for adapter in settings["adapters"])):
        del entry["domain_window"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    loaded, inputs = PeftModel.from_pretrained(llama(), tmp_path).eval(), texts(HIGH, length=WINDOW + 6)
    assert {config.domain_window for config in loaded.peft_config.values()} == {64}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_adapters_with_other_windows_are_no_mixture():
    model = mixture_of_domains()
    model.peft_config["grown_1"].domain_window = None
    with pytest.raises(ValueError, match=r"`domain_window` is 64 in one and None in the other; make them equal"):
        model.set_adapter(["default", "grown_1"])


@pytest.mark.parametrize("scope", ["block", "model", "module"])
@pytest.mark.parametrize("window", WINDOWS)
def test_generating_token_by_token_routes_as_one_forward_does(window, scope):
    model = mixture_of_domains(domain_window=window, router_scope=scope)
    # Not as long as each other: after as many tokens of both no domain is the likelier, and roundings decide.
    ids = torch.cat([texts(LOW, rows=2)["input_ids"], texts(HIGH, rows=2, length=16)["input_ids"]], dim=1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :20], use_cache=True)
        for given in (None, type(first.past_key_values)()):  # made by the model in the first forward, or by generate
            pieces, cache = [], given
            for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
                step = model(input_ids=piece, past_key_values=cache, use_cache=True)
                pieces.append(step.logits)
                cache = step.past_key_values
            torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [WINDOW, None])
def test_tokens_that_are_taken_back_have_said_nothing(window):
    """As in assisted generation, which crops the cache to what it accepts."""
    model = mixture_of_domains(domain_window=window)
    ids = torch.cat([texts(LOW, rows=2, length=70)["input_ids"], texts(HIGH, rows=2, length=8)["input_ids"]], dim=1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=torch.cat([ids[:, :72], ids[:, -30:]], dim=1), use_cache=True).past_key_values
        cache.crop(-30)
        rest = model(input_ids=ids[:, 72:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 72:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [WINDOW, None])
def test_assisted_generation_answers_as_plain_generation_does(window):
    model, assistant = mixture_of_domains(domain_window=window), llama().eval()  # which is wrong about most tokens
    prompt = {name: value[:1, :40] for name, value in texts(LOW, length=40).items()}
    options = {"max_new_tokens": 30, "do_sample": False}
    with torch.no_grad():
        assisted = model.generate(**prompt, **options, assistant_model=assistant)
        assert torch.equal(assisted, model.generate(**prompt, **options))


@pytest.mark.parametrize("window", [WINDOW, None])
def test_padding_changes_nothing(window):
    model = mixture_of_domains(domain_window=window)
    inputs = texts(LOW, rows=2)
    pad = torch.zeros(2, 5, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([pad, inputs["attention_mask"]], dim=1),
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, 5:], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_forgot_ends_the_classifier():
    model = mixture_of_domains()
    forget_domain(model, "grown_1")
    assert not any(router.routes_by_domain for router in routers_of(model).values())
    assert not [key for key in model.state_dict() if "grown_1.memory" in key]


def test_only_several_adapters_with_domains_are_routed_by_domain():
    model = mixture_of("llama")
    inputs = texts(LOW)
    with torch.no_grad():
        before = model(**inputs).logits
        learn_domain(model, "default", [inputs])
        assert torch.equal(model(**inputs).logits, before)


def test_taken_apart_and_put_together_it_routes_alike():
    model, inputs = mixture_of_domains(), texts(HIGH, seed=7)
    with torch.no_grad():
        before = model(**inputs).logits
        again = put_together(model, take_apart(model)).eval()
        assert torch.equal(again(**inputs).logits, before)


# ---- one domain of several adapters ----------------------------------------------------------------------------------


def test_adapters_of_one_domain_share_its_probability_by_their_scores():
    logits = [torch.randn(5, 2), torch.randn(5, 3), torch.randn(5, 1)]
    densities = torch.randn(5, 2)[:, [0, 1, 0]]
    same = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    probs = F.softmax(logits_by_domain(logits, densities, 2.0, same) / 2.0, dim=-1)
    first = torch.cat([probs[:, :2], probs[:, 5:]], dim=-1)
    torch.testing.assert_close(first.sum(-1), densities[:, :2].softmax(-1)[:, 0])
    torch.testing.assert_close(
        first / first.sum(-1, keepdim=True), (torch.cat([logits[0], logits[2]], dim=-1) / 2.0).softmax(-1)
    )


def scored(model, hidden):
    """By router, each adapter's scores [T, E_a] and the densities [T, A] of hidden states [B, S, H]."""
    found = {}
    for name, router in routers_of(model).items():
        own, normed = router.active_routers(), rms_norm(hidden)
        densities = torch.cat([F.linear(normed, one.gate_weight, one.gate_bias) for one in own], dim=-1)
        found[name] = [one(normed).flatten(0, 1) for one in own], over_context(densities, WINDOW).flatten(0, 1)
    return found


@torch.no_grad()
def test_an_adapter_that_is_split_is_one_domain_still():
    """Pruned to fewer experts than top-k, it becomes single adapters."""
    model = mixture_of_domains(top_k_experts=3)
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(3))
    expected = {
        name: logits_by_domain([known[:, :2], grown], densities, 2.0).softmax(-1)
        for name, ((known, grown), densities) in scored(model, hidden).items()
    }
    split = put_together(model, select(take_apart(model), [0, 1, 4, 5, 6]))
    assert split.active_adapters == ["expert_0", "expert_1", "grown_1"]
    split.set_adapter(["expert_1", "grown_1", "expert_0"])  # parts of one domain need not be neighbours
    for name, router in routers_of(split).items():
        assert router.routes_by_domain
        found = router.logits(hidden).softmax(-1)[:, [4, 0, 1, 2, 3]]
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
    learn_domain(split, "grown_1", [texts(HIGH, rows=64)])  # solves anew, with each domain once
    for name, router in routers_of(split).items():
        found = router.logits(hidden).softmax(-1)[:, [4, 0, 1, 2, 3]]
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_without_a_domain_the_classifier_is_solved_anew():
    model = mixture_of_domains()
    grow(model, 2)
    learn_domain(model, "grown_2", [texts((20, 30), rows=64)])
    smaller = put_together(model, select(take_apart(model), [0, 1, 2, 3, 7, 8]))
    assert smaller.active_adapters == ["default", "grown_2"]
    for router in routers_of(smaller).values():
        own = router.active_routers()
        weights, biases = discriminants([one.domain for one in own])
        torch.testing.assert_close(torch.cat([one.gate_weight for one in own]), weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([one.gate_bias for one in own]), biases, rtol=1e-5, atol=1e-6)
