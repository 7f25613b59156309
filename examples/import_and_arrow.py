"""Combine plain LoRAs into one model: moelora's Arrow router, beside the one that PEFT has.

python examples/import_and_arrow.py --lora sql=path/to/one --lora rooms=path/to/other --out runs/combined

The LoRAs need one base model. Their ranks, alphas and targets may differ; PEFT's Arrow then cannot take them.
"""

import argparse

import torch
from peft import ArrowConfig, PeftConfig, create_arrow_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moelora.experts import build

TEXTS = [  # put some of what your LoRAs are for here
    "SELECT name, age FROM users WHERE age > 7 ORDER BY age LIMIT 3;",
    "Zimmer 12 liegt im 3. Stock, und das Frühstück gibt es ab 7 Uhr.",
]


def pair(text: str) -> tuple[str, str]:
    name, is_pair, folder = text.partition("=")
    if not is_pair:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER; give the LoRA a name, as in sql={text}")
    return name, folder


@torch.no_grad()
def losses(model, batches):
    return [model.eval()(**batch, labels=batch["input_ids"]).loss.item() for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of the base model; by default what the first LoRA names")
    parser.add_argument("--lora", action="append", type=pair, required=True, metavar="NAME=FOLDER", help="two or more")
    parser.add_argument("--top-k", type=int, default=1, help="LoRAs that act on a token, in each linear")
    parser.add_argument("--out", default="runs/combined")
    options = parser.parse_args()

    loras = dict(options.lora)
    name = options.model or PeftConfig.from_pretrained(next(iter(loras.values()))).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    batches = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    table = {"base model": losses(AutoModelForCausalLM.from_pretrained(name), batches)}

    # Nothing is trained: in each linear a token goes to the LoRA whose B A stretches it most.
    mixture = build(AutoModelForCausalLM.from_pretrained(name), loras, router="arrow", top_k=options.top_k)
    table["moelora's Arrow"] = losses(mixture, batches)
    loads = [router.expert_load for router in mixture.routing_stats().values()]
    for lora in loras:
        mixture.set_adapter(lora)  # alone, it does what it does in PEFT, bit for bit
        table[f"{lora} alone"] = losses(mixture, batches)
    mixture.set_adapter(list(loras))
    mixture.save_pretrained(options.out)

    # The same router in PEFT, beside it. It is near, not equal: PEFT finds the direction in 15 power iterations, and
    # weighs the chosen LoRAs otherwise where a token has several.
    config = ArrowConfig(top_k=options.top_k, router_temperature=1.0)
    arrow = create_arrow_model(AutoModelForCausalLM.from_pretrained(name), list(loras.values()), config)
    table["PEFT's Arrow"] = losses(arrow, batches)

    print("loss of the texts")
    for row, found in table.items():
        print(f"{row:20}" + "".join(f"{loss:8.3f}" for loss in found))
    for lora, shares in zip(loras, zip(*loads, strict=True), strict=True):
        print(f"{lora} has {sum(shares) / len(shares):.0%} of the choices, mean over {len(shares)} linears")
    print(f"The mixture is in {options.out}")


if __name__ == "__main__":
    main()
