"""Train a mixture on a base in 4 bits, QLoRA style: the frozen weights take a quarter of 16 bits. A CPU can do it too.

pip install bitsandbytes
python examples/quantised.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/quantised
"""

import argparse
import importlib.util
import sys

import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from moelora import MoELoraCallback, MoELoraConfig

TEXTS = [f"SELECT name, age FROM users WHERE age > {n} ORDER BY age LIMIT {n % 7 + 1};" for n in range(40)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", default="runs/quantised")
    options = parser.parse_args()
    if importlib.util.find_spec("bitsandbytes") is None:
        sys.exit("4-bit bases need bitsandbytes, which is not installed: pip install bitsandbytes")

    on_gpu = torch.cuda.is_available()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=four_bits, device_map={"": 0 if on_gpu else "cpu"}
    )
    base = prepare_model_for_kbit_training(base)  # norms in float32, gradient checkpointing
    mixture = MoELoraConfig.preset("multi-domain", target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, mixture)  # experts and routers are not quantised
    print(f"{base.get_memory_footprint() / 2**20:.1f} MiB with experts")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            learning_rate=2e-3,
            per_device_train_batch_size=8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([dict(tokenizer(text)) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[MoELoraCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of a step: {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(options.out)
    print(f"The adapter is in {options.out}; it loads on the base as it was, too")


if __name__ == "__main__":
    main()
