"""Teach a mixture from pictures and text: all linears of a vision-language model, or its language model alone.

python examples/vision_language.py --model llava-hf/llava-interleave-qwen-0.5b-hf --out runs/colours
"""

import argparse

import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from moelora import MoELoraConfig

COLOURS = {"crimson": (220, 20, 60), "teal": (0, 128, 128), "ochre": (204, 119, 34), "indigo": (75, 0, 130)}
# Yours: pairs of a picture and what is to be said of it, e.g. Image.open(row["path"]) and row["caption"].
EXAMPLES = [(Image.new("RGB", (64, 64), rgb), name) for name, rgb in COLOURS.items()]
ASKED = "Which colour is this?"


def batch_of(processor, image, answer):
    """What the model reads, and the answer alone as what it learns."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    batch = processor(images=image, text=prompt + answer, return_tensors="pt")
    length = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
    labels = batch["input_ids"].clone()
    labels[:, :length] = -100
    return {**batch, "labels": labels}


@torch.no_grad()
def mean_loss(model, batches):
    model.eval()
    return torch.stack([model(**batch).loss for batch in batches]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-interleave-qwen-0.5b-hf", help="hub id or folder")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--language-model-only", action="store_true", help="leave image tower and projector as they are"
    )
    parser.add_argument("--out", default="runs/colours")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(options.model)
    base = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).to(device)
    # The projector between tower and language model lies in no transformer block: its linears get routers of their own.
    spared = r".*(vision|visual|projector|connector).*" if options.language_model_only else None
    mixture = MoELoraConfig.preset(
        "multi-domain", target_modules="all-linear", exclude_modules=spared, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, mixture)
    print("routers of their own:", ", ".join(model.peft_config["default"].own_routers or ["none"]))

    batches = [{key: value.to(device) for key, value in batch_of(processor, *each).items()} for each in EXAMPLES]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    before = mean_loss(model, batches)
    for _ in range(options.epochs):
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()  # the balancing loss is in its gradient
            optimizer.step()
    print(f"loss of the answers: {before:.3f} -> {mean_loss(model, batches):.3f}")
    model.save_pretrained(options.out)
    print(f"The adapter is in {options.out}")


if __name__ == "__main__":
    main()
