"""Let a mixture prefer one kind of answer to another, with TRL's DPOTrainer.

python examples/dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/dpo
python examples/dpo.py --adapter runs/sft_chat --out runs/dpo
"""

import argparse

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from moelora import MoELoraCallback, MoELoraConfig

ANSWERS = {  # what was asked: the answer to prefer, the answer to avoid
    "What is 2 + 2?": ("4.", "That is a very interesting question, which people have long asked themselves."),
    "Is the shop open on Sundays?": ("No.", "Sundays are days on which some shops are open and others are not."),
    "Which file holds the settings?": ("settings.toml.", "There are many files, and settings are an important one."),
    "Who wrote Faust?": ("Goethe.", "The question who wrote something is one of the oldest in literature."),
}
# Rows of yours: load_dataset("json", data_files="pairs.jsonl", split="train"), in the same form.
PAIRS = [
    {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }
    for asked, (chosen, rejected) in ANSWERS.items()
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--adapter", help="a mixture to go on with; its base model is used")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/dpo")
    options = parser.parse_args()

    name, mixture = options.model, None
    if options.adapter:
        name = PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(name)
    if options.adapter:  # the reference is then a frozen copy of the adapter, which TRL adds as `ref`
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    else:  # the reference is then the base model
        mixture = MoELoraConfig.preset("multi-domain", target_modules="all-linear", task_type="CAUSAL_LM")
    pairs = Dataset.from_list(PAIRS)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            logging_steps=5,
            bf16=torch.cuda.is_available(),  # TRL's default, but only a GPU has it
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=mixture,
        callbacks=[MoELoraCallback()],
    )
    before = trainer.evaluate()["eval_loss"]  # log 2, for policy and reference are still the same
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(options.out)
    print(f"loss: {before:.4f} -> {found['eval_loss']:.4f}; pairs told right: {found['eval_rewards/accuracies']:.0%}")
    print(f"The adapter is in {options.out}")


if __name__ == "__main__":
    main()
