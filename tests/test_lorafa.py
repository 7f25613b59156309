"""LoRA-FA: A stands still, B learns by a projected gradient, routers learn too."""

import copy

import pytest
import torch
from helpers import LLAMA_TARGETS, SCOPES, VOCAB, llama, mixture_of, routers_of
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer as lorafa_of_peft

from moelora.training import create_lorafa_optimizer

IDS = torch.arange(14).view(2, 7) % VOCAB


def step(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "options", [{}, {"router_hidden_size": 5}, {"router_type": "fixed"}, {"experts": True}], ids=str
)
@pytest.mark.parametrize("scope", SCOPES)
def test_it_learns(scope, options):
    model = mixture_of("llama", router_scope=scope, fresh=True, **options).train()
    before = copy.deepcopy(dict(model.named_parameters()))
    losses = step(model, create_lorafa_optimizer(model, lr=1e-2), 6)
    assert losses[-1] < losses[0] - 0.2
    for name, parameter in model.named_parameters():
        is_same = torch.equal(parameter, before[name])
        assert is_same == (not ("lora_B" in name or "lora_router" in name)), name


def test_where_weights_are_constant_it_is_pefts_own():
    """A mixture whose weights are all 1 is the LoRA that it is stored as."""
    mixture = mixture_of("llama", router_type="fixed", routing_scale=4.0, num_experts=4, r=2, lora_alpha=4).train()
    single = get_peft_model(llama(), LoraConfig(r=8, lora_alpha=16, target_modules=LLAMA_TARGETS)).train()
    theirs = dict(single.named_parameters())
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                theirs[name].copy_(parameter)
    ours = step(mixture, create_lorafa_optimizer(mixture, lr=1e-3, weight_decay=0.1), 4)
    expected = step(single, lorafa_of_peft(single, r=8, lora_alpha=16, lr=1e-3, weight_decay=0.1), 4)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_pefts_own_is_refused_for_routers():
    model = mixture_of("llama")
    with pytest.raises(ValueError, match=r"moelora\.training\.create_lorafa_optimizer"):
        lorafa_of_peft(model, r=2, lora_alpha=4, lr=1e-3)
    with pytest.raises(ValueError, match="holds no mixture"):
        create_lorafa_optimizer(llama(), lr=1e-3)


def test_a_router_lists_no_scalings_of_adapters():
    """Whoever goes through what each adapter has in a layer asks whatever has keys."""
    for router in routers_of(mixture_of("llama")).values():
        assert not hasattr(router.scaling, "keys") and "default" in router.lora_router
