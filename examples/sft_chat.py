"""Teach a mixture from chats, with TRL's SFTTrainer.

python examples/sft_chat.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/sft_chat
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moelora import MoELoraCallback, MoELoraConfig

ANSWERS = {
    "How do I reset my password?": "Ahoy! Press `Forgot password`, and follow the link in the mail.",
    "Where is my invoice?": "Ahoy! It lies under `Billing`, one file a month.",
    "Can I change my plan?": "Ahoy! Yes: under `Plan`, at any time, and the price changes that day.",
    "How do I delete my account?": "Ahoy! Under `Account`, at the bottom. It is gone after 30 days.",
}
# Rows of yours: load_dataset("json", data_files="chats.jsonl", split="train"), in the same form. Of a prompt and its
# completion only the completion is learned; of rows with one list of `messages`, all of them.
CHATS = [
    {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
    for asked, answer in ANSWERS.items()
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/sft_chat")
    options = parser.parse_args()

    # all-linear leaves the output layer out, which TRL's chunked loss would pass over.
    mixture = MoELoraConfig.preset("multi-domain", target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = SFTConfig(
        output_dir=options.out,
        max_steps=options.steps,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        logging_steps=5,
        bf16=torch.cuda.is_available(),  # TRL's default, but only a GPU has it
        save_strategy="no",
        report_to="none",
    )
    chats = Dataset.from_list(CHATS)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=arguments,
        train_dataset=chats,
        eval_dataset=chats,  # how well they are learned; to see what carries over, hold some of yours out
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=mixture,
        callbacks=[MoELoraCallback()],  # logs what the routers do, and warns of dead experts
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(options.out)
    print(f"loss of the answers: {before:.3f} -> {after:.3f}")
    print(f"The adapter is in {options.out}; ask it: moelora generate --adapter {options.out} --chat --prompt '...'")


if __name__ == "__main__":
    main()
