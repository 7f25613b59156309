"""Run by test_equality.py on three processes: each compares its part with what one process decides for all tokens."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from moelora.ranks import fits_over_ranks
from moelora.routing import top_k_mask, within_capacity

COUNTS = [(5, 8, 3), (1, 63, 0), (7, 7, 7)]  # tokens by rank
FACTORS = [0.1, 0.5, 1.0, 1.25, 100.0]
EXPERTS, TOP_K = 7, 2


def probabilities(num_tokens: int, ties: bool, generator: torch.Generator) -> torch.Tensor:
    logits = torch.randn(num_tokens, EXPERTS, generator=generator) * 3
    if ties:
        logits = logits.round()  # rows and experts that are equal to the last bit
    return logits.softmax(-1)


def check(counts: tuple[int, ...], factor: float, ties: bool, padded: bool, generator: torch.Generator) -> None:
    probs = probabilities(sum(counts), ties, generator)
    selected = top_k_mask(probs, TOP_K)
    mask = torch.rand(len(probs), generator=generator) > 0.3 if padded else None
    expected = within_capacity(probs, selected, mask, factor, TOP_K)
    mine = slice(sum(counts[: dist.get_rank()]), sum(counts[: dist.get_rank() + 1]))
    local_mask = None if mask is None else mask[mine]
    actual = within_capacity(probs[mine], selected[mine], local_mask, factor, TOP_K, over_ranks=True)
    assert torch.equal(actual, expected[mine]), (counts, factor, ties, padded)
    if factor == 0.5 and not padded:
        assert expected.sum() < selected.sum(), "nothing was dropped"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    for counts in COUNTS:
        for factor in FACTORS:
            for ties in (False, True):
                for padded in (False, True):
                    check(counts, factor, ties, padded, generator)
    certain = torch.tensor([[1.0, 1.0, 0.0]])  # the largest and the smallest probability there are, on every rank
    for factor, kept in ((1.0, 1), (2.0, 2), (3.0, 3)):
        expected = [dist.get_rank() < kept, dist.get_rank() < kept, dist.get_rank() < kept]
        assert fits_over_ranks(certain.t(), factor / 3.0)[:, 0].tolist() == expected, factor
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
