"""Each architecture that may be served: its base, a plain LoRA and mixtures in one batch, prompts read in parts.

Windows of attention are shorter here than prompts, and shorter than the texts that the domain classifier looks back on.
"""

import pytest
from bases import ARCHITECTURES
from harness import BASE, Bench, assert_greedy, for_all, prompts

ADAPTERS = ["plain", "sparse", "all_linear", "domains"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp(request.param), request.param)
    return bench, bench.engine(max_num_batched_tokens=64)


@pytest.mark.parametrize("adapters", [[BASE, "plain"], [BASE, *ADAPTERS]], ids=["plain", "mixtures"])
def test_is_served_as_transformers_runs_it(served, adapters):
    bench, engine = served
    for name in adapters[1:]:
        engine.llm_engine.add_lora(bench.lora(name))
    requests = for_all(adapters, prompts((3, 40, 77, 131)))
    outputs = bench.ask(engine, requests)
    bench.assert_same(requests, outputs)
    assert_greedy(bench, requests, outputs)
