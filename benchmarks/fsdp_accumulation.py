"""How often FSDP2 computes other numbers where gradients accumulate unreduced: a fault that lies beneath this package.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml --mixed_precision no --num_processes 2 \\
        -m benchmarks.fsdp_accumulation --plain

Trains the same tiny model from the same start again and again and counts the repetitions whose losses differ from the
first's. With `--plain` it is PEFT's LoRA and nothing of ours. Wants two GPUs.
"""

import argparse
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moelora import MoELoraConfig

MICRO_BATCHES = 4  # two optimizer steps of two
OPTIONS = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train(accelerator: Accelerator, plain: bool, synchronize: bool) -> torch.Tensor:
    """[MICRO_BATCHES] losses of this process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    config = LoraConfig(**OPTIONS) if plain else MoELoraConfig(**OPTIONS, num_experts=3, top_k_experts=2)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for number in range(MICRO_BATCHES):
        with accelerator.accumulate(model):
            seed = torch.Generator().manual_seed(2 * number + accelerator.process_index)
            ids = torch.randint(0, 64, (2, 4 + 3 * accelerator.process_index), generator=seed).to(accelerator.device)
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
            if synchronize:
                torch.cuda.synchronize()
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="PEFT's LoRA in place of a mixture")
    parser.add_argument("--sync-each-batch", action="store_true", help="reduce gradients in every micro-batch")
    parser.add_argument("--synchronize", action="store_true", help="wait for the device after every micro-batch")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to repeat (default: 60)")
    options = parser.parse_args()
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=options.sync_each_batch)
    accelerator = Accelerator(gradient_accumulation_plugin=plugin)
    first, others, repetitions, start = None, 0, 0, time.monotonic()
    while True:
        goes_on = torch.tensor(float(time.monotonic() - start < options.seconds), device=accelerator.device)
        dist.all_reduce(goes_on, op=dist.ReduceOp.MIN)
        if not goes_on:
            break
        losses = train(accelerator, options.plain, options.synchronize)
        first = losses if first is None else first
        others += not torch.allclose(losses, first, rtol=1e-4, atol=1e-6)
        repetitions += 1
    print(f"process {accelerator.process_index}: {others} of {repetitions} repetitions differ", flush=True)


if __name__ == "__main__":
    main()
