"""Statistics of adapters' domains: how they are computed, from which tokens, and for several domains together."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import HIDDEN, awaken, mixture_of, routers_of
from test_domain_classifier import HIGH, LOW, mixture_of_domains, texts

from moelora.experts import domains, grow, knows_domain, learn_domain
from moelora.routing import rms_norm
from moelora.routing.domain_classifier import RIDGE, InputSketch, combined, discriminants, over_context


def inputs_like(mean, scale, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, len(mean), generator=generator) * scale + mean


def sketched(x, rank):
    sketch = InputSketch(x.shape[1], rank)
    sketch.add(x)
    return sketch.finish()


def test_a_sketch_of_full_width_is_the_covariance():
    x = inputs_like(torch.arange(6.0), torch.linspace(0.1, 3, 6), 500)
    sketch = InputSketch(6, rank=6)
    for part in x.split(130):
        sketch.add(part)
    statistics = sketch.finish()
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.covariance(), x.t().cov(correction=0), rtol=1e-4, atol=1e-5)


def test_a_narrow_sketch_finds_the_largest_directions_and_keeps_the_variance_of_all():
    scale = torch.tensor([9.0, 7.0, *[0.1] * 30])
    x = inputs_like(torch.zeros(32), scale, 4000)
    statistics = sketched(x, 4)
    exact = x.t().cov(correction=0)
    assert statistics.directions.shape == (4, 32)
    torch.testing.assert_close(statistics.covariance().diagonal(), exact.diagonal(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(statistics.covariance()[:2, :2], exact[:2, :2], rtol=1e-3, atol=0.05)  # the tail's 0.3


def test_a_sketch_of_pieces_has_the_covariance_of_their_sums():
    """Pieces of 1 to 9 tokens, whose numbers are in no order."""
    x = inputs_like(torch.arange(6.0), torch.linspace(0.1, 3, 6), 500)
    lengths = torch.arange(100) % 9 + 1
    pieces = list(x[: lengths.sum()].split(lengths.tolist()))
    sketch = InputSketch(6, rank=6)
    for start in range(0, 100, 30):
        some = pieces[start : start + 30]
        number_T = torch.cat([torch.full((len(part),), -number) for number, part in enumerate(some)])
        sketch.add(torch.cat(some), number_T)
    statistics, mean = sketch.finish(), torch.cat(pieces).mean(0)
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-5, atol=1e-5)
    sums = torch.stack([(part - mean).sum(0) for part in pieces])
    torch.testing.assert_close(statistics.covariance(), sums.t() @ sums / lengths.sum(), rtol=1e-4, atol=1e-4)
    assert sketch.pieces == 100


def test_no_tokens_are_refused_and_one_has_no_variance():
    with pytest.raises(ValueError, match="need tokens, got none"):
        InputSketch(4, rank=2).finish()
    one = sketched(torch.tensor([[1.0, 2.0, 3.0]]), 2)
    assert one.mean.tolist() == [1.0, 2.0, 3.0] and not one.covariance().any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_first_tokens_count_as_one_in_16_however_long_the_texts_are(side):
    """Of many texts of three tokens as of one of 24: the first token alone would else tell the two apart."""
    model = mixture_of("llama", router_scope="model")
    router = routers_of(model)[""]["default"]
    inputs = []
    for rows, length in ((64, 3), (8, 24)):
        batch = texts(LOW, rows=rows, length=length)
        batch["input_ids"][:, 0] = 60
        padding = torch.zeros(rows, 2, dtype=torch.long)
        parts = {key: [padding, value] if side == "left" else [value, padding] for key, value in batch.items()}
        learn_domain(model, "default", [{key: torch.cat(value, dim=1) for key, value in parts.items()}], rank=HIDDEN)
        embedded = rms_norm(model.get_input_embeddings()(batch["input_ids"]))
        first, others = embedded[:, 0].mean(0), embedded[:, 1:].flatten(0, 1).mean(0)
        torch.testing.assert_close(router.domain.mean, first / 16 + others * 15 / 16, rtol=1e-4, atol=1e-5)
        inputs.append(router.domain)
    weights, biases = discriminants(inputs)
    densities = weights @ rms_norm(model.get_input_embeddings()(torch.tensor(60))) + biases
    assert abs(float(densities[0] - densities[1])) < 0.3  # by their shares it would be log 8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 5, 1])
def test_the_covariance_is_that_of_windows_the_more_there_are(window, side):
    """Beside as many windows as the inputs are wide, half of it is that of single tokens."""
    model = mixture_of("llama", router_scope="model", domain_window=window)
    batch = texts(LOW, rows=6, length=12)
    padding = torch.zeros(6, 3, dtype=torch.long)
    parts = {key: [padding, value] if side == "left" else [value, padding] for key, value in batch.items()}
    learn_domain(model, "default", [{key: torch.cat(value, dim=1) for key, value in parts.items()}], rank=HIDDEN)
    embedded = rms_norm(model.get_input_embeddings()(batch["input_ids"])).double().detach()
    first, others = embedded[:, 0], embedded[:, 1:]
    apart = others - others.mean((0, 1))
    sums = [part.sum(1) for part in apart.split(window or 11, dim=1)]
    number = sum(len(part) for part in sums)
    of_windows = number / (number + HIDDEN)
    found = sum(part.t() @ part for part in sums) / 66 * of_windows
    found += apart.flatten(0, 1).t() @ apart.flatten(0, 1) / 66 * (1 - of_windows)
    between = first.mean(0) - others.mean((0, 1))
    expected = found * 15 / 16 + first.t().cov(correction=0) / 16 + torch.outer(between, between) * 15 / 256
    covariance = routers_of(model)[""]["default"].domain.covariance()
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-3, atol=1e-4)


def test_an_instruction_tells_tasks_whose_texts_are_of_anything():
    """What a text is about is in all of its tokens, and outweighs its instruction if tokens count as independent."""

    def task(number, rows=400, length=60):
        generator = torch.Generator().manual_seed(number)
        topics = torch.randn(rows, 1, 7, generator=generator).expand(-1, length, -1)
        said = torch.zeros(rows, length, 1).index_fill(1, torch.arange(4), 1.0 - 2 * (number % 2))
        return torch.cat([topics, said], dim=-1) + 0.1 * torch.randn(rows, length, 8, generator=generator)

    right = {}
    for what, piece in (("texts", torch.arange(400).repeat_interleave(60)), ("tokens", None)):
        domains = []
        for number in range(2):
            sketch = InputSketch(8, rank=8)
            sketch.add(task(number).flatten(0, 1), piece)
            domains.append(sketch.finish())
        weights, biases = discriminants(domains)
        sums = [over_context(F.linear(task(number), weights, biases), None)[:, -1] for number in (2, 3)]
        right[what] = torch.cat([sums[0].argmax(-1) == 0, sums[1].argmax(-1) == 1]).float().mean()
    assert right["texts"] > 0.99 and right["tokens"] < 0.9


@pytest.mark.parametrize(
    ("name", "options", "batches", "message"),
    [
        ("nobody", {}, [texts(LOW)], "'nobody' does not exist"),
        ("default", {"router_type": "fixed"}, [texts(LOW)], "constant weights"),
        ("default", {}, [], "hold 0 tokens"),
    ],
)
def test_what_has_no_domain_is_refused(name, options, batches, message):
    with pytest.raises(ValueError, match=message):
        learn_domain(mixture_of("llama", **options), name, batches)


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_statistics_without_directions_are_refused(rank):
    model = mixture_of("llama")
    with pytest.raises(ValueError, match=rf"`rank` \({rank}\) is not valid; pass an integer of 1 or more"):
        learn_domain(model, "default", [texts(LOW)], rank=rank)
    assert not knows_domain(model, "default")


def test_what_is_not_finite_is_refused_and_old_statistics_stay():
    """Of a model whose second block breaks: the first block's router is not given new ones either."""
    model = mixture_of("llama")
    learn_domain(model, "default", [texts(LOW)])
    before = {key: value.clone() for key, value in model.state_dict().items() if "router" in key}
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1' reads of the texts for adapter 'default' is not finite"):
        learn_domain(model, "default", [texts(LOW, seed=1)])
    after = model.state_dict()
    assert before and all(torch.equal(after[key], value) for key, value in before.items())


