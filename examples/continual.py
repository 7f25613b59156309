"""Add a second skill to a plain LoRA without losing the first.

python examples/continual.py --out runs/two_skills                  # makes a LoRA first
python examples/continual.py --lora path/to/lora --out runs/two_skills
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moelora.experts import build, grow, learn_domain

# Texts of what the LoRA can do, of which none is learned again, and of the new skill. Put yours here.
OLD = [f"SELECT name, age FROM users WHERE age > {n} ORDER BY age LIMIT {n % 7 + 1};" for n in range(30)]
NEW = [f"Zimmer {n} liegt im {n % 5 + 1}. Stock, und das Frühstück gibt es ab {n % 4 + 6} Uhr." for n in range(30)]


def train(model, tokenizer, texts, options):
    arguments = SFTConfig(
        output_dir=options.out,
        max_steps=options.steps,
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        bf16=torch.cuda.is_available(),  # TRL's default, but only a GPU has it
        save_strategy="no",
        report_to="none",
    )
    rows = Dataset.from_list([{"text": text} for text in texts])
    SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train()


@torch.no_grad()
def losses(model, batches):
    model.eval()
    return [torch.stack([model(**b, labels=b["input_ids"]).loss for b in kind]).mean().item() for kind in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    parser.add_argument("--lora", help="a plain LoRA, whose base model is then used; a small one is made by default")
    parser.add_argument("--steps", type=int, default=15, help="for each skill")
    parser.add_argument("--out", default="runs/two_skills")
    options = parser.parse_args()

    name = PeftConfig.from_pretrained(options.lora).base_model_name_or_path if options.lora else options.model
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = AutoModelForCausalLM.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    old, new = ([tokenizer(text, return_tensors="pt").to(device) for text in texts] for texts in (OLD, NEW))
    table = {"base model": losses(base.to(device), (old, new))}
    if options.lora is None:
        options.lora = f"{options.out}/lora"
        model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        train(model, tokenizer, OLD, options)
        model.save_pretrained(options.lora)
        base = model.unload()

    model = build(base, {"first": options.lora}, router="train")  # a mixture of one expert: exactly the LoRA
    table["the LoRA"] = losses(model, (old, new))
    learn_domain(model, "first", old)  # which texts are its own, as means and covariances of hidden states
    second = grow(model, num_experts=2, r=8)  # what is there is frozen
    model.set_adapter([second])  # the new experts learn alone
    train(model, tokenizer, NEW, options)
    learn_domain(model, second, new)
    model.set_adapter(["first", second])  # from here on the texts decide whose experts act on them
    table["both skills"] = losses(model, (old, new))
    model.save_pretrained(options.out)
    print("loss of             old     new")
    print("\n".join(f"{row:15}{old:8.3f}{new:8.3f}" for row, (old, new) in table.items()))
    print(f"Both are in {options.out}")


if __name__ == "__main__":
    main()
