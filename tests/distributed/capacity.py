"""Run by test_equality.py on three processes: each compares its part with what one process decides for all tokens.

The torch form, also compiled, the Triton router in its interpreter, and ranks that run the one and the other.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests
sys.path.insert(0, str(Path(__file__).parents[2]))

from moelora.ops.data_parallel import fits_over_ranks
from moelora.routing.decision import top_k_mask, within_capacity

COUNTS = [(5, 8, 3), (1, 63, 0), (7, 7, 7)]  # tokens by rank
FACTORS = [0.1, 0.5, 1.0, 1.25, 100.0]
IN_TRITON = [(0.1, True, False), (0.5, True, True), (1.0, False, True), (100.0, False, False)]  # factor, ties, padded
EXPERTS, TOP_K, SCALE = 7, 2, 1.5
HAS_TRITON = importlib.util.find_spec("triton") is not None


def probabilities(num_tokens: int, ties: bool, generator: torch.Generator) -> torch.Tensor:
    """[T, E]; with ties four kinds of tokens, over all ranks, whose probabilities are equal to the last bit."""
    rows = torch.randint(4, (num_tokens,), generator=generator) if ties else torch.arange(num_tokens)
    return (torch.randn(max(4, num_tokens), EXPERTS, generator=generator) * 3).softmax(-1)[rows]


def part(counts: tuple[int, ...]) -> slice:
    """Which of all tokens are this rank's."""
    return slice(sum(counts[: dist.get_rank()]), sum(counts[: dist.get_rank() + 1]))


def check(counts: tuple[int, ...], factor: float, ties: bool, padded: bool, generator: torch.Generator) -> None:
    probs = probabilities(sum(counts), ties, generator)
    selected = top_k_mask(probs, TOP_K)
    mask = torch.rand(len(probs), generator=generator) > 0.3 if padded else None
    expected = within_capacity(probs, selected, mask, factor, TOP_K)
    if factor == 0.5 and not padded:
        assert expected.sum() < selected.sum(), "nothing was dropped"
    mine, case = part(counts), (counts, factor, ties, padded)
    local = (probs[mine], selected[mine], None if mask is None else mask[mine], factor)
    actual = within_capacity(*local, TOP_K, over_ranks=True)
    assert torch.equal(actual, expected[mine]), case
    if HAS_TRITON and counts != COUNTS[-1] and (factor, ties, padded) in IN_TRITON:  # half a second each, interpreted
        maturity = torch.rand(EXPERTS, generator=generator) if ties else None
        check_triton(probs, selected, mask, maturity, factor, mine, selected & ~expected)
        if factor == 0.5:
            by_torch = dist.get_rank() == 1
            mixed = within_capacity(*local, TOP_K, over_ranks=True) if by_torch else kept_by_triton(*local)
            assert torch.equal(mixed, expected[mine]), f"ranks that run different forms: {case}"


def kept_by_triton(
    probs: torch.Tensor, selected: torch.Tensor, mask: torch.Tensor | None, factor: float
) -> torch.Tensor:
    return selected & (limited(probs, selected, mask, None, factor, over_ranks=True)[0] == 0)


