"""New experts that begin as copies of old ones."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LLAMA_TARGETS, awaken, mixture_of, train_step
from loras import KINDS, save_lora
from test_domain_classifier import LOW, texts
from test_grow import state_of

from moelora.experts import build, grow, nearest_adapter, take_apart
from moelora.experts.warm_start import NEW

DENSE = {"router_type": "learned", "top_k_experts": 4}
IDS = texts((2, 60), rows=3)["input_ids"]


@torch.no_grad()
def logits(model, name):
    model.set_adapter([name])
    return model.eval()(input_ids=IDS).logits


def product(adapter, linear):
    """The mean of the experts' deltas: what even routing makes of them."""
    key = f"base_model.model.{linear}"
    scale = adapter.config.lora_alpha / len(adapter.experts[0][f"{key}.lora_A.weight"])
    products = [scale * e[f"{key}.lora_B.weight"] @ e[f"{key}.lora_A.weight"] for e in adapter.experts]
    return torch.stack(products).mean(0)


def parts_of(model):
    return {adapter.name: adapter for adapter in take_apart(model)}


@pytest.mark.parametrize("hidden", [None, 5])
def test_as_many_experts_start_as_what_they_are_copied_from(hidden):
    model = mixture_of("llama", router_hidden_size=hidden, **DENSE)
    before = state_of(model, "default")
    name = grow(model, 4, start_from="default")
    assert all(torch.equal(value, before[key]) for key, value in state_of(model, "default").items())
    for key, value in state_of(model, name).items():
        if "maturity" not in key and "tokens_per_expert" not in key:
            assert torch.equal(value, before[key.replace(name, "default")]), key
    assert torch.equal(logits(model, name), logits(model, "default"))


def test_a_higher_rank_is_filled_up_and_learns():
    model = mixture_of("llama", **DENSE)
    name = grow(model, 4, r=5, lora_alpha=20, start_from="default")  # the same scaling: 8 / 2 and 20 / 5
    torch.testing.assert_close(logits(model, name), logits(model, "default"), rtol=1e-5, atol=1e-5)
    model.set_adapter([name])
    _, grads = train_step(model, {"input_ids": IDS, "labels": IDS})
    fresh = [grad for key, grad in grads.items() if "lora_B" in key and name in key.split(".")]
    assert fresh and all(grad[:, 2:5].abs().max() > 0 for grad in fresh)  # the ranks that are new


def test_a_lower_rank_keeps_the_largest_directions():
    model = mixture_of("llama", **DENSE)
    name = grow(model, 4, r=1, lora_alpha=7, start_from="default")
    old, new = (parts_of(model)[each] for each in ("default", name))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    for one, other in zip(old.experts, new.experts, strict=True):
        exact = 4.0 * one[f"{key}.lora_B.weight"] @ one[f"{key}.lora_A.weight"]
        U, S, Vh = torch.linalg.svd(exact)
        copied = 7.0 * other[f"{key}.lora_B.weight"] @ other[f"{key}.lora_A.weight"]
        torch.testing.assert_close(copied, S[0] * U[:, :1] @ Vh[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [2, 8])
def test_under_even_routing_other_numbers_of_experts_do_the_same(experts):
    """Four of rank 2 become eight parts of them, or two that hold two each at rank 4."""
    model = mixture_of("llama", router_type="learned")
    name = grow(model, experts, r=4, lora_alpha=16, start_from="default", target_modules=LLAMA_TARGETS)
    old, new = (parts_of(model)[each] for each in ("default", name))
    for linear in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        torch.testing.assert_close(product(new, linear), product(old, linear), rtol=1e-4, atol=1e-5)


def test_the_parts_of_one_expert_are_apart_and_add_up_to_it(tmp_path):
    folder = save_lora(tmp_path, **KINDS["plain"])
    model = build(mixture_of("llama").unload(), {"a": folder}, "train")
    name = grow(model, 4, r=1, lora_alpha=1, start_from="a")
    old, new = (parts_of(model)[each] for each in ("a", name))
    for linear in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        torch.testing.assert_close(product(new, linear), product(old, linear), rtol=1e-4, atol=1e-5)
        rows = torch.cat([e[f"base_model.model.{linear}.lora_A.weight"] for e in new.experts])
        torch.testing.assert_close(F.normalize(rows) @ F.normalize(rows).t(), torch.eye(4), rtol=0, atol=1e-4)


def test_the_nearest_has_the_least_loss_and_the_base_may_be_nearer():
    model = mixture_of("llama", fresh=True)
    batches = [texts(LOW, seed=seed) for seed in range(3)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(15):
        train_step(model, batches[0] | {"labels": batches[0]["input_ids"]})
        optimizer.step()
    grow(model, 2, name="noise")
    before = state_of(model, "default")
    awaken(model)
    model.load_state_dict(before, strict=False)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    found = nearest_adapter(model, batches)
    assert found.start_from == "default" and found.losses["default"] < found.base_loss < found.losses["noise"]
    assert model.active_adapters == ["default", "noise"]
    assert trainable == {key for key, p in model.named_parameters() if p.requires_grad}
    model.delete_adapter("default")
    assert nearest_adapter(model, batches).start_from == NEW
    name = grow(model, 2, start_from="nearest", batches=batches)
    assert all(not value.any() for key, value in state_of(model, name).items() if "lora_B" in key)


def test_only_labelled_tokens_count():
    model = mixture_of("llama", **DENSE)
    batch = texts(LOW) | {"labels": texts(LOW)["input_ids"].clone()}
    batch["labels"][:, :20] = -100
    found = nearest_adapter(model, [batch])
    with torch.no_grad():
        assert found.losses["default"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no token to predict"):
        nearest_adapter(model, [batch])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start_from": "nobody"}, r"`start_from` \('nobody'\) is not known; pass one of new, nearest, default"),
        ({"start_from": "nearest"}, "needs `batches`"),
        ({"start_from": "default", "target_modules": ["q_proj"]}, r"it adapts `model\.layers\.0.*`, which the new"),
        ({"start_from": "default", "router_hidden_size": 3}, "`router_hidden_size` None, those of the new experts 3"),
    ],
)
def test_what_cannot_be_copied_is_refused_and_nothing_changed(options, expected):
    model = mixture_of("llama", **DENSE)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=expected):
        grow(model, 4, **options)
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert trainable == {key for key, p in model.named_parameters() if p.requires_grad}
