"""torch.compile: one graph, the same numbers as without, and no new graph as experts' loads change."""

import copy
import itertools
import pydoc

import pytest
import torch
from helpers import VOCAB, assert_same_grads, llama, mixture_of, train_step
from test_domain_classifier import mixture_of_domains

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Tracing is the same for every backend; "aot_eager" skips only inductor's code generation, which takes a minute here.
RUNS = [
    pytest.param("cpu", "aot_eager", id="cpu-traced"),
    pytest.param("cpu", "inductor", id="cpu-inductor", marks=pytest.mark.slow),
    pytest.param("cuda", "inductor", id="cuda-inductor", marks=ON_GPU),
]
# Inductor fuses, and so rounds, in another order: float32's 24 bits through two blocks.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MLP_FORWARD, ATTENTION_FORWARD = (
    f"transformers.models.llama.modeling_llama.{name}.forward" for name in ("LlamaMLP", "LlamaAttention")
)
IDS = torch.arange(1, 43).view(3, 14)
PADDED = {"input_ids": IDS, "labels": IDS, "attention_mask": (torch.arange(14) >= torch.tensor([[0], [3], [9]])).long()}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches(device):
    """Batches of one shape whose tokens, and so the experts' loads, differ."""
    for shift in (0, 11, 23, 40):
        ids = (IDS + shift) % 63 + 1
        yield {name: value.to(device) for name, value in (PADDED | {"input_ids": ids, "labels": ids}).items()}


def stance(step):
    """The second step finds counters that the first one made, which is another graph; after that there is none."""
    return torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile")


def compile_blocks(model, backend):
    for block in model.base_model.model.model.layers:
        block.compile(fullgraph=True, backend=backend)
    return model


def compile_model(model, backend):
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("compiled", "router_type"),
    [
        (compile_blocks, "learned_with_maturity"),
        (compile_model, "fixed"),
        pytest.param(compile_blocks, "fixed", marks=pytest.mark.slow),
        pytest.param(compile_model, "learned_with_maturity", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_training_is_one_graph(device, backend, compiled, router_type):
    plain = mixture_of("llama", router_type=router_type).to(device)
    twin = copy.deepcopy(plain)
    fast = compiled(twin, backend)
    for step, inputs in enumerate(batches(device)):
        expected_loss, expected_grads = train_step(plain, inputs)
        with stance(step):
            loss, _ = train_step(fast, inputs)
        grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        assert_same_grads(grads, expected_grads, **CLOSE)
    if router_type != "fixed":
        torch.testing.assert_close(twin.expert_maturity, plain.expert_maturity, **CLOSE)
        stats, expected = twin.routing_stats(), plain.routing_stats()
        assert {n: s.expert_load for n, s in stats.items()} == {n: s.expert_load for n, s in expected.items()}


@pytest.mark.parametrize(
    "scope", ["block", *(pytest.param(name, marks=pytest.mark.slow) for name in ("model", "module"))]
)
@pytest.mark.parametrize("where", [ATTENTION_FORWARD, pytest.param(MLP_FORWARD, marks=pytest.mark.slow)])
def test_a_model_that_breaks_its_graph(monkeypatch, where, scope):
    """What one compiled piece leaves in force, the next one, or what runs between them, finds."""
    plain = mixture_of("llama", base=llama(num_hidden_layers=1), router_scope=scope)
    twin = copy.deepcopy(plain)
    owner, _, name = where.rpartition(".")
    forward = getattr(pydoc.locate(owner), name)

    def broken(self, *args, **options):
        torch._dynamo.graph_break()
        return forward(self, *args, **options)

    monkeypatch.setattr(where, broken)
    fast = torch.compile(twin, backend="eager")
    for inputs in itertools.islice(batches("cpu"), 2):
        expected_loss, expected_grads = train_step(plain, inputs)
        loss, _ = train_step(fast, inputs)
        grads = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        assert_same_grads(grads, expected_grads, **CLOSE)
    assert twin.base_model.routing.in_force.context is None and twin.base_model.routing.in_force.entry is None
    torch.testing.assert_close(twin.expert_maturity, plain.expert_maturity, **CLOSE)


@pytest.mark.parametrize("compiled", [compile_blocks, pytest.param(compile_model, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_forward_that_is_not_finite_is_left_out_in_the_same_graph(device, backend, compiled):
    model = mixture_of("llama", base=llama(num_hidden_layers=1), router_type="learned_with_maturity").to(device).train()
    with torch.no_grad():
        model.get_input_embeddings().weight[-1] = float("nan")
    fast = compiled(model, backend)
    for step, inputs in enumerate(batches(device)):
        inputs["input_ids"] = inputs["input_ids"].clamp(max=VOCAB - 2)
        inputs["input_ids"][0, -1] += (VOCAB - 1 - inputs["input_ids"][0, -1]) * (step == 2)
        before = model.expert_maturity
        with stance(step):
            loss, _ = train_step(fast, inputs)
        assert bool(loss.isnan()) == (step == 2)
        assert torch.equal(model.expert_maturity, before) == (step == 2)
    assert {stats.non_finite for stats in model.routing_stats().values()} == {1}


@pytest.mark.slow  # generation is evaluation, too
@pytest.mark.parametrize("scope", ["block", "module"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_evaluation_is_one_graph(device, backend, scope):
    plain = mixture_of("llama", router_scope=scope).to(device)
    twin = copy.deepcopy(plain)
    fast = compile_model(twin, backend)
    with torch.no_grad():
        for step, inputs in enumerate(batches(device)):
            with stance(step):
                torch.testing.assert_close(fast(**inputs).logits, plain(**inputs).logits, **CLOSE)


def whole_text():
    return mixture_of_domains(domain_window=None)


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize(
    ("build", "num_beams"),
    [
        pytest.param(lambda: mixture_of("llama", base=llama(num_hidden_layers=1)), 1, id="mixture"),
        pytest.param(lambda: mixture_of("llama"), 3, id="beams", marks=pytest.mark.slow),
        pytest.param(mixture_of_domains, 3, id="beams by domain", marks=pytest.mark.slow),
        pytest.param(whole_text, 3, id="beams by domain of the whole text", marks=pytest.mark.slow),
    ],
)
def test_generation_with_a_static_cache(device, backend, build, num_beams):
    """What `generate` compiles by itself where the cache is static."""
    plain = build().to(device)
    twin = copy.deepcopy(plain)
    twin.base_model.model.forward = torch.compile(twin.base_model.model.forward, fullgraph=True, backend=backend)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    options["num_beams"] = num_beams
    prompt = IDS[:, :5].to(device)
    assert torch.equal(twin.generate(input_ids=prompt, **options), plain.generate(input_ids=prompt, **options))


@pytest.mark.slow
def test_a_domain_told_by_the_whole_text_takes_a_graph_for_the_prompt_and_one_for_all_tokens():
    model, graphs = whole_text(), []
    compiled = torch.compile(
        model.base_model.model.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    model.base_model.model.forward = compiled
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    model.generate(input_ids=IDS[:1, :5], **options)
    assert len(graphs) == 2
