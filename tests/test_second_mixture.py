"""A second whole mixture in a model: it stands aside until it is chosen, as a second LoRA does; experts join."""

import copy

import pytest
import torch
from accelerate.state import GradientState
from helpers import ARCHITECTURES, awaken, config_for, grads_of, llama, mixture_of, routers_of, train_step
from peft import LoraConfig, PeftModel, get_peft_model

from moelora.experts import grow

LLAMA = ARCHITECTURES["llama"]
BATCH = LLAMA.batch(3, 7)
INPUTS = {name: tensor for name, tensor in BATCH.items() if name != "labels"}


def config(**options):
    return config_for(LLAMA, **options)


def logits(model):
    training = model.training
    with torch.no_grad():
        found = model.eval()(**INPUTS).logits
    model.train(training)
    return found


def trained_adapters(model):
    """Names of the adapters of all parameters that would learn."""
    return {
        adapter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for adapter in model.peft_config
        if adapter in name.split(".")
    }


# ---- PEFT's meaning --------------------------------------------------------------------------------------------------


def steps(model, own, folder):
    """What a user does with several adapters, step by step."""
    yield
    model.add_adapter("python", own())
    yield
    model.set_adapter("python")
    yield
    model.set_adapter("default")
    yield
    with model.disable_adapter():
        pass
    yield
    model.save_pretrained(folder, selected_adapters=["python"])
    model.load_adapter(folder / "python", "frozen")
    yield
    model.load_adapter(folder / "python", "learning", is_trainable=True)
    yield
    model.set_adapter("frozen", inference_mode=True)
    yield
    model.set_adapter("default")
    model.delete_adapter("python")
    yield


def test_adapters_are_as_active_and_as_trainable_as_loras(tmp_path):
    seen = {}
    for kind, own in (("mixture", config), ("LoRA", lambda: LoraConfig(r=2, target_modules=LLAMA.targets))):
        model = get_peft_model(llama(), own())
        seen[kind] = [
            (model.active_adapter, model.active_adapters, list(model.peft_config), trained_adapters(model))
            for _ in steps(model, own, tmp_path / kind)
        ]
    assert seen["mixture"] == seen["LoRA"]


@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "fixed"])
def test_a_mixture_that_stands_aside_changes_nothing(router_type):
    model = mixture_of("llama", router_type=router_type)
    train_step(model, BATCH)
    before = logits(model), model.routing_stats(), grads_of(model)
    frozen = {name for name, _ in list(model.named_parameters())[::3] if "lora_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and name not in frozen)
    model.add_adapter("python", config(router_type="sigmoid", routing_scale=4.0))  # not to be pooled with the first
    for name, parameter in model.named_parameters():
        if "python" in name.split("."):
            parameter.data.normal_()
    assert model.active_adapters == ["default"] and model.base_model.routing.num_experts == 4
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in frozen)
    assert trained_adapters(model) == {"default"}
    assert model.routing_stats() == before[1] and torch.equal(logits(model), before[0])
    _, grads = train_step(model, BATCH)
    assert grads.keys() == before[2].keys() - frozen and not any("python" in name.split(".") for name in grads)


