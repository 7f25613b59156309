"""A mixture that grew, brought down to a number of experts without any text."""

import pytest
import torch
from helpers import awaken, mixture_of
from peft import PeftModel
from test_domain_classifier import HIGH, LOW, mixture_of_domains, texts
from test_grow import state_of

from moelora.experts import consolidate, grow, knows_domain, learn_domain
from moelora.storage.mixture_files import read_mixture

PLAIN = {"router_type": "learned", "router_temperature": 1.0}


def experts_of(model):
    return dict(model.base_model.routing.pool)


@torch.no_grad()
def logits(model, span, names=None):
    active = list(model.active_adapters)
    if names:
        model.set_adapter(names)
    found = model.eval()(**texts(span, seed=9)).logits
    model.set_adapter(active)
    return found


def alike(model, adapter, experts):
    """Make experts of an adapter equal: factors, and rows of routers."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if adapter not in key.split("."):
                continue
            along = 1 if "lora_B" in key else 0
            if "lora_" in key and parameter.shape[along] % 4 == 0:
                pieces = parameter.chunk(4, dim=along)
                for expert in experts[1:]:
                    pieces[expert].copy_(pieces[experts[0]])


def test_equal_experts_go_first_and_nothing_is_lost():
    model = mixture_of("llama", **PLAIN, top_k_experts=3)
    alike(model, "default", (1, 3))
    model.peft_config["default"].top_k_experts = 3
    learn_domain(model, "default", [texts(LOW, rows=32)])
    grow(model, 4)
    awaken_only(model, "grown_1", 3)
    learn_domain(model, "grown_1", [texts(HIGH, rows=32)])
    before = state_of(model, "grown_1")
    found = consolidate(model, 7)
    assert [(merge.adapters, merge.experts) for merge in found.merges] == [(("default",), (1, 3))]
    assert found.merges[0].loss < 1e-6
    assert experts_of(found.model) == {"default": 3, "grown_1": 4}
    for key, value in state_of(found.model, "grown_1").items():
        if "gate_" not in key:
            assert torch.equal(value, before[key]), key


def awaken_only(model, name, seed=2):
    kept = {key: value.clone() for key, value in model.state_dict().items() if name not in key.split(".")}
    awaken(model, seed)
    model.load_state_dict(kept, strict=False)


def test_merging_equal_experts_leaves_the_outputs_of_dense_routing_near():
    """Two of four are equal: the mixture of three weighs them anew, and their sizes make up for it."""
    model = mixture_of("llama", **PLAIN, top_k_experts=4)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_router" in key:
                parameter.mul_(0.05)  # nearly even weights
    alike(model, "default", (0, 1, 2, 3))
    learn_domain(model, "default", [texts(LOW, rows=32)])
    grow(model, 4)
    learn_domain(model, "grown_1", [texts(HIGH, rows=32)])
    expected = logits(model, LOW, ["default"])
    found = consolidate(model, 5)
    assert experts_of(found.model) == {"default": 1, "grown_1": 4} or experts_of(found.model)["grown_1"] == 1
    torch.testing.assert_close(logits(found.model, LOW, ["default"]), expected, rtol=1e-3, atol=1e-3)


def test_old_texts_are_told_from_each_other_still_and_saving_keeps_all(tmp_path):
    model = mixture_of_domains(rows=256, **PLAIN)
    found = consolidate(model, 2)
    assert experts_of(found.model) == {"default": 1, "grown_1": 1}
    assert len(found.merges) == 5 and all(0 <= merge.loss <= 1.5 for merge in found.merges)
    found.model.save_pretrained(tmp_path)
    for span, expert in ((LOW, 0), (HIGH, 1)):
        found.model.routing_stats(reset=True)
        logits(found.model, span)
        for stats in found.model.routing_stats(reset=True).values():
            assert stats.mean_probability[expert] > 0.75
    assert [(each.name, each.num_experts) for each in read_mixture(tmp_path)] == [("default", 1), ("grown_1", 1)]
    loaded = PeftModel.from_pretrained(mixture_of("llama").unload(), tmp_path)
    torch.testing.assert_close(logits(loaded, LOW), logits(found.model, LOW))


def test_the_loss_that_is_told_is_the_loss_that_is(tmp_path):
    """Under constant weights: the merge changes exactly that share of the products."""
    model = mixture_of("llama", router_type="learned_with_maturity")  # new: dense
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_router" in key:
                parameter.zero_()
    learn_domain(model, "default", [texts(LOW, rows=32)])

    def deltas(model):
        pools = {m.link.name: m.expert_pool("default") for m in model.modules() if hasattr(m, "expert_pool")}
        return {k: (p.scaling * p.lora_B @ p.lora_A / p.num_experts).detach().clone() for k, p in pools.items()}

    before = deltas(model)
    found = consolidate(model, 3)
    after = deltas(found.model)
    lost = sum(float((after[name] - delta).square().sum()) for name, delta in before.items())
    whole = sum(float(delta.square().sum()) for delta in before.values())
    assert found.merges[0].loss == pytest.approx(lost / whole, rel=1e-2)


def test_adapters_that_are_one_expert_each_become_one_domain():
    model = mixture_of_domains(**PLAIN)
    found = consolidate(model, 1)
    assert len(experts_of(found.model)) == 1 and len(found.merges[-1].adapters) == 2
    assert "become one, of" in str(found.merges[-1])
    assert knows_domain(found.model, found.merges[-1].adapters[0])


def test_what_is_kept_stays_and_enough_is_enough():
    model = mixture_of_domains(**PLAIN)
    assert consolidate(model, 7).model is model
    found = consolidate(model, 5, keep=["grown_1"])
    assert experts_of(found.model)["grown_1"] == 3 and experts_of(found.model)["default"] == 2


@pytest.mark.parametrize(
    ("max_experts", "options", "expected"),
    [
        (3, {"keep": ["grown_1"]}, r"`max_experts` \(3\) is too few: 4 are left"),
        (0, {}, r"`max_experts` \(0\) is too few: 1 are left"),
        (5, {"keep": ["nobody"]}, r"`keep` \('nobody'\) is no active adapter"),
    ],
)
def test_what_cannot_be_is_refused(max_experts, options, expected):
    model = mixture_of_domains(**PLAIN)
    with pytest.raises(ValueError, match=expected):
        consolidate(model, max_experts, **options)
    assert experts_of(model) == {"default": 4, "grown_1": 3}


def test_domain_statistics_are_asked_for():
    with pytest.raises(ValueError, match="adapter 'default' has no domain statistics"):
        consolidate(mixture_of("llama", **PLAIN), 2)