def test_padding_is_in_no_statistics():
    model, inputs = mixture_of("llama"), texts(LOW)
    assert learn_domain(model, "default", [inputs]) == 8 * 24
    expected = {name: router["default"].domain for name, router in routers_of(model).items()}
    assert learn_domain(model, "default", [{name: F.pad(ids, (0, 6)) for name, ids in inputs.items()}]) == 8 * 24
    for name, router in routers_of(model).items():
        statistics = router["default"].domain
        torch.testing.assert_close(statistics.mean, expected[name].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.covariance(), expected[name].covariance(), rtol=1e-3, atol=1e-4)


def test_no_more_is_read_than_was_asked_for():
    model, batches = mixture_of("llama"), iter([texts(LOW, seed=seed) for seed in range(9)])
    assert learn_domain(model, "default", batches, max_tokens=500) == 3 * 8 * 24
    assert len(list(batches)) == 6


@pytest.mark.parametrize(
    ("name", "scope", "calls"), [("llama", "model", 1), ("llama", "block", 3), ("bart", "model", 3)]
)
def test_forwards_end_where_the_one_router_has_read_all(name, scope, calls, monkeypatch):
    """After a first whole one; bart's reads the encoder's embeddings and the decoder's."""
    model = mixture_of(name, router_scope=scope)
    batches = [texts(LOW, seed=seed) for seed in range(3)]
    before = model(**batches[0]).logits
    counts = []
    model.get_base_model().register_forward_hook(lambda *_: counts.append(1))
    learn_domain(model, "default", batches)
    assert len(counts) == calls
    ended = {key: value.clone() for key, value in model.state_dict().items() if "memory" in key}
    assert torch.equal(model(**batches[0]).logits, before)
    monkeypatch.setattr(domains, "_may_be_left", lambda model: False)
    learn_domain(model, "default", batches)
    assert len(ended) == 3 * len(routers_of(model))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in ended.items())


