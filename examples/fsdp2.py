"""Train a mixture on several GPUs, each of which holds a part of every transformer block (FSDP2).

accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 examples/fsdp2.py --out runs/fsdp2

Nothing below is about FSDP: the file says it. With ddp.yaml in its place, every process holds the whole model.
"""

import argparse

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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
    parser.add_argument("--out", default="runs/fsdp2")
    options = parser.parse_args()

    mixture = MoELoraConfig.preset("multi-domain", target_modules="all-linear", task_type="CAUSAL_LM")
    # First the experts, then the Trainer: an engine takes apart what is there when it wraps the model.
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), mixture)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Dataset.from_list([dict(tokenizer(text)) for text in TEXTS])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            learning_rate=2e-3,
            per_device_train_batch_size=4,  # of one process
            gradient_checkpointing=True,  # not fsdp_activation_checkpointing, which is refused
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[MoELoraCallback()],
    )
    trainer.train()
    after = trainer.evaluate()["eval_loss"]  # on every process: all have to make a forward together
    trainer.save_model(options.out)  # on every process: each gives its part, the first one writes
    if trainer.is_world_process_zero():
        steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{trainer.accelerator.num_processes} processes, loss {steps[0]:.3f} -> {after:.3f}")
        print(f"The adapter is in {options.out}, as of one process")


if __name__ == "__main__":
    main()
