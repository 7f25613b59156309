"""Where blocks are compiled, as for CUDA graphs: one graph, traced before any adapter is loaded, serves them all.

vLLM compiles nothing on a CPU once LoRA is switched on. Here it does, with Dynamo alone; the tables route by their
readable reference in place of the kernel (tests/test_slot_router.py compares the two), and the products of LoRAs are
opaque operators, as they are on a GPU.
"""

import pytest
import torch
import vllm.envs as envs
from harness import BASE, RUNNING, for_all, prompts
from torch import Tensor
from torch._dynamo.utils import counters
from vllm.config import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform

from moelora.ops.slot_tables import SlotTables, route_slots_reference
from moelora.serving.vllm import manager as managers
from moelora.serving.vllm.tables import BlockTables
from moelora.serving.vllm.wrapper import ProductsBySlot, weighed

SERVED = ["plain", "sparse", "dense", "two_layers", "of_every_age", "capacity", "set_weights", "grown", "few_layers"]
SERVED += ["rank_pattern", "alpha_pattern", "rslora", "expert_by_expert", "imported", "built_uniform", "continual"]
REFUSED = {
    "per_model": 'router_scope="model" is not routed in CUDA graphs',
    "per_module": 'router_scope="module" is not routed in CUDA graphs',
    "built_arrow": 'router_scope="module" is not routed in CUDA graphs',
    "domains": "its domain classifier does not run in CUDA graphs",
    "sigmoid": 'router_type="sigmoid", or its biases, have no kernel',
    "loss_free": "or its biases, have no kernel",
}

library = torch.library.Library("moelora_test", "DEF")
library.define("linear(Tensor(a!) y, Tensor x, Tensor? gate, Tensor[] a, Tensor[] b, int[] sizes) -> ()")
in_use: list["OpaqueProducts"] = []


def _linear(y, x, gate, a, b, sizes):
    wrapper = in_use[-1]
    gates = {} if gate is None else {slot: gate[rows, : wrapper.ranks[slot]] for slot, rows in wrapper.groups}
    wrapper.gates, traced = gates, wrapper.gates
    ProductsBySlot.add_lora_linear(wrapper, y, x, a, b, 1.0, tuple(sizes))
    wrapper.gates = traced


library.impl("linear", _linear, "CPU")
torch.library.register_fake("moelora_test::linear", lambda *arguments: None, lib=library)


class OpaqueProducts:
    """Mixed into the CPU's wrapper: what is between two products of LoRAs is traced, they are not."""

    def add_lora_linear(self, y, x, a, b, scale, sizes, **options):
        torch.ops.moelora_test.linear(y, x, self.gate, list(a), list(b), list(sizes))


def opaque(wrapper):
    made = weighed(wrapper)
    own = object.__new__(type("Opaque", (OpaqueProducts, type(made)), {}))
    own.__dict__ = made.__dict__
    in_use.append(own)
    return own


def tables_on_a_cpu(cls, num_blocks, wrapper, config):
    rank, hidden = config.lora_config.max_lora_rank, config.model_config.get_hidden_size()
    return cls(SlotTables.empty(num_blocks, config.lora_config.max_loras, rank, hidden, rank), wrapper)


def route(self, hidden: Tensor, residual: Tensor | None, gate: Tensor, block: int) -> None:
    slots = torch.full((hidden.shape[0],), -1)
    known = self.wrapper.token_lora_indices[: hidden.shape[0]]
    slots[: known.shape[0]] = known
    route_slots_reference(hidden, self.tables, block, slots, gate, residual)


@pytest.fixture(scope="module")
def compiled(llama):
    configure = CpuPlatform.check_and_update_config.__func__

    def with_compilation(cls, config):
        lora, config.lora_config = config.lora_config, None
        try:
            configure(cls, config)
        finally:
            config.lora_config = lora

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo, and no inductor behind it
        patch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # an earlier run's graph says nothing of this code
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_compilation))
        patch.setattr(BlockTables, "make", classmethod(tables_on_a_cpu))
        patch.setattr(BlockTables, "route", route)
        patch.setattr(managers, "weighed", opaque)
        envs.disable_envs_cache()  # which the first engine of a process fills for good
        counters.clear()
        yield llama.engine(enforce_eager=False)
        RUNNING.end()
    envs.disable_envs_cache()


def runner_of(engine):
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner


def test_one_graph_serves_what_is_loaded_later(llama, compiled):
    base = for_all([BASE], prompts())
    llama.assert_same(base, llama.ask(compiled, base))
    assert runner_of(compiled).model.model.compiled
    traced = dict(counters["stats"])  # not the frames: vLLM's other compiled functions count there, the model does not
    assert traced["unique_graphs"] > 0
    requests = for_all([BASE, *SERVED], prompts())
    for _ in range(2):  # slots are filled anew: there are fewer than adapters
        llama.assert_same(requests, llama.ask(compiled, requests))
    assert counters["stats"] == traced
    assert not counters["graph_break"]


def test_compiled_code_is_kept_for_this_plug_in_alone(compiled):
    manager = runner_of(compiled).lora_manager._adapter_manager
    config = compiled.llm_engine.vllm_config
    before = config.compute_hash()
    assert config.additional_config["moelora"] == manager.routing.traced_as
    config.additional_config["moelora"] = "another version"
    try:
        assert config.compute_hash() != before
    finally:
        config.additional_config["moelora"] = manager.routing.traced_as


@pytest.mark.parametrize("name", REFUSED)
def test_what_python_has_to_decide_is_refused(llama, compiled, name):
    assert compiled.llm_engine.vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    with pytest.raises(ValueError, match=rf"cannot serve '{name}': .*{REFUSED[name]}; start vLLM with --enforce-eager"):
        compiled.llm_engine.add_lora(llama.lora(name))
