"""Before any timing: the fast path against the loop over experts, on the device that is about to be timed."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

import moelora.tuner.native
from moelora import ops
from moelora.ops.native import native_experts_reference

from .arms import Mixture, adapt, with_loop
from .grouped import grouped_linear, make_plan
from .layer import Block, Stack
from .native import NativeBlock
from .options import make_parser

MODULE = "benchmarks.correctness"
MIXTURE = Mixture(experts=7, rank=8, top_k=2)
TOKENS = 63
# Of the norm of each tensor. Routers work in float32 whatever the model's dtype is.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2}


class CorrectnessError(RuntimeError):
    """The fast path computes something else than the reference."""


def check_correctness(device: str) -> None:
    """Compare outputs and all gradients in every dtype.

    Raises:
        CorrectnessError: a tensor differs; the message names it.
    """
    for dtype, tolerance in TOLERANCES.items():
        _compare("moelora", *_block_results(device, dtype), device, dtype, tolerance)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # what the grouped product takes there
    _compare("grouped", *_grouped_results(device, dtype), device, dtype, TOLERANCES[dtype])
    for dtype, tolerance in TOLERANCES.items():
        _compare("native", *_native_results(device, dtype), device, dtype, tolerance)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
    print(f"correctness checked on {device}: outputs and all gradients equal the loop's in {dtypes}", flush=True)


def _compare(
    what: str, fast: dict[str, Tensor], loop: dict[str, Tensor], device: str, dtype: torch.dtype, tolerance: float
) -> None:
    if fast.keys() != loop.keys():
        raise CorrectnessError(
            f"{what} on {device} in {dtype}: gradients exist for {sorted(fast.keys() ^ loop.keys())} on one side"
        )
    for name, expected in loop.items():
        error = ((fast[name] - expected).double().norm() / expected.double().norm().clamp(min=1e-12)).item()
        if not error <= tolerance:
            raise CorrectnessError(
                f"{what} on {device} in {dtype}: {name} differs from the loop's by {error:.1e} of its norm, more than "
                f"{tolerance:.0e}; nothing was measured. Run the tests (make test) to see where"
            )


def _block_results(device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    with torch.device(device):
        base = Stack(Block(64, 160, 32), 64).to(dtype)
        sources = [torch.randn(1, TOKENS, width, dtype=dtype) for width in (64, 64, 64, 160)]
    model = adapt(base, "ours", MIXTURE).train()
    twin = copy.deepcopy(model)  # a forward changes what the next one routes
    return _results(model, sources), with_loop(lambda: _results(twin, sources))()


def _native_results(device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    with torch.device(device):
        base = Stack(NativeBlock(64, 32, num_experts=7, top_k=3), 64).to(dtype)
        nn.init.normal_(base.layers[0].mlp.experts.down_proj, std=0.5)
        sources = [torch.randn(1, TOKENS, 64, dtype=dtype)]
    model = adapt(base, "native", MIXTURE)
    fast = _results(model, sources)
    model.zero_grad()
    with mock.patch.object(moelora.tuner.native, "native_experts", native_experts_reference):
        return fast, _results(model, sources)


def _results(model: nn.Module, sources: list[Tensor]) -> dict[str, Tensor]:
    inputs = [source.clone().requires_grad_() for source in sources]
    outputs = model(*inputs)
    torch.autograd.backward(outputs, [torch.cos(output.detach()) for output in outputs])
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    results |= {f"gradient of input {i}": x.grad for i, x in enumerate(inputs)}
    parameters = model.named_parameters()
    return results | {f"gradient of {name}": p.grad for name, p in parameters if p.grad is not None}


def _grouped_results(device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    E, r, D, out = MIXTURE.experts, MIXTURE.rank, 64, 96
    kind = {"device": device, "dtype": dtype}
    base = nn.Linear(D, out, bias=False, **kind).requires_grad_(False)
    leaves = {"x": torch.randn(TOKENS, D, **kind), "A": torch.randn(E * r, D, **kind) * D**-0.5}
    leaves |= {"B": torch.randn(out, E * r, **kind), "weights": torch.rand(TOKENS, MIXTURE.top_k, **kind)}
    ids = torch.rand(TOKENS, E, device=device).topk(MIXTURE.top_k).indices

    def grouped(x: Tensor, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
        blocks_B = B.unflatten(1, (E, r)).permute(1, 0, 2).contiguous()
        return grouped_linear(base, x, A.unflatten(0, (E, r)), blocks_B, weights, make_plan(ids, E), scaling=2.0)

    def loop(x: Tensor, A: Tensor, B: Tensor, weights: Tensor) -> Tensor:
        dense = torch.zeros(TOKENS, E, **kind).scatter(1, ids, weights)
        pool = ops.ExpertPool(A, B, E, scaling=2.0, dropout=nn.Identity())
        return base(x) + ops.mixture(x, [pool], dense, backend="reference")

    return _leaf_results(grouped, leaves), _leaf_results(loop, leaves)


def _leaf_results(function: Callable[..., Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    mine = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    output = function(**mine)
    output.backward(torch.cos(output.detach()))
    return {"output": output.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in mine.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the check alone."""
    parser = make_parser(MODULE, __doc__, ("--device cuda", "--device cpu"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    args: argparse.Namespace = parser.parse_args(argv)
    check_correctness(args.device)


if __name__ == "__main__":
    main()
