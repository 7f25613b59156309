"""A mixture that generates in training mode, as RL trainers let it, is trained as the policy that rolled out."""

import copy
import warnings

import pytest
import torch
from helpers import PAD, SCOPES, mixture_of, train_step
from transformers import ContinuousBatchingConfig, GenerationConfig

PROMPTS = torch.tensor([[PAD, PAD, 5, 9], [7, 3, 11, 30], [PAD, 21, 8, 6]])
LIMIT = {"expert_capacity_factor": 0.5, "top_k_experts": 1}
OFF = r"`expert_capacity_factor` \(0\.5\) is off from here on.*Set it to None"


def roll_out(model, length=6):
    """Tokens [B, S] and the log-probabilities [B, length, V] that the answers were drawn from."""
    options = {"max_new_tokens": length, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        answer = model.generate(input_ids=PROMPTS, attention_mask=(PROMPTS != PAD).long(), **options)
    return answer.sequences, torch.stack(answer.logits, dim=1).log_softmax(-1)


def in_training(model, tokens, rows=slice(None)):
    mask = torch.ones_like(tokens)
    mask[:, : PROMPTS.shape[1]] = (PROMPTS != PAD).long()
    output = model(input_ids=tokens[rows], attention_mask=mask[rows], labels=tokens[rows])
    return output.logits[:, PROMPTS.shape[1] - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
def test_log_probabilities_are_those_that_the_tokens_were_drawn_from(scope, router_type):
    model = mixture_of("llama", router_scope=scope, router_type=router_type, **LIMIT).train()
    model.set_expert_maturity("default", 0.7)
    with pytest.warns(UserWarning, match=OFF):
        tokens, drawn = roll_out(model)
    for rows in (slice(None), slice(2), slice(2, 3)):  # whatever micro-batches the trainer makes of them
        model.set_expert_maturity("default", 0.7)  # each forward is a step, in which it grows
        torch.testing.assert_close(in_training(model, tokens, rows), drawn[rows], rtol=1e-4, atol=1e-4)


def test_capacity_stays_where_what_is_generated_is_not_trained_on():
    model = mixture_of("llama", **LIMIT)
    tokens, drawn = roll_out(model.eval())
    assert (in_training(model.train(), tokens) - drawn).abs().max() > 0.1
    with model.disable_adapter():
        roll_out(model)
    assert not model.base_model.routing.is_dropless


def test_it_is_said_once_and_only_where_there_was_a_capacity():
    for options in ({"expert_capacity_factor": None}, {"top_k_experts": 4}, {"router_type": "fixed"}):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="`expert_capacity_factor`")
            roll_out(mixture_of("llama", **(LIMIT | options)).train(), length=1)
    model = mixture_of("llama", **LIMIT).train()
    with pytest.warns(UserWarning, match=OFF) as caught:
        for _ in range(2):
            roll_out(model, length=1)
            model = copy.deepcopy(model)
    assert sum("is off from here on" in str(warning.message) for warning in caught) == 1


def test_continuous_batching_rolls_out_too():
    model = mixture_of("llama", **LIMIT).train()
    options = {"generation_config": GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1)}
    batching = ContinuousBatchingConfig(block_size=16, num_blocks=8, max_batch_tokens=64)
    with pytest.warns(UserWarning, match=OFF):
        model.generate_batch([[5, 9, 3]], continuous_batching_config=batching, progress_bar=False, **options)
    assert model.base_model.routing.is_dropless


def test_balancing_goes_on():
    model = mixture_of("llama", router_aux_loss_coef=1.0, **LIMIT).train()
    with pytest.warns(UserWarning, match=OFF):
        tokens, _ = roll_out(model)
    _, grads = train_step(model, {"input_ids": tokens, "labels": tokens})
    assert model.balancing_loss.requires_grad and any("moe_router" in name for name in grads)
    assert all(stats.dropped == 0 for stats in model.routing_stats().values())
