"""Run by test_sft.py: one SFTTrainer step; prints the routers' gradients with and without the balancing loss.

`expected` is computed from the same micro-batches by plain autograd: each one's loss times its share of the targets.
"""

import json
import sys
import tempfile

import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from moelora import MoELoraConfig

TEXTS = ["hello world, this is text", "abc def", "a longer piece of text than the one before", "zzz yyy xxx"]
COEF = 3.0


def mixture(coef):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**size, vocab_size=300, bos_token_id=None, eos_token_id=0))
    config = MoELoraConfig(
        r=2, target_modules="all-linear", num_experts=4, task_type="CAUSAL_LM", router_aux_loss_coef=coef
    )
    return get_peft_model(base, config)


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = router_gradients(model)


def router_gradients(model):
    gradients = [p.grad for n, p in model.named_parameters() if "moe_router" in n]
    return torch.cat([g.flatten() for g in gradients if g is not None]).tolist()


def step(coef, packing, folder):
    """The gradients of one optimizer step of two micro-batches, and the micro-batches."""
    batches = []
    args = trl.SFTConfig(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=1 if packing else 2,
        gradient_accumulation_steps=2,
        packing=packing,
        max_length=48,
        learning_rate=0.0,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = mixture(coef)
    keep = Keep()
    data = Dataset.from_dict({"text": TEXTS * 2})
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[keep])
    watch = model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs), with_kwargs=True, prepend=True
    )
    trainer.train()
    watch.remove()
    return keep.gradient, batches


def expected_gradients(batches):
    model = mixture(COEF).train()
    targets = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, targets, strict=True):
        inputs = {k: v for k, v in batch.items() if k not in ("fused_lm_head", "num_items_in_batch")}
        total = total + COEF * model(**inputs).balancing_loss * count / sum(targets)
    total.backward()
    return router_gradients(model)


def main():
    packing = sys.argv[1] == "packing"
    with tempfile.TemporaryDirectory() as folder:
        with_loss, batches = step(COEF, packing, folder)
        without, _ = step(0.0, packing, folder)
    expected = expected_gradients(batches)
    print(json.dumps({"trl": trl.__version__, "with": with_loss, "without": without, "expected": expected}))


if __name__ == "__main__":
    main()
