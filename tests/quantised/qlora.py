"""QLoRA with a mixture on one kind of quantised base; prints what happened as JSON: `qlora.py KIND FOLDER DEVICE FORM`.

FORM is float32, bfloat16 (model and products; adapters in float32) or autocast (the same under torch.autocast). A
process of its own, because transformers and PEFT look for quantisation packages when they are imported.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bases import prepared_base
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig
from moelora.tuner.layer import MoELoraLayer

VOCAB, STEPS = 64, 8
WITHOUT_BACKWARD = {"torchao-int4"}  # "derivative for aten::_weight_int4pack_mm is not implemented", for any adapter
DEVICE = torch.device(sys.argv[3])
FORM = sys.argv[4]
DTYPE = torch.float32 if FORM == "float32" else torch.bfloat16
# By name: PEFT's "all-linear" does not find HQQLinear.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)


def load_base(folder: Path, kind: str) -> Any:
    base = prepared_base(folder, kind, DTYPE, DEVICE)
    if FORM == "autocast":
        base.forward = torch.autocast(DEVICE.type, torch.bfloat16)(base.forward)  # as accelerate does
    return base


def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def mixture_on(base: Any) -> Any:
    config = MoELoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, num_experts=3, task_type="CAUSAL_LM", maturity_tokens=200
    )
    torch.manual_seed(1)
    return get_peft_model(base, config)


def routed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELoraLayer)}


def awaken(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def dequantised(model: Any) -> Any:
    """The same mixture on plain linears that hold what the quantised ones stand for."""
    plain = mixture_on(LlamaForCausalLM(copy.deepcopy(model.config)).to(DEVICE))
    theirs = model.state_dict()
    for name, tensor in plain.state_dict().items():
        if ".base_layer." not in name:
            tensor.copy_(theirs[name])
    for name, layer in routed(plain).items():
        base = model.get_submodule(name).get_base_layer()
        with torch.no_grad():
            layer.base_layer.weight.copy_(base(torch.eye(layer.in_features, device=DEVICE).to(model.dtype)).t())
    return plain


def step(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(**batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.norm().clamp(min=1e-12)).item()


def train(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    save_base(folder / "base")
    base = load_base(folder / "base", kind)
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    with torch.no_grad():
        untouched = base.eval()(**inputs).logits
    model = mixture_on(base)
    layers = routed(model)
    with torch.no_grad():
        fresh = model.eval()(**inputs).logits
    awaken(model)
    reference = dequantised(model)
    with torch.no_grad():
        alone, expected = (m.eval()(**inputs).logits for m in (model, reference))
        with model.disable_adapter(), reference.disable_adapter():
            base_error = relative_error(model(**inputs).logits, reference(**inputs).logits)
    is_trained = kind not in WITHOUT_BACKWARD
    gradients, expected_gradients = (step(m) if is_trained else {} for m in (model, reference))
    model.zero_grad()
    losses = train(model) if is_trained else []
    tokens = model.eval().generate(batch()["input_ids"][1:3, :5], max_new_tokens=4, do_sample=False)
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(load_base(folder / "base", kind), folder / "adapter").eval()
    with torch.no_grad():
        saved, again = model(**inputs).logits, loaded(**inputs).logits
    result = {
        "adapters": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
        "layers": sorted({type(layer).__name__ for layer in layers.values()}),
        "checkpointing": model.is_gradient_checkpointing,
        "fresh": (fresh - untouched).abs().max().item(),
        "base_error": base_error,
        "logits": relative_error(alone, expected),
        "gradients": max((relative_error(gradients[n], g) for n, g in expected_gradients.items()), default=None),
        "names": sorted(gradients) == sorted(expected_gradients),
        "losses": losses,
        "generated": list(tokens.shape),
        "reloaded": (saved - again).abs().max().item(),
        "maturity": loaded.expert_maturity.tolist(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
