"""Object detectors, whose labels are a list of boxes for each image and no tensor."""

import pytest
import torch
from helpers import SCOPES
from peft import LoraConfig, get_peft_model
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    YolosConfig,
    YolosForObjectDetection,
)

from moelora import MoELoraConfig

LABELS = [
    {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.2, 0.1]])},
    {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.6, 0.5, 0.4, 0.2]])},
]
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def yolos():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    options |= {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4, "num_labels": 3}
    return YolosForObjectDetection(YolosConfig(**options, hidden_dropout_prob=0.0))


def detr():
    sizes = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_features": ["stage4"]}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
               (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    options |= {"d_model": 32, "num_queries": 5, "num_labels": 3, "dropout": 0.0, "use_timm_backbone": False}
    return DetrForObjectDetection(DetrConfig(backbone_config=ResNetConfig(**sizes), **options))


MODELS = {yolos: ["query", "value", "output.dense"], detr: ["q_proj", "v_proj", "fc1", "fc2"]}


def adapted(build, kind, **options):
    torch.manual_seed(0)
    base, options = build(), {"r": 2, "target_modules": MODELS[build]} | options
    torch.manual_seed(1)
    if kind == "lora":
        return get_peft_model(base, LoraConfig(**options))
    return get_peft_model(base, MoELoraConfig(router_scope=kind, router_type="learned", **options))


@pytest.mark.parametrize("kind", ["lora", *SCOPES])
@pytest.mark.parametrize("build", MODELS)
def test_a_step_of_training(build, kind):
    model = adapted(build, kind).train()
    output = model(pixel_values=PIXELS, labels=LABELS)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
    if kind != "lora":
        without = adapted(build, kind, router_aux_loss_coef=0.0).train()(pixel_values=PIXELS, labels=LABELS)
        torch.testing.assert_close(output.loss, without.loss + 0.01 * output.balancing_loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "block"])
def test_trainer(tmp_path, kind):
    model = adapted(detr, kind)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True}
    options |= {"report_to": "none", "remove_unused_columns": False, "disable_tqdm": True, "learning_rate": 1e-2}
    rows = [{"pixel_values": PIXELS[index % 2], "labels": LABELS[index % 2]} for index in range(8)]

    def collate(batch):
        return {"pixel_values": torch.stack([b["pixel_values"] for b in batch]), "labels": [b["labels"] for b in batch]}

    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, TrainingArguments(tmp_path, **options), data_collator=collate, train_dataset=rows).train()
    changed = [not torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_B" in n]
    assert sum(changed) > len(changed) / 2  # some have no gradient at first, as the queries are zero