def test_each_of_two_mixtures_is_itself_when_it_is_chosen():
    alone = {}
    for name in ("a", "b"):
        model = get_peft_model(llama(), config(), adapter_name=name)
        awaken(model, seed=ord(name))
        alone[name] = logits(model), {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    model = get_peft_model(llama(), config(), adapter_name="a")
    model.add_adapter("b", config())
    model.load_state_dict(alone["a"][1] | alone["b"][1], strict=False)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        assert model.active_adapters == [name] and trained_adapters(model) == {name}
        assert torch.equal(logits(model), alone[name][0])
    model.set_adapter(["a", "b"])
    assert model.base_model.routing.num_experts == 8 and trained_adapters(model) == {"a", "b"}
    assert not torch.equal(logits(model), alone["a"][0])
    model.add_adapter("c", config(router_temperature=7.0))
    with pytest.raises(ValueError, match="`router_temperature`"):
        model.set_adapter(["a", "c"])
    assert model.active_adapters == ["a", "b"]


def test_experts_join_whatever_they_are_called():
    model = mixture_of("llama")
    model.add_adapter("expert_4", config())
    model.add_adapter("imported", config(single_expert=True))
    model.add_adapter("aside", config())
    name = grow(model, 3, freeze_experts=False, freeze_scores=False)
    assert model.active_adapters == ["default", "expert_4", "imported", name] == [*list(model.peft_config)[:3], name]
    assert model.base_model.routing.num_experts == 4 + 1 + 1 + 3
    assert trained_adapters(model) == set(model.active_adapters)


def test_a_save_says_which_were_active(tmp_path):
    model = mixture_of("llama")
    model.add_adapter("python", config(num_experts=2))
    awaken(model)
    for active in (["default"], ["python"], ["python", "default"]):
        model.set_adapter(active)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        assert loaded.active_adapters == active and loaded.active_adapter == active[0]
        assert list(loaded.peft_config) == ["default", "python"]
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.usefixtures("alone_in_accelerate")
def test_what_was_counted_of_a_mixture_waits_while_another_is_active():
    """As a reference is, once in every step of a preference trainer: maturity waits for the step's last micro-batch."""
    options = {"router_type": "learned_with_maturity"}
    model, plain = mixture_of("llama", **options), mixture_of("llama", **options)
    model.add_adapter("ref", config(**options))
    for each in (model, plain):
        each.base_model.routing.is_dropless = True  # capacity would make the order of forwards matter
        for router in routers_of(each).values():
            router.pending = None
        for last in (False, True):
            GradientState()._set_sync_gradients(last)
            train_step(each, BATCH)
            if each is model:
                model.set_adapter("ref")
                logits(model)
                model.set_adapter("default")
    assert torch.equal(model.expert_maturity, plain.expert_maturity) and plain.expert_maturity.min() > 0
    assert model.routing_stats() == plain.routing_stats()
    model.set_adapter("ref")
    assert {stats.num_tokens for stats in model.routing_stats().values()} == {2 * 21}
    model.delete_adapter("default")
    model.add_adapter("default", config(**options))
    model.set_adapter("default")
    assert model.routing_stats() == {}, "the counts of another of that name"


# ---- TRL's reference -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
def test_a_reference_is_a_copy_and_takes_the_place_of_an_earlier_one():
    model = mixture_of("llama", router_type="learned_with_maturity")
    for value in (1.0, 0.5):
        model.set_expert_maturity("default", value)
        model.add_adapter("ref", model.peft_config["default"])
        assert model.active_adapters == ["default"] and trained_adapters(model) == {"default"}
        model.set_adapter("ref")
        assert model.expert_maturity.tolist() == [value] * 4
        model.set_adapter("default")


def test_beside_a_reference_a_text_has_the_same_log_probabilities_in_every_batch():
    model = mixture_of("llama", expert_capacity_factor=0.5).train()
    together = model(**INPUTS).logits[:1]
    assert (model(input_ids=INPUTS["input_ids"][:1]).logits - together).abs().max() > 0.1
    with pytest.warns(UserWarning, match=r"`expert_capacity_factor` \(0\.5\) is off .*those of a reference"):
        model.add_adapter("ref", model.peft_config["default"])
    for name in ("default", "ref"):
        model.set_adapter(name)
        together = model(**INPUTS).logits[:1]
        torch.testing.assert_close(model(input_ids=INPUTS["input_ids"][:1]).logits, together, rtol=1e-4, atol=1e-4)


def test_a_reference_of_several_adapters_is_refused_for_it_would_be_of_one():
    model = mixture_of("llama")
    model.add_adapter("expert_4", config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'ref'.*this mixture is default, expert_4.*`ref_model=copy\.deepcopy"):
        model.add_adapter("ref", model.peft_config["default"])
    assert model.active_adapters == ["default", "expert_4"] and list(model.peft_config) == model.active_adapters
    assert model.state_dict().keys() == before.keys()


def test_an_adapter_of_ones_own_may_be_called_so():
    model = mixture_of("llama", experts=True)
    model.add_adapter("ref", copy.deepcopy(model.peft_config["expert_0"]))
    assert model.active_adapters == [f"expert_{i}" for i in range(4)] and "ref" in model.peft_config
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("ref", config())
