"""Each architecture that may be served: its base, a plain LoRA and mixtures in one batch, prompts read in parts.

Windows of attention are shorter here than prompts, and shorter than the texts that the domain classifier looks back on.
"""

import pytest
from bases import ARCHITECTURES
from harness import BASE, Bench, assert_greedy, for_all, prompts

ADAPTERS = ["plain", "sparse", "all_linear", "domains"]
WITH_NATIVE_EXPERTS = ["mixtral", "qwen3_moe"]  # which "all-linear" reaches there


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp(request.param), request.param)
    return bench, bench.engine(max_num_batched_tokens=64)


@pytest.mark.parametrize("adapters", [[BASE, "plain"], [BASE, *ADAPTERS]], ids=["plain", "mixtures"])
def test_is_served_as_transformers_runs_it(served, adapters):
    bench, engine = served
    if bench.architecture in WITH_NATIVE_EXPERTS:
        adapters = [name for name in adapters if name != "all_linear"]
    for name in adapters[1:]:
        engine.llm_engine.add_lora(bench.lora(name))
    requests = for_all(adapters, prompts((3, 40, 77, 131)))
    outputs = bench.ask(engine, requests)
    bench.assert_same(requests, outputs)
    assert_greedy(bench, requests, outputs)


@pytest.mark.parametrize("served", WITH_NATIVE_EXPERTS, indirect=True)
def test_adapted_native_experts_are_refused_by_name(served):
    bench, engine = served
    with pytest.raises(Exception, match="adapts the base's native experts"):
        engine.llm_engine.add_lora(bench.lora("all_linear"))
