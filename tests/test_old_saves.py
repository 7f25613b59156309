"""Folders that the last commit before saves had ids and checksums wrote: they load, and give the same bits."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_persistence import base_model, logits

from moelora.storage.mixture_files import read_mixture

SAVED = Path(__file__).parent / "saved_in_november_2026"


@pytest.mark.parametrize("name", ["default", "experts", "fixed", "attached"])
def test_an_old_save_gives_the_same_bits(name):
    """To the last bit on the machine that made them; others may round the products otherwise."""
    options = {"allow_pickled_router": True} if name == "attached" else {}
    model = PeftModel.from_pretrained(base_model(), SAVED / name, **options)
    expected = load_file(SAVED / "logits.safetensors")[name]
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert sum(adapter.num_experts for adapter in read_mixture(SAVED / name)) == model.base_model.routing.num_experts


def test_an_old_pickled_router_is_refused_until_it_is_allowed():
    with pytest.raises(ValueError, match="allow_pickled_router=True"):
        PeftModel.from_pretrained(base_model(), SAVED / "attached")
