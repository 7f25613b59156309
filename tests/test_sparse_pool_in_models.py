"""Whole models that compute the chosen experts alone, beside those that compute every expert, and who may do so.

tests/test_sparse_pool.py has the products themselves.
"""

import pytest
import torch
from helpers import ARCHITECTURES, assert_same_grads, mixture_of, train_step

from moelora.ops import mixture_sparse, operands_of


@pytest.fixture
def chosen(monkeypatch):
    """A function that makes models choose the sparse form always or never, and the calls of it."""
    calls, original = [], mixture_sparse
    monkeypatch.setattr(
        "moelora.forward.shared_input.mixture_sparse", lambda *args: calls.append(args) or original(*args)
    )

    def choose(answer):
        calls.clear()
        monkeypatch.setattr("moelora.forward.block_routing.chooses_sparse", lambda *_, **__: answer)
        return calls

    return choose


def both_forms(choose, name="llama", checkpointing=None, device="cpu", dtype=torch.float32, **options):
    results = []
    for is_sparse in (True, False):
        calls = choose(is_sparse)
        model = mixture_of(name, **({"num_experts": 12} | options)).to(device, dtype)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        torch.manual_seed(7)
        inputs = {key: value.to(device) for key, value in ARCHITECTURES[name].batch(3, 9).items()}
        loss, gradients = train_step(model, inputs)
        results.append((loss, gradients, model.base_model.routing_stats()))
        assert bool(calls) == is_sparse
    return results


def assert_alike(result, expected_result):
    (loss, gradients, stats), (expected_loss, expected, expected_stats) = result, expected_result
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert any("router" in name and gradient.any() for name, gradient in expected.items())
    assert_same_grads(gradients, expected, rtol=1e-4, atol=1e-5)
    for name, expected_of_router in expected_stats.items():
        for key, value in vars(expected_of_router).items():
            assert getattr(stats[name], key) == pytest.approx(value, rel=1e-5, abs=1e-6), key


MODELS = {
    "learned": {},
    "sigmoid": {"router_type": "sigmoid"},
    "loss-free": {"load_balance_loss_type": "loss_free"},
    "capacity": {"expert_capacity_factor": 0.5},
    "expert-dropout": {"expert_dropout": 0.3},
    "lora-dropout": {"lora_dropout": 0.3},
    "model-scope": {"router_scope": "model"},
    "expert-by-expert": {"experts": True},
    "checkpointing": {"checkpointing": "non-reentrant"},
    "reentrant": {"checkpointing": "reentrant"},
    "bart": {"name": "bart"},
}


@pytest.mark.parametrize("options", MODELS)
def test_a_model_trains_alike_in_both_forms(chosen, options):
    """In float64: a choice between experts, and gradients, are then the same whatever the order of sums."""
    assert_alike(*both_forms(chosen, dtype=torch.float64, **MODELS[options]))


def test_a_model_trains_alike_in_both_forms_with_kernels(chosen, kernel_device):
    assert_alike(*both_forms(chosen, device=kernel_device, expert_capacity_factor=0.5))


@pytest.mark.parametrize(
    "options", [{"router_type": "learned_with_maturity"}, {"router_type": "fixed"}, {"router_scope": "module"}], ids=str
)
def test_who_may_weigh_all_experts_is_computed_whole(chosen, options):
    calls = chosen(True)
    model = mixture_of("llama", num_experts=12, **options).train()
    model(**ARCHITECTURES["llama"].batch(3, 9)).loss.backward()
    assert not calls


def test_weights_of_the_user_are_computed_whole(chosen):
    calls = chosen(True)
    model = mixture_of("llama", num_experts=12)
    inputs = ARCHITECTURES["llama"].batch(3, 9)
    expected = model(**inputs, routing_weights=torch.ones(3, 12) / 12).logits
    assert not calls
    model(**inputs)
    assert calls and not torch.equal(model(**inputs).logits, expected)


def test_linears_of_a_block_share_their_pairs(chosen):
    calls = chosen(True)
    model = mixture_of("llama", num_experts=12).train()
    model(**ARCHITECTURES["llama"].batch(3, 9)).loss.backward()
    assert len({id(pairs) for _, _, pairs in calls}) == model.config.num_hidden_layers
    assert sum(group.num_readers for _, group, _ in calls) == 7 * model.config.num_hidden_layers


@pytest.mark.parametrize("is_sparse", [False, True])
def test_no_factor_is_cast_beside_the_products(chosen, is_sparse, monkeypatch):
    calls, cast, original = chosen(is_sparse), [], operands_of
    monkeypatch.setattr("moelora.forward.shared_input.operands_of", lambda stacks: cast.append(1) or original(stacks))
    model = mixture_of("llama", num_experts=12).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**ARCHITECTURES["llama"].batch(3, 9)).loss.backward()
    assert bool(calls) == is_sparse and bool(cast) != is_sparse


def test_generate_reads_prompts_in_it(chosen):
    ids, answers = ARCHITECTURES["llama"].batch(3, 9)["input_ids"], []
    for is_sparse in (True, False):
        calls = chosen(is_sparse)
        model = mixture_of("llama", num_experts=12).eval()
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answers.append(torch.stack(model.generate(input_ids=ids, **options).logits))
        assert bool(calls) == is_sparse
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)  # float32, sums in another order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_in_it_never_synchronises_with_the_host(chosen):
    calls = chosen(True)
    model = mixture_of("llama", num_experts=40).cuda().train()
    inputs = {name: value.cuda() for name, value in ARCHITECTURES["llama"].batch(3, 9).items()}
    model(**inputs).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls
