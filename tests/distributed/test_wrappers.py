"""Wrappers that engines put around blocks."""

import pytest
from helpers import ARCHITECTURES, mixture_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


def test_fsdps_own_activation_checkpointing_is_refused_by_name():
    """It runs a block again from outside the block's hooks, where nothing carries the first run's routing."""
    model = mixture_of("llama", router_aux_loss_coef=0.1).train()
    layers = model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    loss = model(**ARCHITECTURES["llama"].batch()).loss
    with pytest.raises(RuntimeError, match=r"recomputed by a checkpoint.*gradient_checkpointing_enable\(\)"):
        loss.backward()
