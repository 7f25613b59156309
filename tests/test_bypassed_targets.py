"""Projections that a model's kernels pass over: PEFT refuses them for LoRA by the model's type, and so do we."""

import pytest
import torch
from helpers import train_step
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from moelora import MoELoraConfig

SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
BASES = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZE)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZE, num_heads=4, head_dim=8, n_groups=1)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SIZE)),
}
KINDS = {
    "LoRA": LoraConfig,
    "mixture": MoELoraConfig,
    "plain": lambda **options: MoELoraConfig(use_moe_routing=False, **options),
}


@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", "out_proj"], ["conv1d"], r".*\.out_proj"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BASES)
def test_they_are_refused_as_for_lora(name, kind, targets):
    with pytest.raises(ValueError, match=rf"incompatible with Mamba-based models \(model_type='{name}'\)"):
        get_peft_model(BASES[name](), KINDS[kind](r=2, target_modules=targets))


@pytest.mark.parametrize("name", BASES)
def test_nothing_is_changed_and_the_fix_is_named(name):
    base = BASES[name]()
    before = {key: type(module) for key, module in base.named_modules()}
    with pytest.raises(
        ValueError, match=r"`backbone\.layers\.0\.mixer\.out_proj` cannot be adapted.*`exclude_modules`"
    ):
        get_peft_model(base, MoELoraConfig(r=2, target_modules="all-linear"))
    assert {key: type(module) for key, module in base.named_modules()} == before
    config = MoELoraConfig(r=2, target_modules="all-linear", exclude_modules=["out_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    ids = torch.arange(1, 8)[None]
    _, grads = train_step(model, {"input_ids": ids, "labels": ids})
    assert any("in_proj" in key for key in grads) and not any("out_proj" in key for key in grads)
