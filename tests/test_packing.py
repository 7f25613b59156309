"""Sequences packed into one row are routed, balanced and limited as in a padded batch; memory is linear in length."""

import pytest
import torch
from helpers import LLAMA_TARGETS, SCOPES, VOCAB, assert_same_grads, every_pair, mixture_of, routers_of, train_step
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moelora import MoELoraConfig

LENGTHS = [7, 1, 5, 3]
ROUTERS = {
    "maturity": {"router_type": "learned_with_maturity", "maturity_tokens": 40},
    "capacity": {"router_type": "learned", "expert_capacity_factor": 0.6},
}
# float32: the same sums over tokens, in another order and with attention over rows of another length.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def documents():
    """No token twice: equal ones would tie in the first block, and capacity would hang on rounding."""
    ids = torch.randperm(VOCAB - 2, generator=torch.Generator().manual_seed(1))[: sum(LENGTHS)] + 2
    return [piece.tolist() for piece in ids.split(LENGTHS)]


def padded():
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for row, document in zip(ids, documents(), strict=True):
        row[: len(document)] = torch.tensor(document)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def flattened():
    return dict(DataCollatorWithFlattening()([{"input_ids": document} for document in documents()]))


def padding_free(multiple=None):
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)
    batch = collator([{"input_ids": document} for document in documents()])
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def packed():
    """One packed row, as TRL's packing leaves it: the lengths stand beside it."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    ids = [token for document in documents() for token in document]
    batch = collator([{"input_ids": ids, "seq_lengths": LENGTHS}])
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


FORMS = {
    "flattening": flattened,
    "padding_free": padding_free,
    "padded padding_free": lambda: padding_free(multiple=13),
    "packing": packed,
}


def mixture(scope, **options):
    return mixture_of("llama", router_scope=scope, router_aux_loss_coef=0.5, **options)


@every_pair(form=FORMS, scope=SCOPES, router=ROUTERS)
def test_same_loss_gradients_and_counts_as_padded(form, scope, router):
    batch, reference = FORMS[form](), padded()
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    model, expected = (mixture(scope, **ROUTERS[router]) for _ in range(2))
    expected_loss, expected_grads = train_step(expected, reference | {"use_cache": False})
    loss, grads = train_step(model, batch | {"use_cache": False})
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(model.balancing_loss, expected.balancing_loss, **CLOSE)
    assert_same_grads(grads, expected_grads, **CLOSE)
    torch.testing.assert_close(model.expert_maturity, expected.expert_maturity, **CLOSE)
    theirs = expected.routing_stats()
    for name, stats in model.routing_stats().items():
        assert stats.num_tokens == theirs[name].num_tokens == sum(LENGTHS)
        assert stats.expert_load == pytest.approx(theirs[name].expert_load)
        assert stats.dropped == pytest.approx(theirs[name].dropped)
        if router == "capacity":
            assert stats.dropped > 0


@pytest.mark.parametrize("scope", SCOPES)
def test_tokens_without_a_label_are_routed_and_counted(scope):
    """A prompt's labels are -100; the experts act on it all the same."""
    model = mixture(scope)
    batch = flattened()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, 3] = batch["input_ids"][0, 3]
    train_step(model, batch | {"use_cache": False})
    assert {stats.num_tokens for stats in model.routing_stats().values()} == {sum(LENGTHS)}
    assert all(router.lora_router["default"].tokens_per_expert.sum() == 2 * 16 for router in routers_of(model).values())


class Residual(nn.Module):
    """A block without attention: what grows with the length is ours."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)

    def forward(self, hidden_states):
        return hidden_states + self.down_proj(torch.relu(self.up_proj(self.norm(hidden_states))))


class Stack(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(Residual(width) for _ in range(2))

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_is_linear_at_32k_tokens(scope):
    """No tensor is larger than the widest activation, forward or backward, capacity and all."""
    width, length = 16, 32768
    torch.manual_seed(0)
    config = MoELoraConfig(
        r=2, target_modules=LLAMA_TARGETS[-2:], num_experts=4, router_scope=scope, router_type="learned"
    )
    model = get_peft_model(Stack(width), config).train()
    hidden = torch.randn(1, length, width)
    with Largest() as largest:
        model(hidden).square().mean().backward()
    assert largest.numel == length * 2 * width
    assert {stats.num_tokens for stats in model.routing_stats().values()} == {length}
