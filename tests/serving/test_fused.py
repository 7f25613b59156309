"""The wrapper for GPUs, with torch in place of the kernels: what it hands them, and what it leaves to vLLM's."""

from types import SimpleNamespace

import pytest
import torch

from moelora.ops.slot_lora import TokensBySlot, add_slot_lora_reference
from moelora.ops.triton import slot_lora
from moelora.serving.vllm import operators, wrapper
from moelora.serving.vllm.wrapper import FusedProducts, Weighed, weighed

SLOT_T = torch.tensor([1, -1, 0, 1, 1])
OUTS = (6, 3)


class OnGPU:
    """As vLLM's, in torch."""

    def __init__(self):
        self.device = torch.device("cuda")
        order = TokensBySlot.of(SLOT_T, 2)
        self.token_mapping_meta = SimpleNamespace(
            active_lora_ids=order.slots,
            num_tokens_per_lora=order.counts,
            lora_token_start_loc=order.starts,
            token_indices_sorted_by_lora_ids=order.tokens,
            no_lora_flag_cpu=torch.tensor([False]),
        )

    def add_lora_linear(self, y, x, a, b, scale, sizes):
        shrunk = torch.stack([torch.einsum("td,trd->tr", x, part[SLOT_T, 0]) for part in a])
        self.add_expand(y, shrunk, b, sizes)

    def add_expand(self, y, x, b, sizes):
        for part, shrunk, factor in zip(y.split(sizes, dim=1), x, b, strict=True):
            part += torch.einsum("tr,tor->to", shrunk, factor[SLOT_T, 0]) * (SLOT_T >= 0)[:, None]


@pytest.fixture
def fused():
    made = weighed(OnGPU())
    made.run_now()
    return made


@pytest.fixture
def kernels(monkeypatch):
    """The reference in place of the kernels; a list of the tokens' orders that they were called with."""
    orders = []

    def add(y, x, a, b, order, gate=None):
        orders.append(order)
        add_slot_lora_reference(y, x, a, b, SLOT_T, gate)

    monkeypatch.setattr(wrapper, "kernels_for", lambda tensor: True)
    monkeypatch.setattr(slot_lora, "takes", lambda y, x, a, b: True)
    monkeypatch.setattr(slot_lora, "add_slot_lora", add)
    return orders


def linear(dtype=torch.float32):
    """y, x, A and B."""
    a = tuple(torch.randn(2, 1, 4, 8, dtype=dtype) for _ in OUTS)
    b = tuple(torch.randn(2, 1, out, 4, dtype=dtype) for out in OUTS)
    return torch.randn(5, sum(OUTS), dtype=dtype), torch.randn(5, 8, dtype=dtype), a, b


def assert_added(made, gate, run=None):
    y, x, a, b = linear()
    expected = y.clone()
    add_slot_lora_reference(expected, x, a, b, SLOT_T, gate)
    (run or made.add_lora_linear)(y, x, a, b, 1.0, OUTS)
    torch.testing.assert_close(y, expected)


def test_is_the_wrapper_of_a_gpu(fused, monkeypatch):
    assert isinstance(fused, FusedProducts)
    monkeypatch.setattr(wrapper, "FUSED", False)
    assert type(weighed(OnGPU())).__mro__[1] is Weighed


def test_is_not_where_results_must_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert not isinstance(weighed(OnGPU()), FusedProducts)


@pytest.mark.parametrize("shape", [None, (5, 4)], ids=str)
def test_the_kernels_get_the_gate_and_vllms_order(fused, kernels, shape):
    fused.gate = None if shape is None else torch.rand(shape)
    assert_added(fused, fused.gate)
    meta = fused.token_mapping_meta
    assert kernels[0].slots is meta.active_lora_ids and kernels[0].counts is meta.num_tokens_per_lora
    assert kernels[0].starts is meta.lora_token_start_loc
    assert kernels[0].tokens is meta.token_indices_sorted_by_lora_ids


@pytest.mark.parametrize("taken", [True, False])
def test_gates_of_linears(fused, kernels, taken, monkeypatch):
    monkeypatch.setattr(slot_lora, "takes", lambda *tensors: taken)
    gates, fused.gate = torch.rand(2, 5, 4), torch.rand(5, 4)
    y, x, a, b = linear()
    expected = y.clone()
    add_slot_lora_reference(expected, x, a, b, SLOT_T, gates)
    fused.gates_of_linear = lambda given, x: list(gates) if given is a else None
    of_block = fused.gate
    fused.add_lora_linear(y, x, a, b, 1.0, OUTS)
    torch.testing.assert_close(y, expected)
    assert len(kernels) == taken and fused.gate is of_block


def test_what_the_kernels_do_not_take_is_vllms(fused, kernels, monkeypatch):
    """In float32, for one."""
    monkeypatch.undo()
    fused.gate = torch.rand(5, 4)
    assert_added(fused, fused.gate)
    assert kernels == []


def test_a_part_that_no_routing_serves_is_vllms(kernels):
    assert_added(weighed(OnGPU()), None)
    assert kernels == []


def test_a_batch_without_a_lora_costs_nothing(fused, kernels):
    fused.token_mapping_meta.no_lora_flag_cpu[0] = True
    y, x, a, b = linear()
    before = y.clone()
    fused.add_lora_linear(y, x, a, b, 1.0, OUTS)
    assert torch.equal(y, before) and kernels == []


def test_compiled_code_calls_an_operator(fused, kernels):
    class Engine:
        def add_products(self, *args):
            fused.add_products_now(*args)

    engine = Engine()
    fused.trace_as(operators.number(engine))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(y, x, a, b, gate):
        fused.gate = gate
        doubled = y * 2
        fused.add_lora_linear(doubled, x, a, b, 1.0, OUTS)
        fused.gate = None
        return doubled + 1

    y, x, a, b = linear()
    gate = torch.rand(5, 4)
    expected = y * 2
    add_slot_lora_reference(expected, x, a, b, SLOT_T, gate)
    torch.testing.assert_close(run(y, x, a, b, gate), expected + 1)
    assert len(kernels) == 1
