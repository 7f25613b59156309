"""Wrappers that engines put around blocks."""

import pytest
import torch
from helpers import ARCHITECTURES, mixture_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moelora.training.run import _without_mixture


def test_fsdps_own_activation_checkpointing_is_refused_by_name():
    """It runs a block again from outside the block's hooks, where nothing carries the first run's routing."""
    model = mixture_of("llama", router_aux_loss_coef=0.1).train()
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    loss = model(**ARCHITECTURES["llama"].batch()).loss
    with pytest.raises(RuntimeError, match=r"recomputed by a checkpoint.*gradient_checkpointing_enable\(\)"):
        loss.backward()


def test_measuring_without_the_mixture_shows_fsdp2_what_is_trained():
    """FSDP2 reads requires_grad in the first forward, which is this one, and reduces gradients accordingly."""
    model, batch = mixture_of("llama"), ARCHITECTURES["llama"].batch(labels=False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad(), _without_mixture(model):
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
        measured = model(**batch).logits
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, measured)
        assert torch.equal(model.unload()(**batch).logits, measured)
