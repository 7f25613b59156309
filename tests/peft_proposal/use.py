"""What a user does with that method: `use.py make FOLDER`, then `use.py load FOLDER`, which imports nothing of it."""

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(6)[None]


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40)).eval()


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


def make(folder):
    from gated_lora import GatedConfig

    config = GatedConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    assert model.is_gated and type(model).__name__ == "GatedPeftModelForCausalLM"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 4 and layer.asked_rank == 2
    torch.testing.assert_close(logits(model, gate=0.0), logits(base()), rtol=0, atol=0)
    torch.testing.assert_close(logits(model, gate=1.0), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(model, gate=0.5), logits(model))
    assert model.generate(input_ids=IDS, gate=0.5, max_new_tokens=2).shape[1] > 6
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="a gate cannot be merged"):
            merge()
    refused = base()
    with pytest.raises(ValueError, match="no gate for"):
        get_peft_model(refused, GatedConfig(target_modules=["q_proj", "k_proj"]))
    assert not [name for name, _ in refused.named_parameters() if "lora" in name]
    model.save_pretrained(folder)
    assert len(load_file(folder / "adapter_model.safetensors")) == 2
    torch.save(logits(model, gate=0.5), folder / "logits.pt")


def load(folder):
    assert "gated_lora" not in sys.modules
    model = PeftModel.from_pretrained(base(), folder).eval()
    assert model.is_gated and torch.equal(logits(model, gate=0.5), torch.load(folder / "logits.pt"))


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