def limited(
    probs: torch.Tensor,
    selected: torch.Tensor,
    mask: torch.Tensor | None,
    maturity: torch.Tensor | None,
    factor: float,
    over_ranks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the router's kernels drop [T, E], the weights they leave, and the sums: dropped, and mass by expert."""
    from moelora.ops.triton.router import Decision, _limit

    priority = torch.where(selected if mask is None else selected & mask[:, None], probs, -1.0).t().contiguous()
    mask_T = None if mask is None else mask.view(torch.uint8)
    decision = Decision(TOP_K, 1.0, SCALE, factor, maturity, mask_T, over_ranks)
    weights, sums = probs * SCALE, torch.full((4 * EXPERTS + 5,), torch.nan)
    dropped = _limit(priority, weights, sums, decision)
    return dropped, weights, sums[1 + 2 * EXPERTS : 2 + 3 * EXPERTS]


def check_triton(
    probs: torch.Tensor,
    selected: torch.Tensor,
    mask: torch.Tensor | None,
    maturity: torch.Tensor | None,
    factor: float,
    mine: slice,
    dropped: torch.Tensor,
) -> None:
    """Masks and weights equal to the last bit; the sums add up over ranks."""
    alone = limited(probs, selected, mask, maturity, factor, over_ranks=False)
    assert torch.equal(alone[0] != 0, dropped)
    local_mask = None if mask is None else mask[mine]
    shared = limited(probs[mine], selected[mine], local_mask, maturity, factor, over_ranks=True)
    assert torch.equal(shared[0], alone[0][mine]) and torch.equal(shared[1], alone[1][mine])
    dist.all_reduce(shared[2])
    torch.testing.assert_close(shared[2], alone[2], rtol=1e-6, atol=1e-6)  # float32 sums of up to 64 tokens


def check_router(counts: tuple[int, ...], generator: torch.Generator) -> None:
    """From hidden states on. Scores are products of 16 tokens, whose rounding may hang on a token's place among them;
    experts are half mature at least, so that what is dropped changes a weight by more than that."""
    from moelora.ops.triton.router import route_fused

    hidden = torch.randn(sum(counts), 20, generator=generator)
    weight = torch.randn(EXPERTS, 20, generator=generator, requires_grad=True)
    maturity = 0.5 + torch.rand(EXPERTS, generator=generator) / 2
    options = {"top_k": TOP_K, "capacity_factor": 0.5, "maturity_E": maturity}
    upstream = torch.randn(sum(counts), EXPERTS, generator=generator)
    mine, weights, gradients = part(counts), [], []
    for tokens, over_ranks in ((slice(None), False), (mine, True)):
        weights.append(route_fused(hidden[tokens], weight, over_ranks=over_ranks, **options)[0])
        gradients.append(torch.autograd.grad((weights[-1] * upstream[tokens]).sum(), weight)[0])
    torch.testing.assert_close(weights[1], weights[0][mine], rtol=1e-5, atol=1e-6)  # float32 sums of 20 terms
    dist.all_reduce(gradients[1])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)  # sums in another order


def check_compiled(counts: tuple[int, ...], generator: torch.Generator) -> None:
    """As torch.compile traces it, the sums over ranks in its graph."""
    probs, mine = probabilities(sum(counts), True, generator), part(counts)
    selected = top_k_mask(probs, TOP_K)
    compiled = torch.compile(within_capacity, fullgraph=True, backend="aot_eager")
    actual = compiled(probs[mine], selected[mine], None, 0.5, TOP_K, over_ranks=True)
    assert torch.equal(actual, within_capacity(probs, selected, None, 0.5, TOP_K)[mine])


def check_a_rank_that_has_given_its_capacity_up() -> None:
    """One whose process alone has generated in training mode: it drops nothing, and the others do not wait for it."""
    from helpers import ARCHITECTURES, mixture_of, train_step

    model = mixture_of("llama", expert_capacity_factor=0.5)
    if dist.get_rank() == 0:
        with warnings.catch_warnings(record=True) as caught:
            model.base_model.give_up_capacity("a test")
        assert "is off from here on: a test" in str(caught[0].message)
    train_step(model, ARCHITECTURES["llama"].batch(3, 7))
    dropped = sum(stats.dropped for stats in model.routing_stats().values())
    assert (dropped == 0) == (dist.get_rank() == 0), f"rank {dist.get_rank()}: {dropped}"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    for counts in COUNTS:
        for factor in FACTORS:
            for ties in (False, True):
                for padded in (False, True):
                    check(counts, factor, ties, padded, generator)
    if HAS_TRITON:
        check_router(COUNTS[1], generator)
    check_compiled(COUNTS[0], generator)
    check_a_rank_that_has_given_its_capacity_up()
    certain = torch.tensor([[1.0, 1.0, 0.0]])  # the largest and the smallest probability there are, on every rank
    for factor, kept in ((1.0, 1), (2.0, 2), (3.0, 3)):
        expected = [dist.get_rank() < kept, dist.get_rank() < kept, dist.get_rank() < kept]
        assert fits_over_ranks(certain.t(), factor / 3.0)[:, 0].tolist() == expected, factor
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
