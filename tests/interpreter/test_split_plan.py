"""The plan that the kernel writes is the plan's definition, bit for bit; the definition covers and balances."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mla.metadata.split_plan import OVERHEAD_TILES, PlanShape, SplitPlan, plan_splits_reference

UNWRITTEN = -12345
PARTS = (1, 3, 16, 66, 132, 300)


@dataclass(frozen=True)
class PlanCase:
    """Lengths of a batch, and what the plan is sized by."""

    kv_lens: list[int]
    query_lens: list[int]
    shape: PlanShape

    @property
    def query_indptr(self) -> list[int]:
        """Where each request's query tokens start."""
        return [0, *itertools.accumulate(self.query_lens)]

    @property
    def tiles(self) -> list[int]:
        """Tiles of each request."""
        lens = zip(self.kv_lens, self.query_lens, strict=True)
        return [-(-kv_len // self.shape.block_n) if query_len else 0 for kv_len, query_len in lens]

    def defined(self) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, int, int]]]:
        """The plan by its definition."""
        return plan_splits_reference(self.kv_lens, self.query_indptr, self.shape)


KV_LEN = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 64, 65]), st.integers(0, 300), st.integers(0, 20_000))


@st.composite
def plan_cases(draw: st.DrawFn, parts: int, longest_batch: int) -> PlanCase:
    """Ragged batches, empty ones too."""
    max_query_len = draw(st.sampled_from([1, 2, 5, 8]))
    request = st.tuples(KV_LEN, st.one_of(st.just(max_query_len), st.integers(0, max_query_len)))
    batch = draw(st.one_of(st.lists(request, max_size=20), st.lists(request, max_size=longest_batch)))
    kv_lens, query_lens = [kv_len for kv_len, _ in batch], [query_len for _, query_len in batch]
    shape = PlanShape(
        parts,
        max_batch=len(batch) + draw(st.integers(0, 3)),
        max_tokens=sum(query_lens) + draw(st.integers(0, 9)),
        max_query_len=max_query_len,
        block_n=draw(st.sampled_from([16, 32, 64])),
        min_tiles=draw(st.sampled_from([2, 4, 8])),
    )
    return PlanCase(kv_lens, query_lens, shape)


def planned(case: PlanCase) -> SplitPlan:
    """The kernel's plan, over buffers in which nothing is right before."""
    plan = SplitPlan.allocate(case.shape, torch.device("cpu"))
    for buffer in (plan.part_indptr, plan.items, plan.token_slots):
        buffer.fill_(UNWRITTEN)
    plan.update(
        torch.tensor(case.kv_lens, dtype=torch.int32), torch.tensor(case.query_indptr, dtype=torch.int32)
    )  # fmt: skip
    return plan


@pytest.mark.parametrize("parts", PARTS)
def test_the_kernel_writes_the_plan_that_is_defined(parts: int) -> None:
    @settings(max_examples=max(settings().max_examples // 3, 5))
    @given(plan_cases(parts, longest_batch=40))
    def holds(case: PlanCase) -> None:
        plan = planned(case)
        part_indptr, items, tokens = case.defined()
        assert plan.part_indptr.tolist() == part_indptr
        assert [tuple(item) for item in plan.items[: len(items)].tolist()] == items
        assert bool((plan.items[len(items) :] == UNWRITTEN).all())
        assert [tuple(token[:3]) for token in plan.token_slots.tolist()] == tokens

    holds()


@pytest.mark.parametrize("batch", [16, 17, 1025])
def test_the_kernel_plans_batches_of_more_than_one_program_and_scan(batch: int) -> None:
    kv_lens = [(request * 37) % 900 for request in range(batch)]
    query_lens = [request % 3 for request in range(batch)]
    case = PlanCase(kv_lens, query_lens, PlanShape(132, batch, sum(query_lens), 2, 64, 2))
    plan = planned(case)
    part_indptr, items, tokens = case.defined()
    assert plan.part_indptr.tolist() == part_indptr
    assert [tuple(item) for item in plan.items[: len(items)].tolist()] == items
    assert [tuple(token[:3]) for token in plan.token_slots.tolist()] == tokens


@pytest.mark.parametrize("parts", PARTS)
def test_every_tile_is_covered_once_and_in_order(parts: int) -> None:
    @given(plan_cases(parts, longest_batch=300))
    def holds(case: PlanCase) -> None:
        _, items, _ = case.defined()
        pieces: dict[int, list[tuple[int, int]]] = {}
        for request, low, high, *_ in items:
            assert low < high
            pieces.setdefault(request, []).append((low, high))
        for request, tiles in enumerate(case.tiles):
            edges = list(itertools.chain([0], *pieces.get(request, []), [tiles]))
            assert edges[::2] == edges[1::2], f"request {request}: {edges}"

    holds()


@pytest.mark.parametrize("parts", PARTS)
def test_slots_and_items_fit_the_buffers_and_each_slot_is_merged_once(parts: int) -> None:
    @given(plan_cases(parts, longest_batch=300))
    def holds(case: PlanCase) -> None:
        part_indptr, items, tokens = case.defined()
        slots = [item[3] for item in items if item[3] >= 0]
        assert slots == list(range(len(slots)))
        assert len(slots) <= case.shape.max_slots
        assert len(items) == part_indptr[-1] <= case.shape.max_items
        assert part_indptr == sorted(part_indptr)
        merged = [slot for low, high, index in tokens if index == 0 for slot in range(low, high)]
        assert merged == slots

    holds()


@pytest.mark.parametrize("parts", PARTS)
def test_no_part_is_longer_than_its_share(parts: int) -> None:
    @given(plan_cases(parts, longest_batch=300))
    def holds(case: PlanCase) -> None:
        part_indptr, items, _ = case.defined()
        requests = sum(tiles > 0 for tiles in case.tiles)
        fair = max(-(-(sum(case.tiles) + requests * OVERHEAD_TILES) // parts), case.shape.min_tiles + OVERHEAD_TILES)
        for start, stop in itertools.pairwise(part_indptr):
            assert sum(high - low for _, low, high, *_ in items[start:stop]) <= fair + 1

    holds()


def test_tokens_beyond_the_capacity_are_not_written() -> None:
    shape = PlanShape(parts=4, max_batch=3, max_tokens=5, max_query_len=4, block_n=16, min_tiles=2)
    plan = SplitPlan.allocate(shape, torch.device("cpu"))
    guarded = torch.full((12, 4), UNWRITTEN, dtype=torch.int32)
    plan = dataclasses.replace(plan, token_slots=guarded[:5])
    plan.update(torch.tensor([40, 3, 100], dtype=torch.int32), torch.tensor([0, 4, 8, 12], dtype=torch.int32))
    assert (guarded[5:] == UNWRITTEN).all()
    assert (guarded[:5, :3] != UNWRITTEN).all()
