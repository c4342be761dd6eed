"""RaggedForms: row pointers, kv indices and positions of a paged batch, for backends that read no page table."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.metadata.batch import PagedBatch
from portable_mla.metadata.status import NO_FAULT, Fault, Status
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

CELLS_PER_STEP = 1024
REQUESTS_PER_SCAN = 1024
CHUNKS = 8  # programs that share the indices of one request


@dataclass(frozen=True)
class RaggedShape:
    """What the forms are sized by.

    index_size: tokens of the page that one index names: the cache's page size, a divisor of it (page p becomes the
    pages p * ratio ... of a view with smaller pages), 1 for token indices; None for no indices.
    Raises ValueError where an index or a row pointer would not fit 32 bits.
    """

    max_batch: int
    max_tokens: int
    max_context: int
    max_pages: int
    page_size: int
    index_size: int | None = None

    def __post_init__(self) -> None:
        if self.index_size is None:
            return
        if self.index_size < 1 or self.page_size % self.index_size:
            raise ValueError(f"index_size: expected a divisor of page_size {self.page_size}, got {self.index_size}")
        largest = max(self.max_indices, self.max_pages * (self.page_size // self.index_size))
        if largest >= 2**31:
            raise ValueError(
                f"index_size: {self.index_size} makes {largest} indices or pages, and int32 holds fewer than 2**31. "
                f"Use larger pages or a smaller max_batch or max_context"
            )

    @property
    def max_indices(self) -> int:
        """Indices of any batch: max_batch * max_context tokens, since requests may share pages."""
        return 0 if self.index_size is None else self.max_batch * -(-self.max_context // self.index_size)


@dataclass(frozen=True)
class RaggedForms:
    """Buffers whose addresses never change. Rows past the batch are empty: their row pointers repeat the last one, so
    that a batch that shrank leaves nothing to read. The three kv buffers are None where no indices were asked for.
    """

    shape: RaggedShape
    query_indptr: Tensor  # [max_batch + 1] int32: where each request's query tokens start
    positions: Tensor  # [max_tokens] int32: where each query token stands in its request; 0 for padding
    kv_indptr: Tensor | None = None  # [max_batch + 1] int32
    kv_indices: Tensor | None = None  # [max_indices] int32
    last_page_len: Tensor | None = None  # [max_batch] int32: 1 to index_size tokens, 0 where there is no page

    @classmethod
    def allocate(cls, shape: RaggedShape, device: torch.device) -> RaggedForms:
        """Buffers for any batch within `shape`."""

        def ints(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        forms = cls(shape, ints(shape.max_batch + 1), ints(shape.max_tokens))
        if shape.index_size is None:
            return forms
        indptr, indices, last = ints(shape.max_batch + 1), ints(shape.max_indices), ints(shape.max_batch)
        return cls(shape, forms.query_indptr, forms.positions, indptr, indices, last)

    def update(self, batch: PagedBatch, status: Status, *, max_pages: int) -> None:
        """Describe one step in one launch; no value is read on the host. What is out of range sets `status`: a wrong
        length counts as 0 keys, a page that is not in the cache as page 0."""
        shape, table = self.shape, batch.block_table
        assert batch.size <= shape.max_batch, "the caller checks capacity"
        positions = batch.positions
        dtype = None if positions is None else positions.dtype
        key = (table.device.index, dtype, alignment(batch.kv_lens, batch.query_lens, positions, table))
        _launch(shape.page_size, shape.index_size)(
            key, (max(batch.size, 1), 1 if shape.index_size is None else CHUNKS),
            batch.kv_lens, batch.query_lens, positions, table, self.query_indptr, self.positions, self.kv_indptr,
            self.last_page_len, self.kv_indices, status.words,
            batch.size, 0 if positions is None else positions.shape[0], shape.max_batch, shape.max_tokens,
            shape.max_indices,
            min(table.shape[1] * shape.page_size, shape.max_context), batch.max_query_len,
            (2**31 - 1) // max(batch.size, 1), max_pages, table.stride(0),
        )  # fmt: skip

    def update_with_torch(self, batch: PagedBatch, status: Status, *, max_pages: int) -> None:
        """The same in torch, bit for bit, without Triton: in place, and without a sync but for the faults."""
        shape, device = self.shape, batch.device
        kv_lens, query_lens = batch.kv_lens.long(), batch.query_lens
        query_lens = torch.full_like(kv_lens, batch.max_query_len) if query_lens is None else query_lens.long()
        limit = min(batch.block_table.shape[1] * shape.page_size, shape.max_context)
        wrong = (kv_lens < 0) | (kv_lens > limit)
        _report(status, Fault.kv_len, kv_lens, wrong)
        _report(status, Fault.query_len, query_lens, (query_lens < 0) | (query_lens > batch.max_query_len))
        counted = query_lens.clamp(0, (2**31 - 1) // max(batch.size, 1))
        _cumulate(counted, self.query_indptr)
        end = self.query_indptr[1 : batch.size + 1].long()
        _report(status, Fault.query_tokens, end, (counted > 0) & (end > shape.max_tokens))
        token = torch.arange(shape.max_tokens, device=device, dtype=torch.int64)
        request, index, real = _rows(self.query_indptr, batch.size, token)
        self.positions.copy_(_positions(batch, kv_lens - counted, request, index, token).masked_fill(~real, 0))
        if shape.index_size is not None:
            self._write_indices(batch, status, kv_lens.masked_fill(wrong, 0), max_pages)

    def _write_indices(self, batch: PagedBatch, status: Status, kv_lens: Tensor, max_pages: int) -> None:
        assert self.kv_indptr is not None and self.kv_indices is not None and self.last_page_len is not None
        shape, size = self.shape, self.shape.index_size
        assert size is not None
        ratio = shape.page_size // size
        _cumulate((kv_lens + size - 1) // size, self.kv_indptr)
        self.last_page_len.zero_()
        self.last_page_len[: batch.size] = torch.where(kv_lens > 0, (kv_lens - 1) % size + 1, 0)
        if not batch.size:
            return
        request, offset, real = _rows(
            self.kv_indptr, batch.size, torch.arange(shape.max_indices, device=batch.device, dtype=torch.int64)
        )
        column = (offset // ratio).clamp(0, batch.block_table.shape[1] - 1)
        page = batch.block_table[request, column].long()
        wrong = real & ((page < 0) | (page >= max_pages))
        _report(status, Fault.page_id, page, wrong, request)
        index = page.masked_fill(wrong, 0) * ratio + offset % ratio
        self.kv_indices.copy_(torch.where(real, index, self.kv_indices.long()))


@functools.lru_cache(maxsize=64)
def _launch(page_size: int, index_size: int | None) -> KernelLaunch:
    from portable_mla.metadata.ragged.kernels.ragged import write_ragged_kernel

    return KernelLaunch(write_ragged_kernel, ragged_constants(page_size, index_size))


def ragged_constants(page_size: int, index_size: int | None) -> dict[str, int]:
    """Constants and options of the kernel's launch."""
    return {
        "PAGE_SIZE": page_size, "INDEX_SIZE": index_size or page_size, "BLOCK_C": CELLS_PER_STEP,
        "SCAN": REQUESTS_PER_SCAN, "num_warps": 4,
    }  # fmt: skip


