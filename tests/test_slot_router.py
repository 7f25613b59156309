"""Routing of slots: the readable form against `routing`, the Triton form against the readable one."""

import pytest
import torch
from helpers import every_pair

from moelora.ops.slot_tables import SlotTables, route_slots_reference
from moelora.routing.decision import route
from moelora.routing.scorers import Router, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS, SLOTS, ROWS, WIDTH, MAX_RANK = 2, 5, 20, 72, 40
NONE, STALE = -1, 7
CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # sums of float32 in another order

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What a kernel forgets to write is NaN (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tables_of(device="cpu", rows=ROWS, width=WIDTH, max_rank=MAX_RANK):
    """No mixture has been loaded; what an evicted one left would be NaN."""
    tables = SlotTables.empty(BLOCKS, SLOTS, rows, width, max_rank, device)
    for table in (tables.first, tables.second, tables.outside):
        table.fill_(float("nan"))
    return tables


def fill(tables, slot, experts, hidden_units=None, *, maturity=None, **options):
    """A random mixture in a slot; its settings may be named, all else is as in training's defaults."""
    blocks, width = tables.first.shape[0], tables.hidden_size
    rows = hidden_units or experts
    tables.set(
        slot,
        first_LNH=torch.randn(blocks, rows, width) * 2 / width**0.5,
        second_LEN=hidden_units and torch.randn(blocks, experts, hidden_units),
        maturity_LE=None if maturity is None else maturity(blocks, experts),
        **{"rank": 2, "top_k": 2} | options,
    )


def fill_all(tables):
    """Slot 3 holds no mixture."""
    fill(tables, 0, 5, scale=1.5, maturity=torch.rand)
    fill(tables, 1, 7, hidden_units=18, rank=4, top_k=3, temperature=0.7)
    fill(tables, 2, 20, top_k=20)
    fill(tables, 4, 1, top_k=1, rank=8)


def batch(tokens, device="cpu", dtype=torch.float32, width=WIDTH, slots=(0, 1, NONE, 2, 3, 4, STALE, 0)):
    """Hidden states of tokens whose slots follow each other."""
    slot_T = torch.tensor(slots).repeat(tokens // len(slots) + 1)[:tokens]
    return torch.randn(tokens, width).to(device, dtype), slot_T.to(device)


def both(hidden, tables, slot_T, block=1, residual=None):
    """The gates of the kernels and of the reference."""
    from moelora.ops.triton.slot_router import route_slots

    gates = []
    for form in (route_slots, route_slots_reference):
        gates.append(torch.full((len(hidden), tables.max_rank), float("nan"), device=hidden.device))
        form(hidden, tables, block, slot_T, gates[-1], residual)
    return gates


def assert_same(*args, **options):
    actual, expected = both(*args, **options)
    torch.testing.assert_close(actual, expected, **CLOSE)
    return expected


class TestReference:
    @pytest.mark.parametrize("units", [None, 6])
    @pytest.mark.parametrize("top_k", [1, 3, 5])
    @pytest.mark.parametrize("maturity", [None, torch.zeros, torch.rand], ids=["mature", "new", "partial"])
    def test_equals_routing(self, units, top_k, maturity):
        routers = [Router(WIDTH, 5, units) for _ in range(BLOCKS)]
        maturity_LE = maturity and maturity(BLOCKS, 5)
        tables = tables_of()
        tables.set(
            3,
            first_LNH=torch.stack([router.first_weight for router in routers]).detach(),
            second_LEN=units and torch.stack([router.weight for router in routers]).detach(),
            maturity_LE=maturity_LE,
            rank=4,
            top_k=top_k,
            temperature=0.3,
            scale=1.5,
        )
        hidden, gate = torch.randn(9, WIDTH) * 5, torch.empty(9, MAX_RANK)
        for block, router in enumerate(routers):
            route_slots_reference(hidden, tables, block, torch.full((9,), 3), gate)
            logits = router(rms_norm(hidden))
            maturity_E = None if maturity_LE is None else maturity_LE[block]
            weights = route(logits, top_k=top_k, temperature=0.3, maturity_E=maturity_E).weights * 1.5
            torch.testing.assert_close(gate[:, :20], weights.repeat_interleave(4, dim=1))
            assert gate[:, 20:].eq(0).all()

    def test_two_adapters_are_one_block_diagonal_router(self):
        routers = [Router(WIDTH, experts, units) for experts, units in ((2, 6), (3, 4))]
        tables = tables_of()
        first = torch.cat([router.first_weight for router in routers]).detach()
        second = torch.block_diag(*(router.weight for router in routers)).detach()
        tables.set(0, first_LNH=first.expand(2, -1, -1), second_LEN=second.expand(2, -1, -1), rank=1, top_k=2)
        hidden, gate = torch.randn(9, WIDTH), torch.empty(9, MAX_RANK)
        route_slots_reference(hidden, tables, 0, torch.zeros(9, dtype=torch.int64), gate)
        logits = torch.cat([router(rms_norm(hidden)) for router in routers], dim=1)
        torch.testing.assert_close(gate[:, :5], route(logits, top_k=2).weights)

    def test_other_tokens_get_ones(self):
        tables = tables_of()
        fill(tables, 0, 5)
        slot_T, gate = torch.tensor([0, NONE, STALE, 3, 2**31 - 1, -(2**31)]), torch.empty(6, MAX_RANK)
        route_slots_reference(torch.randn(6, WIDTH), tables, 0, slot_T, gate)
        assert gate[0].sum() == pytest.approx(2) and gate[1:].eq(1).all()

    def test_of_equal_experts_the_first_are_taken(self):
        tables = tables_of()  # zeros: some processors sum up the products of equal rows in another order
        tables.set(0, first_LNH=torch.zeros(BLOCKS, 5, WIDTH), rank=1, top_k=2)
        gate = torch.empty(1, MAX_RANK)
        route_slots_reference(torch.randn(1, WIDTH), tables, 0, torch.tensor([0]), gate)
        assert gate[0, :5].tolist() == [0.5, 0.5, 0, 0, 0]

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_a_sum_is_rounded_as_in_the_model(self, dtype):
        tables = tables_of()
        fill(tables, 0, 5, top_k=5)
        hidden, slot_T = batch(9, dtype=dtype, slots=(0,))
        residual = torch.randn(9, WIDTH).to(dtype)
        summed, given = torch.empty(9, MAX_RANK), torch.empty(9, MAX_RANK)
        route_slots_reference(hidden, tables, 0, slot_T, summed, residual)
        route_slots_reference(hidden + residual, tables, 0, slot_T, given)
        assert torch.equal(summed, given)


class TestTables:
    def test_a_slot_can_be_cleared_and_used_again(self):
        tables, slot_T, hidden = tables_of(), torch.tensor([1]), torch.randn(1, WIDTH)
        places = [table.data_ptr() for table in vars(tables).values() if isinstance(table, torch.Tensor)]
        gate = torch.empty(1, MAX_RANK)
        fill(tables, 1, 7, hidden_units=18, maturity=torch.rand)
        tables.clear(1)
        route_slots_reference(hidden, tables, 0, slot_T, gate)
        assert gate.eq(1).all()
        torch.manual_seed(3)
        fill(tables, 1, 5)
        route_slots_reference(hidden, tables, 0, slot_T, gate)
        fresh, expected = tables_of(), torch.empty(1, MAX_RANK)
        torch.manual_seed(3)
        fill(fresh, 1, 5)
        route_slots_reference(hidden, fresh, 0, slot_T, expected)
        assert torch.equal(gate, expected)
        assert places == [table.data_ptr() for table in vars(tables).values() if isinstance(table, torch.Tensor)]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"slot": 5}, "slot 5 is none of the 5 slots 0 to 4"),
            ({"slot": -1}, "slot -1 is none"),
            ({"first_LNH": torch.ones(2, 21, 72)}, "21 experts, but the tables have room for 1 to 20"),
            ({"second_LEN": torch.ones(2, 2, 4)}, r"second_LEN has shape \[2, 2, 4\], but must have \[2, 2, 3\]"),
            (
                {"first_LNH": torch.ones(2, 21, 72), "second_LEN": torch.ones(2, 2, 21)},
                "21 hidden units, but the tables have room for 1 to 20",
            ),
            ({"first_LNH": torch.ones(3, 3, 72)}, r"first_LNH has shape \[3, 3, 72\], but must have \[2, 3, 72\]"),
            ({"first_LNH": torch.ones(2, 3, 70)}, r"first_LNH has shape \[2, 3, 70\], but must have \[2, 3, 72\]"),
            ({"maturity_LE": torch.ones(2, 2)}, r"maturity_LE has shape \[2, 2\], but must have \[2, 3\]"),
            ({"rank": 14}, "3 experts of rank 14 need a rank of 42, but the greatest that is served is 40"),
            ({"rank": 0}, "3 experts of rank 0"),
            ({"top_k": 0}, "top_k is 0, but must be at least 1"),
            ({"temperature": 0.0}, r"temperature is 0\.0, but must be positive"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, change, message):
        tables = tables_of()
        fill(tables, 2, 4)
        before = [table.clone() for table in vars(tables).values() if isinstance(table, torch.Tensor)]
        options = {"slot": 2, "first_LNH": torch.ones(2, 3, 72), "rank": 2, "top_k": 2} | change
        with pytest.raises(ValueError, match=message):
            tables.set(**options)
        after = [table for table in vars(tables).values() if isinstance(table, torch.Tensor)]
        assert all(map(torch.Tensor.equal, map(torch.nan_to_num, before), map(torch.nan_to_num, after)))

    def test_more_than_all_experts_are_all(self):
        tables = tables_of()
        fill(tables, 0, 3, top_k=9)
        assert tables.top_k[0] == 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_TH": torch.ones(4, 70)}, r"hidden_TH has shape \[4, 70\], but these tables take \[4, 72\]"),
            ({"slot_T": torch.ones(5)}, r"slot_T has shape \[5\], but these tables take \[4\]"),
            ({"gate_TR": torch.ones(4, 39)}, r"gate_TR has shape \[4, 39\]"),
            ({"gate_TR": torch.ones(4, 40).half()}, r"gate_TR is torch\.float16, but must be torch\.float32"),
            ({"residual_TH": torch.ones(4, 70)}, r"residual_TH has shape \[4, 70\]"),
            ({"residual_TH": torch.ones(4, 72).half()}, r"residual_TH is torch\.float16, but hidden_TH is"),
        ],
    )
    def test_a_batch_that_does_not_fit_is_refused(self, change, message):
        given = {"hidden_TH": torch.ones(4, 72), "slot_T": torch.ones(4), "gate_TR": torch.ones(4, 40)} | change
        with pytest.raises(ValueError, match=message):
            route_slots_reference(tables=tables_of(), block=0, **given)


