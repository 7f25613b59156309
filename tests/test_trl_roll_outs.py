"""Who rolls out for TRL's GRPO and RLOO: transformers' continuous batching; vLLM, where a mixture can be merged."""

import math

import pytest
import torch
from accelerate import Accelerator
from helpers import awaken
from peft import get_peft_model
from test_trainers import CASES, TARGETS, base_of, loaded, losses, trainer_of
from transformers import LlamaForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from moelora import MoELoraCallback, MoELoraConfig

pytestmark = pytest.mark.usefixtures("alone_in_accelerate")
ADVICE = "take `use_transformers_continuous_batching=True` in its place"


@pytest.mark.filterwarnings("ignore:`expert_capacity_factor`")
def test_continuous_batching_rolls_out_by_the_mixture(tmp_path, monkeypatch):
    trainer = trainer_of("GRPO, continuous batching", tmp_path, max_steps=1)
    answers, generate_batch = [], trainer.model.generate_batch

    def note(*args, **kwargs):
        answers.append(generate_batch(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(trainer.model, "generate_batch", note)
    trainer.train()
    assert [len(outputs) for outputs in answers] == [2] and all(map(math.isfinite, losses(trainer)))
    assert not [output.error for output in answers[0].values() if output.error]


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_vllm_is_refused_before_it_starts(tmp_path, name):
    """Its engine takes minutes to start, and is not installed here: TRL says so where a mixture can be merged."""
    case = CASES[name]
    for options, error, message in (
        ({}, ValueError, f"cannot merge: router_type='learned_with_maturity'.*{ADVICE}"),
        ({"router_type": "fixed"}, ImportError, "vLLM is not available"),
    ):
        model = get_peft_model(base_of(case.base), MoELoraConfig(r=2, target_modules=TARGETS, **options))
        with pytest.raises(error, match=message):
            trainer_of(name, tmp_path, model=model, use_vllm=True, callbacks=[MoELoraCallback()])


def handed_over(model):
    """The weights that TRL gives vLLM, by the names that it gives them."""
    generation = object.__new__(VLLMGeneration)
    generation.model, generation._dist = model, DistributedBackend(Accelerator(cpu=True))
    return {name: weight.clone() for name, weight in generation._iter_named_params()}


def test_what_vllm_is_given_of_a_mixture_with_constant_weights(tmp_path):
    model = get_peft_model(base_of(LlamaForCausalLM), MoELoraConfig(r=2, target_modules=TARGETS, router_type="fixed"))
    awaken(model)
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        there = base_of(LlamaForCausalLM).eval()
        before = there(ids).logits
        missing = there.load_state_dict(handed_over(model), strict=False)
        assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
        torch.testing.assert_close(there(ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)  # it is unmerged again
    assert (before - expected).abs().max() > 0.1


def test_without_the_callback_the_first_hand_over_is_refused_and_nothing_is_merged(tmp_path):
    model = loaded(CASES["GRPO"], tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=ADVICE):
        handed_over(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(getattr(module, "merged", False) for module in model.modules())
