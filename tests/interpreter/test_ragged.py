"""The ragged forms that the kernel writes are those of the torch twin, bit for bit, and both are right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mla.metadata import Limits, PagedBatch, Status
from portable_mla.metadata.ragged.forms import RaggedForms, RaggedShape
from tests.contract.test_ragged import UNREAD_CELL, buffers, fresh

KV_LEN = st.one_of(st.sampled_from([-1, 0, 1, 15, 16, 17]), st.integers(0, 400))


@dataclass(frozen=True)
class RaggedCase:
    """A batch in numbers. width: pages of the table; gap: unread columns between its rows."""

    kv_lens: list[int]
    query_lens: list[int] | None
    shape: RaggedShape
    max_query_len: int
    width: int
    gap: int
    pages: int
    seed: int

    def batch(self) -> PagedBatch:
        """Random pages, one in eight not in the cache; what no request reads is poison."""
        rng = torch.Generator().manual_seed(self.seed)
        size = (len(self.kv_lens), self.width)
        pages = torch.randint(0, self.pages, size, generator=rng)
        strange = torch.randint(0, 8, size, generator=rng) == 0
        pages[strange] += torch.where(pages[strange] % 2 == 0, self.pages, -self.pages)
        kv_lens = torch.tensor(self.kv_lens, dtype=torch.int32)
        pages[torch.arange(self.width) * self.shape.page_size >= kv_lens[:, None]] = UNREAD_CELL
        table = torch.full((size[0], self.width + self.gap), UNREAD_CELL, dtype=torch.int32)[:, : self.width]
        table.copy_(pages)
        query_lens = None if self.query_lens is None else torch.tensor(self.query_lens, dtype=torch.int32)
        return PagedBatch(table, kv_lens, query_lens, self.max_query_len)


@st.composite
def ragged_cases(draw: st.DrawFn) -> RaggedCase:
    """Any page size, ratio, table stride and width; lengths beyond what is allowed too."""
    page_size, index_size = draw(
        st.sampled_from([(16, 16), (64, 64), (64, 16), (64, 1), (1, 1), (48, 12), (48, 1), (544, 17), (16, None)])
    )
    max_query_len = draw(st.integers(1, 4))
    request = st.tuples(KV_LEN, st.integers(-1, max_query_len + 1))
    batch = draw(st.lists(request, max_size=7))
    uniform = draw(st.booleans())
    tokens = len(batch) * max_query_len if uniform else sum(max(n, 0) for _, n in batch)
    shape = RaggedShape(
        max_batch=len(batch) + draw(st.integers(0, 3)),
        max_tokens=max(tokens + draw(st.integers(-2, 5)), 0),
        max_context=draw(st.sampled_from([100, 300])),
        max_pages=100,
        page_size=page_size,
        index_size=index_size,
    )
    return RaggedCase(
        [kv_len for kv_len, _ in batch],
        None if uniform else [n for _, n in batch],
        shape,
        max_query_len,
        width=draw(st.integers(1, 30)),
        gap=draw(st.sampled_from([0, 1, 5])),
        pages=draw(st.integers(2, 100)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def assert_ragged_as_defined(case: RaggedCase) -> None:
    """The kernel's forms and status words are the torch twin's."""
    forms, statuses = [fresh(case.shape) for _ in range(2)], [Status.allocate(torch.device("cpu")) for _ in range(2)]
    forms[0].update(case.batch(), statuses[0], max_pages=case.pages)
    forms[1].update_with_torch(case.batch(), statuses[1], max_pages=case.pages)
    for name, written in buffers(forms[0]).items():
        assert torch.equal(written, buffers(forms[1])[name]), name
    assert statuses[0].words.tolist() == statuses[1].words.tolist()


@settings(max_examples=max(settings().max_examples // 3, 10))
@given(ragged_cases())
def test_kernel_and_torch_twin_write_the_same_bits(case: RaggedCase) -> None:
    assert_ragged_as_defined(case)


def test_the_kernel_counts_batches_of_more_than_one_scan() -> None:
    batch = 1025
    shape = RaggedShape(batch + 2, batch, 40, 10, page_size=16)
    lens = torch.arange(batch, dtype=torch.int32) % 41
    table = torch.arange(batch * 3, dtype=torch.int32).view(batch, 3) % 10
    forms, status = fresh(shape), Status.allocate(torch.device("cpu"))
    forms.update(PagedBatch(table, lens), status, max_pages=10)
    expected = fresh(shape)
    expected.update_with_torch(PagedBatch(table, lens), status, max_pages=10)
    for name, tensor in buffers(forms).items():
        assert torch.equal(tensor, buffers(expected)[name]), name
    status.check(Limits(10, 40, 1, batch))


def test_the_kernel_takes_positions_that_the_batch_gives() -> None:
    shape = RaggedShape(2, 6, 40, 10, page_size=16)
    lens = torch.tensor([20, 3], dtype=torch.int32)
    table = torch.zeros(2, 3, dtype=torch.int32)
    given_positions = torch.tensor([5, 6, 7, 8])
    batch = PagedBatch(table, lens, None, 2, given_positions)
    status = Status.allocate(torch.device("cpu"))
    for write in (RaggedForms.update, RaggedForms.update_with_torch):
        forms = fresh(shape)
        write(forms, batch, status, max_pages=10)
        assert forms.positions.tolist() == [5, 6, 7, 8, 0, 0]
