"""LoRA by slot: the Triton form against the readable one."""

import pytest
import torch
from helpers import every_pair

from moelora.ops.slot_lora import TokensBySlot, add_slot_lora_reference

DTYPES = [torch.bfloat16, torch.float16]
SLOTS, NONE = 5, -1
MIXED = (0, 1, NONE, 2, 3, 4, NONE, 0)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What a kernel forgets to write is NaN (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def factors(outs, rank, width, device="cpu", dtype=torch.bfloat16):
    """Of every slice."""

    def random(*shape):
        return (torch.randn(SLOTS, 1, *shape) / shape[-1] ** 0.5).to(device, dtype)

    return [random(rank, width) for _ in outs], [random(out, rank) for out in outs]


def batch(tokens, outs, width, device="cpu", dtype=torch.bfloat16, slots=MIXED):
    """y, x and the slots of tokens that follow each other."""
    slot_T = torch.tensor(slots, dtype=torch.int32).repeat(tokens // len(slots) + 1)[:tokens]
    y, x = torch.randn(tokens, sum(outs)), torch.randn(tokens, width)
    return y.to(device, dtype), x.to(device, dtype), slot_T.to(device)


def gate_of(kind, tokens, rank, slices, device="cpu"):
    shape = {"none": None, "shared": (tokens, rank), "by slice": (slices, tokens, rank)}[kind]
    return None if shape is None else torch.rand(shape, device=device)


def assert_same(y, x, a, b, slot_T, gate=None, order=None, **options):
    from moelora.ops.triton.slot_lora import add_slot_lora

    expected = y.clone()
    add_slot_lora_reference(expected, x, a, b, slot_T, gate)
    before = y.clone()
    add_slot_lora(y, x, a, b, order or TokensBySlot.of(slot_T, SLOTS), gate, **options)
    close = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[y.dtype]  # a shrunk activation may be rounded the other way
    torch.testing.assert_close(y, expected, rtol=close, atol=close)
    untouched = (slot_T < 0) | (slot_T >= SLOTS)
    assert torch.equal(y[untouched], before[untouched])
    assert not torch.equal(expected, before) or untouched.all()


class TestReference:
    def test_is_the_product_of_each_slots_factors(self):
        a, b = factors([6, 3], 4, 8, dtype=torch.float32)
        y, x, slot_T = batch(9, [6, 3], 8, dtype=torch.float32)
        gate, expected = torch.rand(2, 9, 4), y.clone()
        for t, slot in enumerate(slot_T.tolist()):
            if slot != NONE:
                parts = [b[i][slot, 0] @ (gate[i, t] * (a[i][slot, 0] @ x[t])) for i in range(2)]
                expected[t] += torch.cat(parts)
        add_slot_lora_reference(y, x, a, b, slot_T, gate)
        torch.testing.assert_close(y, expected)

    def test_tokens_are_sorted_by_slot(self):
        order = TokensBySlot.of(torch.tensor([2, NONE, 0, 2]), 3)
        assert order.slots.tolist() == [-1, 0, 1, 2] and order.counts.tolist() == [1, 1, 0, 2]
        assert order.starts.tolist() == [0, 1, 2, 2] and order.tokens.tolist() == [1, 2, 0, 3]


class TestKernels:
    @every_pair(
        dtype=DTYPES,
        tokens=[1, 5, 16, 17, 70],
        width=[16, 72, 600],
        outs=[(40,), (64, 64), (130, 24, 24)],
        rank=[8, 16, 64, 128],
        gate=["none", "shared", "by slice"],
        slots=[(0,), (4,), (NONE,), MIXED],
    )
    def test_batches(self, kernel_device, dtype, tokens, width, outs, rank, gate, slots):
        a, b = factors(outs, rank, width, kernel_device, dtype)
        y, x, slot_T = batch(tokens, outs, width, kernel_device, dtype, slots)
        assert_same(y, x, a, b, slot_T, gate_of(gate, tokens, rank, len(outs), kernel_device))

    @pytest.mark.parametrize("tokens", [1, 9, 70])
    def test_rows_may_lie_apart(self, kernel_device, tokens):
        a, b = factors([24], 8, 32, kernel_device)
        y, x, slot_T = batch(tokens, [48], 80, kernel_device)
        gate = torch.rand(tokens, 20, device=kernel_device)[:, 3:11]
        right = y[:, 24:].clone()
        assert_same(y[:, :24], x[:, 16:48], a, b, slot_T, gate)
        assert torch.equal(y[:, 24:], right)

    def test_groups_may_come_in_any_order_and_tokens_be_none(self, kernel_device):
        """Slots and rows that do not exist, and what an earlier batch left, as in vLLM's padded buffers."""
        a, b = factors([24], 8, 32, kernel_device)
        y, x, _ = batch(6, [24], 32, kernel_device)
        slot_T = torch.tensor([3, 1, NONE, 3, NONE, NONE], device=kernel_device)
        parts = ([3, 99, -1, 1, -1, 5], [3, 2, 1, 2, 0, 1], [0, 3, 5, 6, 0, 2, 7], [0, 3, 77, 4, 5, 2, 1, 2**30, -3])
        order = TokensBySlot(*(torch.tensor(part, dtype=torch.int32, device=kernel_device) for part in parts))
        assert_same(y, x, a, b, slot_T, order=order)

    def test_a_token_of_nan_spoils_no_other(self, kernel_device):
        a, b = factors([24], 8, 32, kernel_device)
        y, x, slot_T = batch(9, [24], 32, kernel_device, slots=(0, NONE))
        x[slot_T == NONE] = float("nan")
        assert_same(y, x, a, b, slot_T)

    def test_results_repeat_bit_for_bit(self, kernel_device):
        from moelora.ops.triton.slot_lora import add_slot_lora

        a, b = factors([24], 8, 600, kernel_device)
        y, x, slot_T = batch(9, [24], 600, kernel_device)
        again = y.clone()
        for result in (y, again):
            add_slot_lora(result, x, a, b, TokensBySlot.of(slot_T, SLOTS))
        assert torch.equal(y, again)

    def test_no_tokens(self, kernel_device):
        from moelora.ops.triton.slot_lora import add_slot_lora

        a, b = factors([24], 8, 32, kernel_device)
        y, x, slot_T = batch(0, [24], 32, kernel_device)
        add_slot_lora(y, x, a, b, TokensBySlot.of(slot_T, SLOTS))
        assert y.shape == (0, 24)

    @pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 65, 256, 8192])
    @pytest.mark.parametrize("width", [40, 4096, 14336])
    @pytest.mark.parametrize("rank", [8, 64, 512])
    def test_every_tiling_covers_all_columns(self, tokens, width, rank):
        pytest.importorskip("triton")
        from moelora.ops.triton.slot_lora import cuts, tiling_of

        tiling = tiling_of(tokens, rank, width, [width, 64, 64])
        block, span, splits = cuts(tiling, width)
        assert span % block == 0 and splits * span >= width > (splits - 1) * span and splits <= tiling.splits

    @pytest.mark.parametrize("tokens", [1, 2, 16])
    def test_blocks_suffice_however_tokens_are_spread(self, tokens):
        pytest.importorskip("triton")
        from moelora.ops.triton.slot_lora import blocks_of

        for counts in torch.randint(0, 40, (200, SLOTS)).tolist():
            needed = sum(-(-count // tokens) for count in counts)
            assert needed <= blocks_of(sum(counts), SLOTS, tokens)

    @pytest.mark.parametrize("change", ["float32", "mixed", "wide", "four", "transposed"])
    def test_what_the_kernels_do_not_take_is_refused(self, kernel_device, change):
        from moelora.ops.triton.slot_lora import add_slot_lora

        outs = [8] * 4 if change == "four" else [8]
        a, b = factors(outs, 8, 32, kernel_device)
        y, x, slot_T = batch(4, outs, 40 if change == "wide" else 32, kernel_device)
        if change in ("float32", "mixed"):
            x = x.float()
        if change == "float32":
            y, a, b = y.float(), [a[0].float()], [b[0].float()]
        if change == "transposed":
            x = x.t().contiguous().t()
        with pytest.raises(ValueError, match="these kernels take y, x, a and b as documented"):
            add_slot_lora(y, x, a, b, TokensBySlot.of(slot_T, SLOTS))

    def test_a_gate_of_another_rank_is_refused(self, kernel_device):
        from moelora.ops.triton.slot_lora import add_slot_lora

        a, b = factors([8], 8, 32, kernel_device)
        y, x, slot_T = batch(4, [8], 32, kernel_device)
        with pytest.raises(ValueError, match=r"gate has shape \[4, 9\], but must have \[4, 8\] or \[1, 4, 8\]"):
            add_slot_lora(y, x, a, b, TokensBySlot.of(slot_T, SLOTS), torch.rand(4, 9))


@pytest.mark.gpu
@needs_gpu
class TestGPU:
    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 2, 16, 17, 64, 65, 256, 600, 3000])
    @pytest.mark.parametrize(("outs", "rank"), [((1024, 128, 128), 64), ((1000,), 16), ((500, 500), 128)])
    def test_every_tiling(self, outs, rank, tokens, dtype, overlap):
        a, b = factors(outs, rank, 1000, "cuda", dtype)
        y, x, slot_T = batch(tokens, outs, 1000, "cuda", dtype)
        assert_same(y, x, a, b, slot_T, torch.rand(tokens, rank, device="cuda"), overlap=overlap)

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("tokens", [1, 8, 64, 600])
    def test_a_captured_graph_follows_factors_slots_and_gate(self, tokens, overlap):
        from moelora.ops.triton.slot_lora import add_slot_lora

        a, b = factors((128, 64), 16, 256, "cuda")
        y, x, slot_T = batch(tokens, (128, 64), 256, "cuda", slots=(NONE,))
        gate, order = torch.rand(tokens, 16, device="cuda"), TokensBySlot.of(slot_T, SLOTS)
        add_slot_lora(y, x, a, b, order, gate, overlap)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            add_slot_lora(y, x, a, b, order, gate, overlap)

        def move_to(slots):
            slot_T.copy_(batch(tokens, (1,), 1, slots=slots)[2])
            for static, new in zip(vars(order).values(), vars(TokensBySlot.of(slot_T, SLOTS)).values(), strict=True):
                static.copy_(new)

        for change in (
            lambda: None,
            lambda: move_to(MIXED),
            lambda: (a[0].normal_(std=0.1), b[1].normal_(std=0.1)),
            lambda: (x.normal_(), gate.uniform_(), move_to((4,))),
        ):
            change()
            expected = y.clone()
            add_slot_lora_reference(expected, x, a, b, slot_T, gate)
            graph.replay()
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)

    def test_the_host_never_waits(self):
        from moelora.ops.triton.slot_lora import add_slot_lora

        a, b = factors((64,), 16, 128, "cuda")
        y, x, slot_T = batch(9, (64,), 128, "cuda")
        order = TokensBySlot.of(slot_T, SLOTS)
        torch.cuda.set_sync_debug_mode("error")
        try:
            add_slot_lora(y, x, a, b, order)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert y.isfinite().all()