def _positions(batch: PagedBatch, start: Tensor, request: Tensor, index: Tensor, token: Tensor) -> Tensor:
    """Where each token stands: as the batch says, or `index` after the start of its request's query."""
    given = batch.positions
    if given is not None:
        return torch.nn.functional.pad(given, (0, max(len(token) - len(given), 0)))[: len(token)]
    return (start[request] + index).clamp(min=0) if batch.size else token


def _cumulate(counts: Tensor, indptr: Tensor) -> None:
    """indptr[0] = 0 and running sums behind it, the last one repeated to the end."""
    n = counts.shape[0]
    indptr[0] = 0
    torch.cumsum(counts, 0, dtype=torch.int32, out=indptr[1 : n + 1])
    indptr[n + 1 :] = indptr[n]


def _rows(indptr: Tensor, batch: int, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each place its request, its offset there, and whether it belongs to one."""
    stops = indptr[1 : batch + 1].long()
    request = torch.searchsorted(stops, place, right=True).clamp(max=max(batch - 1, 0))
    return request, place - indptr[request].long(), place < indptr[batch]


def _report(status: Status, fault: Fault, value: Tensor, wrong: Tensor, request: Tensor | None = None) -> None:
    """Lower the status word to the first of the wrong values, without a sync."""
    if not value.numel():
        return
    request = torch.arange(value.shape[0], device=value.device, dtype=torch.int64) if request is None else request
    word = (request << 32) | (value & 0xFFFFFFFF)
    lowest = torch.where(wrong, word, NO_FAULT).amin()
    torch.minimum(status.words[fault], lowest, out=status.words[fault])
