"""What a product's input is made of is saved in its place where autograd keeps it anyway."""

import weakref

import pytest
import torch
from helpers import assert_same_grads, grads_of, mixture_of

from moelora.ops import remade

IDS = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def step(options=None):
    """(loss, gradients, what down_proj of the first block read, gone or not after the forward) of a step."""
    torch.manual_seed(0)
    model = mixture_of("llama", **(options or {})).train()
    found = []
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda module, args: found.append(weakref.ref(args[0].untyped_storage())))
    loss = model(input_ids=IDS, labels=IDS).loss
    is_kept = found[0]() is not None
    loss.backward()
    return loss, grads_of(model), is_kept


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(remade, "MIN_BYTES", 0)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}], ids=["plain", "dropout"])
def test_what_down_proj_reads_is_made_again_to_the_last_bit(monkeypatch, options):
    loss, expected, is_kept = step(options)
    assert is_kept
    monkeypatch.setattr(remade, "MIN_BYTES", 0)
    again, grads, is_kept = step(options)
    assert not is_kept
    assert torch.equal(again, loss)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(grads[name], grad), name


def test_backward_twice(always):
    model = mixture_of("llama").train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in grads_of(model).items()}
    loss.backward()
    assert_same_grads(grads_of(model), {name: 2 * grad for name, grad in once.items()}, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_keeps_what_it_keeps(always):
    """What a checkpoint saves can be asked for once, by the node that saved it."""
    _, expected, _ = step()
    torch.manual_seed(0)
    model = mixture_of("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert_same_grads(grads_of(model), expected, rtol=1e-5, atol=1e-7)


def test_what_somebody_keeps_elsewhere_is_not_asked_for(always):
    """A checkpoint would compute its region again; offloading would copy back what it has just taken away."""
    asked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: asked.append(1) or tensor):
        x = torch.randn(3, requires_grad=True).exp() * torch.randn(3, requires_grad=True).exp()
        (kept,) = remade.source_of(x).tensors
    assert kept is x and not asked


@pytest.mark.parametrize(
    "make", [lambda x: x * 2, lambda x: x * torch.ones(4), lambda x: x + x, lambda x: x.detach() * x.detach()]
)
def test_what_autograd_keeps_only_half_of_is_kept(always, make):
    x = make(torch.randn(3, 4, requires_grad=True).exp())
    (kept,) = remade.source_of(x).tensors
    assert kept is x