class TestKernels:
    @every_pair(
        dtype=DTYPES,
        tokens=[1, 9, 70],
        width=[16, 72, 300],
        slots=[(0,), (1,), (2,), (NONE,), (3, STALE), (0, 1, NONE, 2, 3, 4, STALE, 0)],
        slot_dtype=[torch.int32, torch.int64],
    )
    def test_batches(self, kernel_device, dtype, tokens, width, slots, slot_dtype):
        tables = tables_of(kernel_device, width=width)
        fill_all(tables)
        hidden, slot_T = batch(tokens, kernel_device, dtype, width, slots)
        assert_same(hidden, tables, slot_T.to(slot_dtype))

    @every_pair(
        dtype=DTYPES,
        tokens=[3, 66],
        size=[(1, None), (8, None), (16, None), (17, None), (64, None), (3, 64), (64, 33), (17, 5)],
        top_k=[1, 4, 64],
        maturity=[None, torch.zeros, torch.rand],
        temperature=[1.0, 0.4],
    )
    def test_mixtures(self, kernel_device, dtype, tokens, size, top_k, maturity, temperature):
        tables = tables_of(kernel_device, rows=64, max_rank=128)
        fill(tables, 4, *size, top_k=top_k, maturity=maturity, temperature=temperature, scale=2.0)
        hidden, slot_T = batch(tokens, kernel_device, dtype, slots=(4, NONE))
        gate = assert_same(hidden, tables, slot_T)
        torch.testing.assert_close(gate[::2].sum(dim=1), torch.full_like(gate[::2, 0], 4.0))  # scale 2, rank 2

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_tokens_share_larger_tiles(self, kernel_device, dtype, monkeypatch):
        """As from 1025 on."""
        from moelora.ops.triton import slot_router

        monkeypatch.setattr(slot_router, "score_tiling", lambda T, dtype: slot_router.Tiling(64, 32, 4, 2, splits=2))
        tables = tables_of(kernel_device)
        fill_all(tables)
        hidden, slot_T = batch(70, kernel_device, dtype)
        assert_same(hidden, tables, slot_T)

    @pytest.mark.parametrize("tokens", [1, 17, 65, 257, 1025])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_tiling_covers_all_columns(self, dtype, tokens):
        pytest.importorskip("triton")
        from moelora.ops.triton.slot_router import cuts

        tiling, width, span, splits = cuts(tokens, 300, dtype)
        assert span % width == 0 and splits * span >= 300 > (splits - 1) * span and splits <= tiling.splits

    @pytest.mark.parametrize("tokens", [3, 70])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_residual_is_added(self, kernel_device, dtype, tokens):
        tables = tables_of(kernel_device)
        fill_all(tables)
        hidden, slot_T = batch(tokens, kernel_device, dtype)
        wide = torch.randn(tokens, 2 * WIDTH).to(kernel_device, dtype)
        assert_same(hidden, tables, slot_T, residual=wide[:, WIDTH:])

    def test_strides(self, kernel_device):
        from moelora.ops.triton.slot_router import route_slots

        tables = tables_of(kernel_device)
        fill_all(tables)
        hidden, slot_T = batch(18, kernel_device, width=2 * WIDTH)
        for view in (hidden[:, WIDTH:], hidden[:, ::2]):
            assert_same(view, tables, slot_T)
        gates = torch.full((9, 2 * MAX_RANK), float("nan"), device=kernel_device)
        route_slots(hidden[::2, :WIDTH], tables, 1, slot_T[::2], gates[:, :MAX_RANK])
        expected = torch.empty(9, MAX_RANK, device=kernel_device)
        route_slots_reference(hidden[::2, :WIDTH], tables, 1, slot_T[::2], expected)
        torch.testing.assert_close(gates[:, :MAX_RANK], expected, **CLOSE)
        assert gates[:, MAX_RANK:].isnan().all()

    def test_garbage_for_slots(self, kernel_device):
        tables = tables_of(kernel_device)
        fill_all(tables)
        hidden, slot_T = batch(9, kernel_device)
        slot_T[2:] = torch.tensor([5, 2**32, 2**32 + 1, -(2**32), 2**62, -(2**62), 2**31], device=kernel_device)
        assert assert_same(hidden, tables, slot_T)[2:].eq(1).all()

    @pytest.mark.parametrize("tokens", [5, 70])
    def test_ties_and_zero_hidden_states(self, kernel_device, tokens):
        tables = tables_of(kernel_device)
        tables.set(0, first_LNH=torch.ones(BLOCKS, 5, WIDTH), rank=1, top_k=2)
        gate, _ = both(
            torch.zeros(tokens, WIDTH, device=kernel_device), tables, *batch(tokens, kernel_device, slots=(0,))[1:]
        )
        assert gate[:, :5].cpu().eq(torch.tensor([0.5, 0.5, 0, 0, 0])).all()

    def test_a_row_of_nan_spoils_no_other(self, kernel_device):
        tables = tables_of(kernel_device)
        fill_all(tables)
        hidden, slot_T = batch(70, kernel_device)
        _, clean = both(hidden, tables, slot_T)
        hidden[::8] = float("nan")
        spoilt, _ = both(hidden, tables, slot_T)
        others = torch.arange(70) % 8 > 0
        torch.testing.assert_close(spoilt[others], clean[others], **CLOSE)

    def test_no_tokens(self, kernel_device):
        hidden, slot_T = batch(0, kernel_device)
        assert assert_same(hidden, tables_of(kernel_device), slot_T).shape == (0, MAX_RANK)

    @pytest.mark.parametrize(
        ("hidden_dtype", "gate", "message"),
        [
            (torch.float64, torch.empty(2, MAX_RANK), r"hidden_TH is torch\.float64, but must be bfloat16, float16 or"),
            (torch.float32, torch.empty(MAX_RANK, 2).t(), "gate_TR has stride 2 between columns, but must have 1"),
        ],
    )
    def test_what_the_kernels_do_not_take_is_refused(self, kernel_device, hidden_dtype, gate, message):
        from moelora.ops.triton.slot_router import route_slots

        with pytest.raises(ValueError, match=message):
            route_slots(torch.ones(2, WIDTH, dtype=hidden_dtype), tables_of(), 0, torch.zeros(2), gate)


