"""One adapted linear, and the seven linears of a Llama block with their router, forward and backward.

python -m benchmarks.layer --device cuda
python -m benchmarks.layer --device cpu --tokens 256 --hidden 576 --intermediate 1536 --kv 192 --dtype float32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.timing import environment, interleaved, ratio
from moelora import MoELoraConfig

ARMS = ("frozen", "lora", "lora-default", "lora-equal", "ours", "ours-default", "ours-fixed", "loop")


class Block(GradientCheckpointingLayer):
    """The linears of a Llama block, each fed with noise of its own input's shape: nothing else costs time."""

    def __init__(self, hidden: int, intermediate: int, kv: int) -> None:
        super().__init__()
        shapes = {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv), "o": (hidden, hidden)}
        shapes |= {"gate": (hidden, intermediate), "up": (hidden, intermediate), "down": (intermediate, hidden)}
        for name, (width_in, width_out) in shapes.items():
            self.add_module(f"{name}_proj", nn.Linear(width_in, width_out, bias=False))

    def forward(self, hidden_states: Tensor, attended: Tensor, normed: Tensor, activated: Tensor) -> list[Tensor]:
        inputs = {"q": hidden_states, "k": hidden_states, "v": hidden_states, "o": attended}
        inputs |= {"gate": normed, "up": normed, "down": activated}
        return [self.get_submodule(f"{name}_proj")(x) for name, x in inputs.items()]


class OneLinear(GradientCheckpointingLayer):
    """A single adapted linear."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width_in, width_out, bias=False)

    def forward(self, hidden_states: Tensor) -> list[Tensor]:
        return [self.q_proj(hidden_states)]


class Stack(nn.Module):
    """A model of one block."""

    def __init__(self, block: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block])
        self.config = type("Config", (), {"hidden_size": hidden, "model_type": "custom", "to_dict": lambda self: {}})()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return self.layers[0](*inputs)


def build(arm: str, block: nn.Module, hidden: int, args: argparse.Namespace) -> nn.Module:
    """The block as one arm adapts it."""
    model = Stack(block, hidden).to(args.device, getattr(torch, args.dtype)).requires_grad_(False)
    if arm == "frozen":
        return model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = [name for name in targets if hasattr(block, name)]
    if arm.startswith("lora"):
        rank = args.rank * (args.experts if arm == "lora-equal" else args.top_k)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    else:
        config = MoELoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules=targets,
            num_experts=args.experts,
            top_k_experts=args.top_k,
            router_type="fixed" if arm == "ours-fixed" else "learned",
        )
    model = get_peft_model(model, config, autocast_adapter_dtype=arm.endswith("default"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


def step(model: nn.Module, inputs: list[Tensor], upstream: list[Tensor]) -> Callable[[], None]:
    """Forward and backward, with gradients for the inputs as inside a model."""

    def run() -> None:
        for tensor in (*inputs, *model.parameters()):
            tensor.grad = None
        torch.autograd.backward(model(*inputs), upstream)

    return run


def use_loop(run: Callable[[], None]) -> Callable[[], None]:
    """The same step with the loop over experts in place of the fused compute."""
    import moelora.layer
    import moelora.ops as ops

    def looped() -> None:
        fused = moelora.layer.mixture_linear

        def loop(base_layer, x, pools, weights):
            delta = ops.mixture(x.to(pools[0].lora_A.dtype), pools, weights, backend="reference")
            return base_layer(x) + delta

        moelora.layer.mixture_linear = loop
        try:
            run()
        finally:
            moelora.layer.mixture_linear = fused

    return looped


def measure(make_block: Callable[[], nn.Module], widths: list[int], outs: list[int], args: argparse.Namespace) -> dict:
    """Seconds and peak extra bytes of every arm."""
    dtype = getattr(torch, args.dtype)
    inputs = [torch.randn(1, args.tokens, w, device=args.device, dtype=dtype, requires_grad=True) for w in widths]
    upstream = [torch.randn(1, args.tokens, o, device=args.device, dtype=dtype) for o in outs]
    arms: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    for arm in args.arms:
        model = build("ours" if arm == "loop" else arm, make_block(), widths[0], args)
        arms[arm] = step(model, inputs, upstream)
        if arm == "loop":
            arms[arm] = use_loop(arms[arm])
        if args.device == "cuda":
            arms[arm]()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = model(*inputs)
            memory[arm] = torch.cuda.memory_allocated() - before
            del outputs
    times = interleaved(arms, args.device, args.repeats, args.min_time)
    return {"times": times, "memory": memory}


def report(title: str, result: dict) -> None:
    """One table row per arm."""
    times, memory = result["times"], result["memory"]
    print(f"\n{title}\n| arm | ms | x frozen | x lora | kept MiB over frozen |\n|---|---|---|---|---|")
    for arm, seconds in times.items():
        to_frozen, spread = ratio(times, arm, "frozen")
        to_lora = f"{ratio(times, arm, 'lora')[0]:.3f}" if "lora" in times else ""
        extra = f"{(memory[arm] - memory['frozen']) / 2**20:.0f}" if memory else ""
        milliseconds = sorted(seconds)[len(seconds) // 2] * 1e3
        print(f"| {arm} | {milliseconds:.3f} | {to_frozen:.3f} ± {spread:.3f} | {to_lora} | {extra} |")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--kv", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-time", type=float, default=0.1)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    args = parser.parse_args()
    print(environment(args.device))
    settings = f"T={args.tokens} E={args.experts} r={args.rank} k={args.top_k} {args.dtype}"
    hidden, wide, kv = args.hidden, args.intermediate, args.kv
    block_widths, block_outs = [hidden, hidden, hidden, wide], [hidden, kv, kv, hidden, wide, wide, hidden]
    result = measure(lambda: Block(hidden, wide, kv), block_widths, block_outs, args)
    report(f"Block of seven linears, {settings}", result)
    for width_in, width_out in ((hidden, hidden), (hidden, wide), (wide, hidden), (hidden, kv)):
        make = lambda i=width_in, o=width_out: OneLinear(i, o)  # noqa: E731
        report(f"{width_in} -> {width_out}, {settings}", measure(make, [width_in], [width_out], args))


if __name__ == "__main__":
    main()