def test_what_another_thread_reads_is_in_no_statistics_and_its_forward_does_not_end():
    model = mixture_of("llama", router_scope="model")
    batches = [texts(LOW, seed=seed) for seed in range(3)]
    learn_domain(model, "default", batches)
    (router,) = (each["default"] for each in routers_of(model).values())
    alone = router.domain

    def disturbed(pool):
        for batch in batches:
            yield batch
            assert pool.submit(model, **texts(HIGH)).result().logits.isfinite().all()

    with ThreadPoolExecutor(1) as pool:
        learn_domain(model, "default", disturbed(pool))
    assert router.domain.equals(alone)


@pytest.mark.parametrize("brought", ["_hf_hook", "full_tensor"])
def test_forwards_do_not_end_where_weights_are_brought_and_taken_away(brought):
    model = mixture_of("llama", router_scope="model")
    base = model.get_base_model()
    setattr(base.model.norm if brought == "_hf_hook" else base.model.norm.weight, brought, None)
    counts = []
    base.register_forward_hook(lambda *_: counts.append(1))
    learn_domain(model, "default", [texts(LOW, seed=seed) for seed in range(3)])
    assert len(counts) == 3


def test_combined_memories_are_that_of_all_inputs_together():
    parts = [
        inputs_like(torch.arange(6.0) * sign, torch.linspace(0.1, 3, 6), 500, seed)
        for seed, sign in enumerate((1, -0.5))
    ]
    memories = [sketched(part, 6) for part in parts]
    both = combined(memories, 6)
    together = torch.cat(parts)
    torch.testing.assert_close(both.mean, together.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.covariance(), together.t().cov(correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 4])
def test_many_directions_and_few_are_solved_for_alike(rank):
    """Two domains of rank 3 have fewer directions together than 8 inputs, of rank 4 as many."""
    ours = [sketched(inputs_like(torch.randn(8) * 3, torch.rand(8) + 0.5, 400, seed), rank) for seed in range(2)]
    weights, biases = discriminants(ours)
    covariance = torch.stack([each.covariance() for each in ours]).double().mean(0)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(8)
    means = torch.stack([each.mean for each in ours]).double()
    expected = (means - means.mean(0)) @ covariance.inverse()
    torch.testing.assert_close(weights, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(biases, -(expected * (means + means.mean(0)) / 2).sum(-1).float(), rtol=1e-4, atol=1e-4)


def test_combined_memories_keep_the_largest_directions_and_the_variance_of_all():
    apart = torch.zeros(32).index_fill(0, torch.tensor(5), 20.0)
    parts = [inputs_like(apart * sign, torch.ones(32), 4000, seed) for seed, sign in enumerate((1, -1))]
    both = combined([sketched(part, 4) for part in parts], 4)
    exact = torch.cat(parts).t().cov(correction=0)
    assert both.directions.shape == (4, 32)
    torch.testing.assert_close(both.covariance().diagonal(), exact.diagonal(), rtol=1e-3, atol=1e-3)
    assert both.directions[0].abs().argmax() == 5  # between the domains lies most of the variance


def test_an_only_expert_acts_where_its_domain_is_told_and_on_no_other_token():
    """Else each old one would add its share of the probability to every token for good, and be computed for it."""
    kind = {"router_type": "learned_with_maturity", "router_scope": "model"}
    model = mixture_of("llama", single_expert=True, top_k_experts=1, **kind)
    grow(model)
    awaken(model)
    weights = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda router, inputs, made: weights.append(made))
    counts = {}
    for known in (0, 2):
        for name, span in zip(("default", "grown_1")[:known], (LOW, HIGH), strict=False):
            learn_domain(model, name, [texts(span, rows=64)])
        assert model.expert_maturity.tolist() == [known / 2] * 2
        weights.clear()
        with torch.no_grad():
            model(**texts(LOW, seed=5))
        counts[known] = {int(count) for each in weights for count in (each != 0).sum(-1).flatten()}
    assert counts == {0: {2}, 2: {1}}


def test_experts_of_several_stay_as_mature_as_training_left_them():
    model = mixture_of_domains(router_type="learned_with_maturity")
    assert model.expert_maturity.tolist() == [0.0] * 7