@pytest.mark.gpu
@needs_gpu
class TestGPU:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 256, 257, 1024, 1025, 3000])
    def test_every_tiling(self, dtype, tokens):
        tables = tables_of("cuda", rows=64, width=1000, max_rank=128)
        fill_all(tables)
        fill(tables, 3, 9, hidden_units=64)
        hidden, slot_T = batch(tokens, "cuda", dtype, 1000)
        actual, expected = both(hidden, tables, slot_T)
        differs = (actual - expected).abs().amax(dim=1) > 1e-4
        assert differs.sum() <= tokens // 1000  # where two experts are nearly equal, either may be taken

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("tokens", [8, 128, 1100])
    def test_a_captured_graph_follows_tables_and_slots(self, dtype, tokens):
        from moelora.ops.triton.slot_router import route_slots

        tables = tables_of("cuda")
        hidden, slot_T = batch(tokens, "cuda", dtype, slots=(NONE,))
        residual, gate = torch.randn_like(hidden), torch.empty(tokens, MAX_RANK, device="cuda")
        route_slots(hidden, tables, 1, slot_T, gate, residual)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            route_slots(hidden, tables, 1, slot_T, gate, residual)
        expected = torch.empty_like(gate)
        changes = [
            lambda: None,
            lambda: fill_all(tables),
            lambda: slot_T.copy_(batch(tokens)[1]),
            lambda: (tables.clear(0), fill(tables, 1, 3, top_k=1)),
            lambda: (hidden.normal_(), residual.normal_(), slot_T.copy_(slot_T.flip(0))),
        ]
        for change in changes:
            change()
            graph.replay()
            route_slots_reference(hidden, tables, 1, slot_T, expected, residual)
            torch.testing.assert_close(gate, expected, **CLOSE)
        assert gate.ne(1).any()

    @pytest.mark.parametrize("tokens", [8, 1100])
    def test_the_host_never_waits(self, tokens):
        from moelora.ops.triton.slot_router import route_slots

        tables = tables_of("cuda")
        fill_all(tables)
        hidden, slot_T = batch(tokens, "cuda")
        gate = torch.empty(tokens, MAX_RANK, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            route_slots(hidden, tables, 0, slot_T, gate)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert gate.isfinite().all()
