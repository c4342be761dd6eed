"""The plan that the kernel writes is the plan's definition, bit for bit; the definition covers and balances."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mla.metadata import Limits, PagedBatch, Status
from portable_mla.metadata.split_plan.plan import PlanShape, SplitPlan
from portable_mla.metadata.split_plan.reference import Plan, plan_splits_reference

UNWRITTEN = -12345
PAGE_SIZE = 16
PAGES = 50
PARTS = (1, 3, 16, 66, 132, 300)
UNREAD_CELL = 2**31 - 1


@dataclass(frozen=True)
class PlanCase:
    """Lengths of a batch, which of its requests name a page that is not there, and what the plan is sized by."""

    kv_lens: list[int]
    query_lens: list[int]
    shape: PlanShape
    max_query_len: int
    faulty: list[bool]

    def defined(self) -> Plan:
        """The plan by its definition."""
        return plan_splits_reference(
            self.kv_lens, self.query_lens, self.shape, max_query_len=self.max_query_len, faulty_pages=self.faulty
        )

    @property
    def tiles(self) -> dict[tuple[int, int], int]:
        """Tiles of each unit that has some, by request and first query token of the unit."""
        shape, found = self.shape, {}
        for request, (kv_len, query_len) in enumerate(zip(self.kv_lens, self.query_lens, strict=True)):
            start = sum(self.query_lens[:request])
            for first in range(0, query_len, shape.block_q):
                seen = kv_len - max(query_len - first - shape.block_q, 0)
                if seen > 0:
                    found[request, start + first] = -(-seen // shape.block_n)
        return found

    def batch(self) -> PagedBatch:
        """The batch over a strided table whose unread cells are poison."""
        width = self.shape.max_context // PAGE_SIZE
        table = torch.full((len(self.kv_lens), width + 3), UNREAD_CELL, dtype=torch.int32)[:, :width]
        for request, kv_len in enumerate(self.kv_lens):
            columns = -(-min(max(kv_len, 0), self.shape.max_context) // PAGE_SIZE)
            table[request, :columns] = torch.arange(columns) % PAGES
            if self.faulty[request] and columns:
                table[request, 0] = (-1, PAGES, UNREAD_CELL)[request % 3]
        query_lens = torch.tensor(self.query_lens, dtype=torch.int32)
        return PagedBatch(table, torch.tensor(self.kv_lens, dtype=torch.int32), query_lens, self.max_query_len)


KV_LEN = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 64, 65]), st.integers(0, 300), st.integers(0, 20_000))


@st.composite
def plan_cases(draw: st.DrawFn, parts: int, longest_batch: int, *, fixed: bool = False) -> PlanCase:
    """Ragged batches, empty ones too, of which every fourth names a page that is not there."""
    max_query_len = draw(st.sampled_from([1, 2, 5, 8]))
    query_len = st.one_of(st.just(max_query_len), st.integers(0, max_query_len))
    request = st.tuples(KV_LEN, query_len, st.sampled_from([False, False, False, True]))
    batch = draw(st.one_of(st.lists(request, max_size=20), st.lists(request, max_size=longest_batch)))
    query_lens = [query_len for _, query_len, _ in batch]
    shape = PlanShape(
        parts,
        max_batch=len(batch) + draw(st.integers(0, 3)),
        max_tokens=sum(query_lens) + draw(st.integers(0, 9)),
        max_query_len=max_query_len,
        max_context=20_000,
        block_q=draw(st.integers(1, max_query_len)),
        block_n=draw(st.sampled_from([16, 32, 64])),
        min_tiles=draw(st.sampled_from([2, 4, 8])),
        fixed=fixed,
        overhead=draw(st.sampled_from([0, 1, 4])),
        merge_cost=draw(st.sampled_from([0, 15, 256])),
        row_tiles=draw(st.integers(0, 3)),
        halves=draw(st.booleans()),
    )
    faulty = [bad and kv_len > 0 for kv_len, _, bad in batch]
    return PlanCase([kv_len for kv_len, _, _ in batch], query_lens, shape, max_query_len, faulty)


def planned(case: PlanCase, status: Status | None = None) -> SplitPlan:
    """The kernel's plan, over buffers in which nothing is right before."""
    plan = SplitPlan.allocate(case.shape, torch.device("cpu"))
    for buffer in plan.buffers:
        buffer.fill_(UNWRITTEN)
    batch, status = case.batch(), status or Status.allocate(torch.device("cpu"))
    plan.update(batch, status, page_size=PAGE_SIZE, max_pages=PAGES)
    assert plan.table_header[:2].tolist() == [batch.block_table.data_ptr(), batch.block_table.stride(0)]
    return plan


