"""Ragged forms: row pointers, kv indices and positions, in place at addresses that stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from portable_mla.metadata import Limits, PagedBatch, Status
from portable_mla.metadata.ragged.forms import RaggedForms, RaggedShape

UNWRITTEN = -12345
UNREAD_CELL = 2**31 - 1
CPU = torch.device("cpu")


def fresh(shape: RaggedShape) -> RaggedForms:
    """Buffers in which nothing is right yet."""
    forms = RaggedForms.allocate(shape, CPU)
    for tensor in buffers(forms).values():
        tensor.fill_(UNWRITTEN)
    return forms


def buffers(forms: RaggedForms) -> dict[str, Tensor]:
    """The tensors by name."""
    return {name: value for name, value in vars(forms).items() if isinstance(value, Tensor)}


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """kv_lens, query_lens, page size and index size."""
    page_size, index_size = draw(st.sampled_from([(16, 16), (64, 16), (64, 1), (1, 1), (48, 12), (544, 17)]))
    requests = draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), max_size=8))
    return [kv_len for kv_len, _ in requests], [n for _, n in requests], page_size, index_size


@given(batches())
def test_indices_name_the_slots_of_every_token_in_order(case: tuple[list[int], list[int], int, int]) -> None:
    kv_lens, query_lens, page_size, index_size = case
    n, width = len(kv_lens), 200 // page_size + 1
    table = torch.randperm(n * width).view(n, width).to(torch.int32)
    shape = RaggedShape(n + 2, sum(query_lens) + 3, 200, n * width + 1, page_size, index_size)
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    batch = PagedBatch(table, lens, torch.tensor(query_lens, dtype=torch.int32), 3)
    forms, status = fresh(shape), Status.allocate(CPU)
    forms.update_with_torch(batch, status, max_pages=n * width + 1)
    status.check(Limits(n * width, 200, 3, shape.max_tokens))
    assert forms.kv_indptr is not None and forms.kv_indices is not None and forms.last_page_len is not None
    starts, rows = forms.kv_indptr.tolist(), forms.query_indptr.tolist()
    assert starts[n:] == [starts[n]] * 3
    assert rows == [sum(query_lens[:i]) for i in range(n + 1)] + [sum(query_lens)] * 2
    assert forms.last_page_len[n:].tolist() == [0, 0]
    for request, kv_len in enumerate(kv_lens):
        indices = forms.kv_indices[starts[request] : starts[request + 1]].long()
        slots = (indices[:, None] * index_size + torch.arange(index_size)).flatten()
        position = torch.arange(kv_len)
        expected = table[request].long()[position // page_size] * page_size + position % page_size
        assert torch.equal(slots[:kv_len], expected)
        assert len(indices) == -(-kv_len // index_size)
        assert forms.last_page_len[request] == (kv_len - (len(indices) - 1) * index_size if kv_len else 0)
        mine = slice(rows[request], rows[request + 1])
        n_query = query_lens[request]
        assert forms.positions[mine].tolist() == [max(p, 0) for p in range(kv_len - n_query, kv_len)]
    assert forms.positions[rows[n] :].tolist() == [0, 0, 0]
    assert bool((forms.kv_indices[starts[n] :] == UNWRITTEN).all())


def test_a_batch_that_shrinks_leaves_nothing_to_read() -> None:
    shape = RaggedShape(8, 8, 64, 100, 16, 1)
    forms, status = fresh(shape), Status.allocate(CPU)
    addresses = {name: tensor.data_ptr() for name, tensor in buffers(forms).items()}
    for n in (8, 3, 0, 5):
        lens = torch.full((n,), 20, dtype=torch.int32)
        forms.update_with_torch(PagedBatch(torch.ones(n, 4, dtype=torch.int32), lens), status, max_pages=100)
        assert forms.kv_indptr is not None and forms.last_page_len is not None
        assert forms.kv_indptr.tolist() == [20 * min(i, n) for i in range(9)]
        assert forms.query_indptr.tolist() == [min(i, n) for i in range(9)]
        assert forms.last_page_len.tolist() == [1] * n + [0] * (8 - n)
        assert forms.positions.tolist() == [19] * n + [0] * (8 - n)
    assert {name: tensor.data_ptr() for name, tensor in buffers(forms).items()} == addresses


@pytest.mark.parametrize(
    ("kv_len", "query_len", "page", "message"),
    [
        (65, 1, 1, "kv_lens: request 1: expected 0 to 64, got 65"),
        (-3, 1, 1, "kv_lens: request 1: expected 0 to 64, got -3"),
        (9, 3, 1, "query_lens: request 1: expected 0 to 2, that is max_query_len, got 3"),
        (9, 1, -1, r"block_table: request 1: expected a page in \[0, 9\), got -1"),
        (9, 1, 9, r"block_table: request 1: expected a page in \[0, 9\), got 9"),
        (9, 2, 1, "query_lens: request 2: its query tokens end at 4, past q or past max_query_tokens 3"),
    ],
)
def test_what_is_out_of_range_is_reported_and_never_becomes_an_address(
    kv_len: int, query_len: int, page: int, message: str
) -> None:
    forms, status = fresh(RaggedShape(3, 3, 64, 9, 16, 16)), Status.allocate(CPU)
    table = torch.ones(3, 4, dtype=torch.int32)
    table[1] = page
    lens, query_lens = torch.tensor([9, kv_len, 9]), torch.tensor([1, query_len, 1])
    forms.update_with_torch(PagedBatch(table, lens.int(), query_lens.int(), 2), status, max_pages=9)
    with pytest.raises(IndexError, match=message):
        status.check(Limits(9, 64, 2, 3))
    status.check(Limits(9, 64, 2, 3))
    assert forms.kv_indptr is not None and forms.kv_indices is not None
    written = forms.kv_indices[: int(forms.kv_indptr[-1])]
    assert bool(((written >= 0) & (written < 9)).all())


@pytest.mark.parametrize("index_size", [0, 3, 32])
def test_an_index_size_that_does_not_divide_the_page_is_refused(index_size: int) -> None:
    with pytest.raises(ValueError, match=f"index_size: expected a divisor of page_size 16, got {index_size}"):
        RaggedShape(1, 1, 64, 4, 16, index_size)


@pytest.mark.parametrize(("batch", "pages"), [(2**16, 4), (4, 2**27)])
def test_indices_that_would_not_fit_32_bits_are_refused(batch: int, pages: int) -> None:
    with pytest.raises(ValueError, match="index_size: 1 makes .* and int32 holds fewer"):
        RaggedShape(batch, 1, 2**15, pages, 16, 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("page_size", "index_size"), [(64, 64), (64, 1), (48, 12), (1, 1), (16, None)])
@pytest.mark.parametrize("batch", [0, 1, 33, 1500])
def test_the_kernel_writes_on_a_gpu_what_torch_writes(batch: int, page_size: int, index_size: int | None) -> None:
    rng = torch.Generator().manual_seed(batch + page_size)
    lens = torch.randint(-1, 402, (batch,), generator=rng, dtype=torch.int32)
    query_lens = torch.randint(-1, 5, (batch,), generator=rng, dtype=torch.int32)
    table = torch.randint(-2, 510, (batch, 410 // page_size + 1), generator=rng, dtype=torch.int32)
    shape = RaggedShape(batch + 3, 3 * batch, 400, 500, page_size, index_size)
    written = []
    for device, name in (("cpu", "update_with_torch"), ("cuda", "update")):
        forms, status = RaggedForms.allocate(shape, torch.device(device)), Status.allocate(torch.device(device))
        for tensor in buffers(forms).values():
            tensor.fill_(UNWRITTEN)
        step = PagedBatch(table.to(device), lens.to(device), query_lens.to(device), 3)
        getattr(forms, name)(step, status, max_pages=500)
        written.append({name: tensor.cpu() for name, tensor in buffers(forms).items()} | {"status": status.words.cpu()})
    for name, expected in written[0].items():
        assert torch.equal(expected, written[1][name]), name
