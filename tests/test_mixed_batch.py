"""`adapter_names=`: each sample of a batch has an adapter of its own, a whole mixture, or none."""

import pytest
import torch
from helpers import ARCHITECTURES, CAUSAL, ENCODER_DECODER, IN_SCOPES, RandomRouter, awaken, mixture_of, routers_of
from peft import LoraConfig, get_peft_model

from moelora import MoELoraConfig

NAMES = ["mail", "__base__", "code", "mail"]
OTHER = {"num_experts": 3, "top_k_experts": 1, "router_temperature": 1.0, "routing_scale": 2.0, "r": 3}


@pytest.fixture
def two_mixtures(tmp_path):
    """A function that makes a model with "mail" active and "code", whose configuration is another, loaded beside it."""

    def make(name, scope="block", mail=None, code=None, **both):
        for adapter, options, seed in (("mail", mail or {}, 2), ("code", OTHER | (code or {}), 3)):
            model = mixture_of(name, router_scope=scope, **(both | options))
            awaken(model, seed)
            model.save_pretrained(tmp_path / adapter)
        model = mixture_of(name, router_scope=scope, **(both | (mail or {})))
        for adapter in ("mail", "code"):
            model.load_adapter(tmp_path / adapter, adapter)
        model.delete_adapter("default")
        model.set_adapter("mail")
        return model.eval()

    return make


def of_each_alone(model, inputs, run):
    """What run makes of each sample by itself, under its own adapter."""
    rows = []
    for row, name in enumerate(NAMES):
        sample = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, sample))
        else:
            model.set_adapter(name)
            rows.append(run(model, sample))
    model.set_adapter("mail")
    return torch.cat(rows)


def logits(model, inputs, **options):
    return model(**inputs, **options).logits


@torch.no_grad()
@pytest.mark.parametrize(("name", "scope"), IN_SCOPES)
def test_each_sample_is_its_own_adapters(two_mixtures, name, scope):
    model = two_mixtures(name, scope)
    inputs = ARCHITECTURES[name].batch(batch=4, labels=False)
    expected = of_each_alone(model, inputs, logits)
    torch.testing.assert_close(logits(model, inputs, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mail", "code"),
    [
        ({"router_type": "fixed"}, {"router_type": "learned"}),
        ({"router_type": "sigmoid", "load_balance_loss_type": "loss_free"}, {"router_hidden_size": 5}),
        ({"router_type": "learned_with_maturity"}, {"target_modules": ["q_proj", "up_proj"]}),
    ],
    ids=["fixed", "sigmoid", "other-targets"],
)
def test_adapters_of_one_batch_may_be_configured_otherwise(two_mixtures, mail, code):
    model = two_mixtures("llama", mail=mail, code=code)
    inputs = ARCHITECTURES["llama"].batch(batch=4, labels=False)
    expected = of_each_alone(model, inputs, logits)
    torch.testing.assert_close(logits(model, inputs, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODER])
def test_generate(two_mixtures, name, beams):
    model = two_mixtures(name)
    inputs = ARCHITECTURES[name].batch(batch=4, labels=False)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    expected = of_each_alone(model, inputs, lambda model, sample: model.generate(**sample, **options))
    assert torch.equal(model.generate(**inputs, **options, adapter_names=NAMES), expected)


@torch.no_grad()
def test_modules_to_save_follow_the_sample(two_mixtures):
    model = two_mixtures("bert", modules_to_save=["decoder"])
    for number, adapter in enumerate(("mail", "code")):
        head = dict(model.named_modules())["base_model.model.cls.predictions.decoder"].modules_to_save[adapter]
        head.weight += number + 1
    inputs = ARCHITECTURES["bert"].batch(batch=4, labels=False)
    expected = of_each_alone(model, inputs, logits)
    torch.testing.assert_close(logits(model, inputs, adapter_names=NAMES), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_changed_by_it(two_mixtures):
    model = two_mixtures("llama")
    inputs = ARCHITECTURES["llama"].batch(batch=4, labels=False)
    model.train()
    model(**inputs | {"labels": inputs["input_ids"]}).loss.backward()
    model.eval()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    stats = {name: vars(stat) for name, stat in model.routing_stats().items()}
    model(**inputs, adapter_names=NAMES)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert model.active_adapters == ["mail"] and all(r.active_adapters == ["mail"] for r in routers_of(model).values())
    after = {name: vars(stat) for name, stat in model.routing_stats().items()}
    assert stats and str(after) == str(stats)


def test_gradients_come_to_the_adapters_of_the_samples(two_mixtures):
    model = two_mixtures("llama")
    inputs = ARCHITECTURES["llama"].batch(batch=4, labels=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    logits(model, inputs, adapter_names=NAMES).square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_adapter("code")
    logits(model, {"input_ids": inputs["input_ids"][2:3]}).square().sum().backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".code." in name}
    assert any("lora_router" in name for name in alone)
    for name, grad in alone.items():
        torch.testing.assert_close(together[name], grad, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_refused(two_mixtures):
    model = two_mixtures("llama")
    inputs = ARCHITECTURES["llama"].batch(batch=4, labels=False)
    with pytest.raises(ValueError, match=r"Length of `adapter_names` .* got 3 and 4 resp"):
        model(**inputs, adapter_names=["mail", "code", "mail"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names` .* got 3 and 4 resp"):  # which no router sees
        model(**inputs, adapter_names=["__base__"] * 3)
    with pytest.raises(ValueError, match=r"non-existing adapter.*: lost"):
        model(**inputs, adapter_names=["mail", "code", "mail", "lost"])
    with pytest.raises(ValueError, match=r"`adapter_names`.*`routing_weights` would"):
        model(**inputs, adapter_names=NAMES, routing_weights=torch.ones(4, 4))
    model.attach_router(RandomRouter())
    with pytest.raises(ValueError, match="an attached router would"):
        model(**inputs, adapter_names=NAMES)
    model.detach_router()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=NAMES)
    assert model.active_adapters == ["mail"]
    assert logits(model.eval(), inputs).shape[0] == 4


def test_merged_experts_are_refused(two_mixtures):
    model = two_mixtures("llama", router_type="fixed")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"`adapter_names`.*unmerge_adapter"):
        model(**ARCHITECTURES["llama"].batch(batch=4, labels=False), adapter_names=NAMES)


@torch.no_grad()
@pytest.mark.parametrize("kind", [LoraConfig, MoELoraConfig])
def test_where_all_are_the_base_models(kind):
    base = ARCHITECTURES["llama"].build().eval()
    inputs = ARCHITECTURES["llama"].batch(batch=3, labels=False)
    expected = base(**inputs).logits
    model = get_peft_model(base, kind(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert torch.equal(model(**inputs, adapter_names=["__base__"] * 3).logits, expected)
