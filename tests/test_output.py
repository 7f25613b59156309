"""The output of a training forward carries the balancing loss through whatever takes outputs apart."""

import pickle

import pytest
import torch
from helpers import ARCHITECTURES, mixture_of
from torch.utils._pytree import tree_flatten, tree_unflatten


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_can_be_taken_apart_and_made_anew(name):
    """As DDP does with find_unused_parameters=True, which a Trainer asks for around a PeftModel."""
    model, inputs = mixture_of(name), ARCHITECTURES[name].batch()
    plain = type(model(**inputs))
    output = model.train()(**inputs)
    assert isinstance(output, plain)
    leaves, spec = tree_flatten(output)
    rebuilt = tree_unflatten(leaves, spec)
    for copy in (rebuilt, pickle.loads(pickle.dumps(output.__class__))(**output)):
        assert list(copy) == list(output)
        assert torch.equal(copy.balancing_loss, output["balancing_loss"]) and copy["loss"] is output.loss


def test_evaluation_leaves_the_output_alone():
    model = mixture_of("llama")
    output = model(**ARCHITECTURES["llama"].batch())
    assert "balancing_loss" not in output and not hasattr(output, "balancing_loss")
