"""PEFT's hot-swapping: a mixture's weights are put in the place of another's of the same shape."""

import pytest
import torch
from helpers import LLAMA_TARGETS, SCOPES, VOCAB, awaken, llama, mixture_of, routers_of
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

IDS = torch.arange(14).view(2, 7) % VOCAB


ONE_BLOCK = {"base": lambda: llama(num_hidden_layers=1), "target_modules": ["q_proj", "v_proj", "down_proj"]}
"""Enough to trace: what is traced takes seconds a block, and eagerly all linears of both blocks are swapped."""


def adapted(kind, seed, base=llama, target_modules=LLAMA_TARGETS, **options):
    if kind == "lora":
        model = get_peft_model(base(), LoraConfig(r=2, target_modules=target_modules))
    else:
        model = mixture_of("llama", base=base(), router_scope=kind, target_modules=target_modules, **options)
    awaken(model, seed)
    return model.eval()


def another(kind, folder, **options):
    """A saved mixture of other weights, maturity and counters; and its logits."""
    model = adapted(kind, 7, **options)
    for router in routers_of(model).values() if kind != "lora" else ():
        router["default"].maturity.fill_(0.5)
        router["default"].tokens_per_expert.fill_(3)
    model.save_pretrained(folder)
    return model(IDS).logits


@torch.no_grad()
def assert_swapped(run, model, folder, expected, between=lambda: None):
    """The outputs, and what is learned besides weights, become another's; `run` is the model, or it compiled."""
    before = [run(IDS).logits for _ in range(2)][-1]  # the first one makes the counters
    between()
    hotswap_adapter(run, str(folder), adapter_name="default", torch_device="cpu")
    after = run(IDS).logits
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-2)
    if hasattr(model, "expert_maturity"):
        assert model.expert_maturity.tolist() == [0.5] * 4


@pytest.mark.parametrize("kind", ["lora", *SCOPES])
def test_a_mixture_is_swapped(tmp_path, kind):
    expected, model = another(kind, tmp_path), adapted(kind, 2)
    assert_swapped(model, model, tmp_path, expected)


@pytest.mark.parametrize("kind", SCOPES)
def test_nothing_of_the_answers_before_is_kept(tmp_path, kind):
    expected, model = another(kind, tmp_path), adapted(kind, 2)
    assert_swapped(model, model, tmp_path, expected, between=lambda: model.generate(input_ids=IDS, max_new_tokens=2))


@pytest.mark.parametrize(
    ("kind", "is_prepared"),
    [*((kind, False) for kind in ("lora", *SCOPES)), ("lora", True), ("block", True)],  # routers are not prepared
)
def test_a_compiled_mixture_is_swapped_in_the_same_graphs(tmp_path, kind, is_prepared):
    torch.compiler.reset()  # or torch runs what it has compiled too often eagerly
    expected, model = another(kind, tmp_path, **ONE_BLOCK), adapted(kind, 2, **ONE_BLOCK)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model)
    graphs, before = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend, dynamic=False)
    assert_swapped(run, model, tmp_path, expected, between=lambda: before.extend(graphs))
    assert graphs == before != [], "it was compiled anew, or not at all"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_experts": 3}, "num_experts"),
        ({"r": 5}, "r"),
        ({"router_temperature": 1.0}, "router_temperature"),
        ({"router_type": "fixed"}, "router_type"),
        ({"router_hidden_size": 3}, "router_hidden_size"),
        ({"lora_alpha": 1}, "lora_alpha"),
    ],
)
def test_a_mixture_of_another_shape_is_refused(tmp_path, options, field):
    another("block", tmp_path, **options)
    model = adapted("block", 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"Configs are incompatible: for {field}, "):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_factors_that_were_padded_are_refused():
    model = adapted("block", 2)
    prepare_model_for_compiled_hotswap(model, target_rank=64)
    with pytest.raises(ValueError, match=r"64 ranks in place of \d+.*without `target_rank`"):
        model(IDS)