def assert_planned_as_defined(case: PlanCase) -> None:
    """Every buffer has the defined contents, and nothing is written behind them."""
    plan, defined = planned(case), case.defined()
    assert plan.part_indptr.tolist() == defined.part_indptr
    assert [tuple(item) for item in plan.items[: len(defined.items)].tolist()] == defined.items
    assert bool((plan.items[len(defined.items) :] == UNWRITTEN).all())
    assert [tuple(token) for token in plan.token_slots.tolist()] == defined.tokens
    assert tuple(plan.summary.tolist()) == defined.summary
    assert int(plan.table_header[2]) == defined.share
    assert (plan.heads is not None) == (case.shape.row_tiles > 0)
    if plan.heads is not None:
        assert_heads_as_defined(case, plan.heads, defined)


def assert_heads_as_defined(case: PlanCase, heads: torch.Tensor, defined: Plan) -> None:
    """Each program's bounds, its rows, the part's first item and the last two pages of that."""
    table, programs = case.batch().block_table, defined.programs
    for program, head in enumerate(heads):
        part = program // programs
        start, stop = defined.part_indptr[part : part + 2]
        assert head[:2].tolist() == [start, stop]
        if start == stop:
            continue
        rows = 64 * case.shape.row_tiles // programs
        assert head[4:8].tolist() == [program % programs * rows * 128 + rows, defined.share, 0, 0]
        assert head[8:16].tolist() == list(defined.items[start])
        request, low, high, _, kv_len, *_ = defined.items[start]
        pages = -(-min(kv_len, high * case.shape.block_n) // PAGE_SIZE) if low < high else 0
        columns = (pages - 1, pages - 2)
        assert head[2:4].tolist() == [int(table[request, column]) if column >= 0 else 0 for column in columns]
    assert (len(defined.items) == 0) or defined.part_indptr[len(heads) // programs] == len(defined.items)


@pytest.mark.parametrize("parts", [2, 5, 66, 132])
def test_parts_have_twice_the_programs_where_half_of_them_are_idle(parts: int) -> None:
    found = {}
    for used in range(1, parts + 1):
        shape = PlanShape(parts, 1, 1, 1, 20_000, block_q=1, block_n=64, min_tiles=1, row_tiles=2, halves=True)
        case = PlanCase([64 * used], [1], shape, 1, [False])
        assert_planned_as_defined(case)
        found[used] = case.defined().programs
    assert found == {used: 4 if used * 2 <= parts else 2 for used in found}


@pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_kernel_writes_the_plan_that_is_defined(parts: int, fixed: bool) -> None:
    @settings(max_examples=max(settings().max_examples // 15, 3))
    @given(plan_cases(parts, longest_batch=25, fixed=fixed))
    def holds(case: PlanCase) -> None:
        assert_planned_as_defined(case)

    holds()


@pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
@pytest.mark.parametrize("batch", [17, 1025])
def test_the_kernel_plans_batches_of_more_than_one_program_and_scan(batch: int, fixed: bool) -> None:
    kv_lens = [(request * 37) % 900 for request in range(batch)]
    query_lens = [request % 3 for request in range(batch)]
    shape = PlanShape(132, batch, sum(query_lens), 2, 1024, 1, block_n=64, min_tiles=2, fixed=fixed, row_tiles=2)
    assert_planned_as_defined(PlanCase(kv_lens, query_lens, shape, 2, [False] * batch))


@pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
@pytest.mark.parametrize("parts", PARTS)
def test_every_tile_is_covered_once_and_in_order(parts: int, fixed: bool) -> None:
    @given(plan_cases(parts, longest_batch=300, fixed=fixed))
    def holds(case: PlanCase) -> None:
        case = dataclasses.replace(case, faulty=[False] * len(case.faulty))
        pieces: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for request, low, high, _, _, query_start, *_ in case.defined().items:
            assert low < high
            pieces.setdefault((request, query_start), []).append((low, high))
        assert pieces.keys() == case.tiles.keys()
        for unit, tiles in case.tiles.items():
            edges = list(itertools.chain([0], *pieces[unit], [tiles]))
            assert edges[::2] == edges[1::2], f"unit {unit}: {edges}"

    holds()


@pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
@pytest.mark.parametrize("parts", PARTS)
def test_slots_and_items_fit_the_buffers_and_each_slot_is_merged_once(parts: int, fixed: bool) -> None:
    @given(plan_cases(parts, longest_batch=300, fixed=fixed))
    def holds(case: PlanCase) -> None:
        plan = case.defined()
        slots = [item[3] for item in plan.items if item[3] >= 0]
        assert slots == list(range(len(slots)))
        assert len(slots) <= case.shape.max_slots
        assert len(plan.items) == plan.part_indptr[-1] <= case.shape.max_items
        assert plan.part_indptr == sorted(plan.part_indptr)
        merged = [slot for low, high, index, _ in plan.tokens if index == 0 for slot in range(low, high)]
        faulty = {item[5] for item in plan.items if case.faulty[item[0]]}
        assert merged == [item[3] for item in plan.items if item[3] >= 0 and item[5] not in faulty]

    holds()


@pytest.mark.parametrize("parts", PARTS)
def test_no_part_is_longer_than_its_share(parts: int) -> None:
    @given(plan_cases(parts, longest_batch=300))
    def holds(case: PlanCase) -> None:
        plan, tiles = case.defined(), case.tiles.values()
        shape = case.shape
        least = max(shape.min_tiles, math.isqrt(max(tiles, default=0) * shape.merge_cost // 256))
        fair = max(-(-(sum(tiles) + len(tiles) * shape.overhead) // parts), least + shape.overhead)
        for start, stop in itertools.pairwise(plan.part_indptr):
            assert sum(high - low for _, low, high, *_ in plan.items[start:stop]) <= fair * 17 // 16 + 1

    holds()


@pytest.mark.parametrize("parts", PARTS)
def test_fixed_cuts_of_a_request_are_those_it_has_alone(parts: int) -> None:
    @given(plan_cases(parts, longest_batch=40, fixed=True), st.data())
    def holds(case: PlanCase, data: st.DataObject) -> None:
        if not case.kv_lens:
            return
        request = data.draw(st.integers(0, len(case.kv_lens) - 1))
        alone = PlanCase([case.kv_lens[request]], [case.query_lens[request]], case.shape, case.max_query_len, [False])
        there = [item[1:3] for item in case.defined().items if item[0] == request and not case.faulty[request]]
        assert case.faulty[request] or there == [item[1:3] for item in alone.defined().items]

    holds()


def test_cuts_that_are_free_depend_on_the_batch() -> None:
    shape = PlanShape(16, 4, 4, 1, 20_000, block_q=1, block_n=16, min_tiles=2)
    alone = PlanCase([4000], [1], shape, 1, [False]).defined()
    together = PlanCase([4000, 9000], [1, 1], shape, 1, [False] * 2).defined()
    assert [item[1:3] for item in alone.items] != [item[1:3] for item in together.items if item[0] == 0]


@pytest.mark.parametrize(
    ("batch", "kv_len", "parts", "pieces"),
    [
        (128, 4096, 132, 1),
        (128, 4096, 66, 1),
        (64, 16384, 66, 1),
        (64, 16384, 132, 2),
        (32, 4096, 132, 4),
        (8, 8192, 66, 8),
    ],
)
def test_requests_that_are_all_as_long_are_cut_alike(batch: int, kv_len: int, parts: int, pieces: int) -> None:
    shape = PlanShape(parts, batch, batch, 1, 20_000, block_q=1, block_n=128, min_tiles=2)
    case = PlanCase([kv_len] * batch, [1] * batch, shape, 1, [False] * batch)
    assert_planned_as_defined(case)
    items = case.defined().items
    assert len(items) == batch * pieces
    assert len({high - low for _, low, high, *_ in items}) == 1


def test_tokens_beyond_the_capacity_are_not_written() -> None:
    shape = PlanShape(4, max_batch=3, max_tokens=5, max_query_len=4, max_context=96, block_q=4, block_n=16, min_tiles=2)
    plan = SplitPlan.allocate(shape, torch.device("cpu"))
    guarded = torch.full((12, 4), UNWRITTEN, dtype=torch.int32)
    plan = dataclasses.replace(plan, token_slots=guarded[:5])
    status = Status.allocate(torch.device("cpu"))
    batch = PlanCase([40, 3, 90], [4, 4, 4], shape, 4, [False] * 3).batch()
    plan.update(batch, status, page_size=PAGE_SIZE, max_pages=PAGES)
    assert (guarded[5:] == UNWRITTEN).all()
    assert (guarded[:5] != UNWRITTEN).all()
    with pytest.raises(IndexError, match="request 1: its query tokens end at 8, past q or past max_query_tokens 5"):
        status.check(Limits(PAGES, 96, 4, 5))


LIMITS = Limits(PAGES, 160, 4, 100)
SHAPE = PlanShape(4, max_batch=4, max_tokens=100, max_query_len=4, max_context=160, block_q=2, block_n=16, min_tiles=2)


@pytest.mark.parametrize(
    ("kv_lens", "query_lens", "message"),
    [
        ([40, -1, 3], [1, 1, 1], "kv_lens: request 1: expected 0 to 160, got -1"),
        ([40, 161, 3], [1, 1, 1], "kv_lens: request 1: expected 0 to 160, got 161"),
        ([40, 2**31 - 1, 3], [1, 1, 1], "kv_lens: request 1: expected 0 to 160, got 2147483647"),
        ([40, 20, 3], [1, 5, 1], "query_lens: request 1: expected 0 to 4, that is max_query_len, got 5"),
        ([40, 20, 3], [1, -2, 1], "query_lens: request 1: expected 0 to 4, that is max_query_len, got -2"),
        ([40, 20, 3], [1, 2**31 - 1, 1], "query_lens: request 1: expected 0 to 4, that is max_query_len, got 21474836"),
    ],
)
def test_a_length_out_of_range_is_reported_once_and_its_rows_are_faulty(
    kv_lens: list[int], query_lens: list[int], message: str
) -> None:
    case, status = PlanCase(kv_lens, query_lens, SHAPE, 4, [False] * 3), Status.allocate(torch.device("cpu"))
    plan = planned(case, status)
    with pytest.raises(IndexError, match=message):
        status.check(LIMITS)
    status.check(LIMITS)
    tokens = plan.token_slots[:, 1].tolist()
    count = max(query_lens[1], 0)
    assert tokens[0] != -2
    assert all(slot_hi == -2 for slot_hi in tokens[1 : 1 + count])
    assert count > 90 or tokens[1 + count] != -2


def test_a_page_that_is_not_there_is_reported_with_its_request() -> None:
    status = Status.allocate(torch.device("cpu"))
    planned(PlanCase([40, 33, 0, 70], [1, 3, 1, 2], SHAPE, 4, [False, True, True, True]), status)
    with pytest.raises(
        IndexError, match=r"block_table: request 1: expected a page in \[0, 50\), got 50. Rows that need"
    ):
        status.check(LIMITS)


@pytest.mark.parametrize("query_lens", [[2, 0], [0, 2], [1, 8, 1], [8, 0, 0], [0, 0, 0], [3]])
def test_the_device_knows_the_longest_query_and_the_sum_of_query_blocks(query_lens: list[int]) -> None:
    shape = PlanShape(5, 3, 20, 8, 160, block_q=3, block_n=16, min_tiles=2)
    plan = planned(PlanCase([100] * len(query_lens), query_lens, shape, 8, [False] * len(query_lens)))
    longest, tokens, items, _ = plan.summary.tolist()
    assert (longest, tokens) == (max(query_lens), sum(query_lens))
    units = {(request, start) for request, *_, start, _, _ in plan.items[:items].tolist()}
    assert len(units) == sum(-(-query_len // 3) for query_len in query_lens)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_that_the_batch_gives_stand_in_the_plan(dtype: torch.dtype) -> None:
    case = PlanCase([40, 20], [2, 1], SHAPE, 4, [False] * 2)
    short = torch.full((9,), UNREAD_CELL, dtype=dtype)
    short[:2] = torch.tensor([7, 8])
    batch = dataclasses.replace(case.batch(), positions=short[:2])  # the third token's is missing
    plan = SplitPlan.allocate(SHAPE, torch.device("cpu"))
    plan.update(batch, Status.allocate(torch.device("cpu")), page_size=PAGE_SIZE, max_pages=PAGES)
    assert plan.positions[:5].tolist() == [7, 8, 0, 0, 0]
    plan.update(case.batch(), Status.allocate(torch.device("cpu")), page_size=PAGE_SIZE, max_pages=PAGES)
    assert plan.positions[:5].tolist() == [38, 39, 19, 0, 0]
