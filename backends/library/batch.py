"""Step: a decode step as a vendor kernel may read it, at addresses that never change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portable_mla.core.device import is_capturing
from portable_mla.core.shape import Request
from portable_mla.errors import GraphCaptureError
from portable_mla.metadata import DecodeMetadata, Status
from portable_mla.metadata.status import NO_FAULT, Fault
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

SEES, EMPTY, FAULTY = 0, 1, 2  # what a query row is
TABLE_WIDTH = 128  # the page table's width is a multiple of it
REMEMBERED_CALLS = 1024
BLOCK_H = {True: 4, False: 16}  # heads a program of the finishing kernel, where out is copied and where it is not


# Writes out and lse, given the library's LSE, its strides of a request, of a query token and of a head, and the
# library's dense out unless that was written in place.
Finishing = Callable[[Tensor, tuple[int, int, int], Tensor | None, Tensor, Tensor], None]


@dataclass(frozen=True)
class StepView:
    """A step's buffers for its requests."""

    kv_lens: Tensor  # [batch] int32
    query_indptr: Tensor  # [batch + 1] int32
    table: Tensor  # [batch, width] int32, empty if there is none


class Step:
    """Lengths, row pointers and the page table with nothing out of range: requests past the batch are empty, wrong
    lengths and requests with wrong pages count as 0 keys, and a status word says so. A captured graph follows them.

    ratio: the table is that of pages so many times smaller; query_len: tokens of a request in the library's LSE, where
    requests have a stride of their own; natural_per_unit: ln 2 for an LSE in base 2. One launch a step, and one more
    where q of a ragged batch has fewer rows than the capacity.
    """

    def __init__(
        self, request: Request, *, table: bool, ratio: int = 1, query_len: int = 1, natural_per_unit: float = 1.0
    ) -> None:
        self.request, self._table, self._ratio = request, table, ratio
        self._query_len, self._natural_per_unit = query_len, natural_per_unit
        self._shape, self._capacity = request.shape, request.capacity
        self._tokens = request.capacity.max_query_tokens  # rows of q
        self._uniform = request.uniform_queries
        self._metadata: DecodeMetadata | None = None
        self.buffers: tuple[Tensor, ...] = ()  # kv_lens, query_indptr, states, and the table if wanted
        self._views: dict[int, StepView] = {}
        self._kernels: dict[bool, KernelLaunch] = {}
        self._finishing: dict[Hashable, Finishing] = {}  # by numbers alone: a caller's tensors are not kept

    @property
    def width(self) -> int:
        """Columns of the page table."""
        pages = -(-self._capacity.max_context // self._shape.page_size) * self._ratio
        return -(-max(pages, 1) // TABLE_WIDTH) * TABLE_WIDTH

    @property
    def kv_lens(self) -> Tensor:
        """[max_batch] int32."""
        return self.buffers[0]

    @property
    def query_indptr(self) -> Tensor:
        """[max_batch + 1] int32."""
        return self.buffers[1]

    @property
    def states(self) -> Tensor:
        """[max_query_tokens] int32: SEES, EMPTY or FAULTY."""
        return self.buffers[2]

    @property
    def table(self) -> Tensor:
        """[max_batch, width] int32."""
        return self.buffers[3]

    def of(self, batch: int) -> StepView:
        """The buffers for so many requests; made once, since slicing costs a microsecond each."""
        view = self._views.get(batch)
        if view is None:
            table = self.table[:batch] if self._table else self.kv_lens[:0]
            view = self._views[batch] = StepView(self.kv_lens[:batch], self.query_indptr[: batch + 1], table)
        return view

    def memory(self) -> dict[str, int]:
        """Bytes of the buffers."""
        return {"vendor step": sum(tensor.nbytes for tensor in self.buffers)}

    def plan(self, metadata: DecodeMetadata) -> None:
        """Describe a step; allocates at the first."""
        if not self.buffers:
            self.buffers = self._allocate(metadata.batch.device)
        self._metadata, self._tokens = metadata, self._capacity.max_query_tokens
        self._update()

    def fit(self, q: Tensor) -> bool:
        """Describe the step anew if q has fewer rows than were reckoned with; whether it has.

        Raises GraphCaptureError in a capture, which would repeat this step's lengths.
        """
        if self._uniform or q.shape[0] == self._tokens:
            return False
        if is_capturing(q):
            raise GraphCaptureError(
                f"a captured call of a ragged batch needs q of max_query_tokens {self._tokens} rows, padded, "
                f"got {q.shape[0]}"
            )
        self._tokens = q.shape[0]
        self._update()
        return True

    def finishing(self, rows_copied: bool, out: Tensor, lse: Tensor) -> Finishing:
        """What makes results as ours are defined of the library's, in one launch: ask before the library is called.

        Raises GraphCaptureError where a capture could not take the launch.
        """
        return self._finishing_launch(rows_copied, out, lse) if out.is_cuda else self._finish_with_torch

    def rows_that_see(self) -> int:
        """How many rows there are before the first that sees no keys or is faulty; waits for the device."""
        others = self.states.cpu().nonzero()
        return int(others[0]) if len(others) else self._tokens

    def _allocate(self, device: torch.device) -> tuple[Tensor, ...]:
        capacity = self._capacity

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        own = zeros(capacity.max_batch), zeros(capacity.max_batch + 1), zeros(capacity.max_query_tokens)
        return (*own, zeros(capacity.max_batch, self.width)) if self._table else own

    def _update(self) -> None:
        metadata = self._metadata
        assert metadata is not None and metadata.ragged is not None, "asked for in needs()"
        if metadata.batch.kv_lens.is_cuda:
            self.launch_prepare(metadata)
        else:
            self._update_with_torch(metadata)

    def launch_prepare(self, metadata: DecodeMetadata) -> None:
        """Describe the step in one launch."""
        assert metadata.ragged is not None, "asked for in needs()"
        batch, capacity, page_size = metadata.batch, self._capacity, self._shape.page_size
        table = self.table if self._table else None
        key = (batch.device.index, table is None, alignment(batch.kv_lens, batch.query_lens, batch.block_table))
        _prepare(page_size, self._ratio)(
            key, (max(capacity.max_batch, 1),),
            batch.kv_lens, batch.query_lens, batch.block_table, metadata.ragged.query_indptr, table,
            self.kv_lens, self.query_indptr, self.states, metadata.status.words,
            batch.size, capacity.max_batch, self._tokens, capacity.max_query_tokens,
            min(batch.block_table.shape[1] * page_size, capacity.max_context), batch.max_query_len, metadata.max_pages,
            batch.block_table.stride(0), self.width,
        )  # fmt: skip

    def _update_with_torch(self, metadata: DecodeMetadata) -> None:
        """The same from torch's own operations."""
        assert metadata.ragged is not None, "asked for in needs()"
        batch, max_pages, tokens = metadata.batch, metadata.max_pages, self._tokens
        size, page_size, indptr = batch.size, self._shape.page_size, metadata.ragged.query_indptr
        lens = batch.kv_lens.long()
        right = (lens >= 0) & (lens <= min(batch.block_table.shape[1] * page_size, self._capacity.max_context))
        if batch.query_lens is not None:
            right &= (batch.query_lens >= 0) & (batch.query_lens <= batch.max_query_len)
        used = lens.masked_fill(~right, 0)
        cells = batch.block_table.long().repeat_interleave(self._ratio, 1)[:, : self.width]
        column = torch.arange(cells.shape[1], dtype=torch.int64, device=batch.device)
        read = column * (page_size // self._ratio) < used[:, None]
        wrong = read & ((cells < 0) | (cells >= max_pages))
        late = (indptr[1 : size + 1] > tokens) & (indptr[1 : size + 1] > indptr[:size])
        request = torch.arange(size, dtype=torch.int64, device=batch.device)
        _report(metadata.status, Fault.page_id, (request[:, None] << 32 | cells & 0xFFFFFFFF)[wrong])
        _report(metadata.status, Fault.query_tokens, (request << 32 | indptr[1 : size + 1].long())[late])
        faulty = late | wrong.any(1) | ~right
        self.kv_lens.zero_()[:size] = used.masked_fill(faulty, 0).int()
        self.query_indptr.copy_(indptr.clamp(max=tokens))
        if self._table:
            small = cells * self._ratio + column % self._ratio
            self.table.zero_()[:size, : cells.shape[1]] = small.masked_fill(~read | wrong, 0).int()
        self.states.fill_(EMPTY)
        for index in range(size):
            start, stop = int(indptr[index]), int(indptr[index + 1])
            seen = int(used[index]) - (stop - torch.arange(start, stop, dtype=torch.int64, device=batch.device))
            state = torch.where(seen < 0, EMPTY, SEES).int()
            own = self.states[start:stop]
            own.copy_(state[: len(own)].masked_fill(faulty[index], FAULTY))

    def _finishing_launch(self, copied: bool, out: Tensor, lse: Tensor) -> Finishing:
        called = copied, out.get_device(), out.shape, out.stride(), lse.stride(), alignment(out, lse)
        return self._finishing.get(called) or self._new_finishing(called)

    def _new_finishing(self, called: Any) -> Finishing:
        copied, device, (tokens, heads, _), (of_token, of_row, _), lse_strides, aligned = called
        kernel, key = self._finish(copied), (device, of_token, of_row, lse_strides, aligned)
        grid, usual = (tokens, -(-heads // BLOCK_H[copied])), alignment(self.states, self.states if copied else None)
        states, launch = self.states, kernel.at((*key, usual), grid)
        constant, ours = (heads, self._query_len, self._natural_per_unit), (of_token, of_row, *lse_strides)

        def first(
            theirs: Tensor, strides: tuple[int, int, int], their_out: Tensor | None, out: Tensor, lse: Tensor
        ) -> None:
            found = kernel.at((*key, alignment(theirs, their_out)), grid)
            found(states, their_out, theirs, out, lse, *constant, *strides, *ours)

        if kernel.ready((*key, usual)) is None:
            return first
        address = states.data_ptr()

        def finish(
            theirs: Tensor, strides: tuple[int, int, int], their_out: Tensor | None, out: Tensor, lse: Tensor
        ) -> None:
            if alignment(theirs, their_out) != usual:  # the library returned a view at an odd address
                first(theirs, strides, their_out, out, lse)
                return
            # By address: Triton's launcher would ask the driver about each tensor.
            source = None if their_out is None else their_out.data_ptr()
            launch(address, source, theirs.data_ptr(), out.data_ptr(), lse.data_ptr(), *constant, *strides, *ours)

        if len(self._finishing) >= REMEMBERED_CALLS:
            self._finishing.clear()
        self._finishing[called] = finish
        return finish

    def _finish(self, copied: bool) -> KernelLaunch:
        if copied not in self._kernels:
            from portable_mla.backends.library.kernels.batch import finish_rows_kernel

            constants = finish_constants(self._shape.latent_dim, copied)
            self._kernels[copied] = KernelLaunch(finish_rows_kernel, constants)
        return self._kernels[copied]

    def _finish_with_torch(
        self, theirs: Tensor, strides: tuple[int, int, int], their_out: Tensor | None, out: Tensor, lse: Tensor
    ) -> None:
        """The same from torch's own operations."""
        tokens, heads = lse.shape
        given = theirs.as_strided((tokens // self._query_len, self._query_len, heads), strides) * self._natural_per_unit
        state = self.states[:tokens, None]
        fill = given.new_zeros(state.shape).masked_fill_(state != EMPTY, torch.nan)
        lse.copy_(
            torch.where(state == SEES, given.reshape(tokens, heads), torch.where(state == EMPTY, -torch.inf, fill))
        )
        result = out if their_out is None else their_out.view(out.shape)
        out.copy_(torch.where(state[..., None] == SEES, result, fill[..., None].to(out.dtype)))


def prepare_constants(page_size: int, ratio: int = 1) -> dict[str, int]:
    """Constants and options of the launch that describes a step."""
    return {"PAGE_SIZE": page_size, "RATIO": ratio, "BLOCK": 256, "BLOCK_T": 16, "num_warps": 1}


def finish_constants(latent_dim: int, copied: bool) -> dict[str, int]:
    """Constants and options of the launch that finishes rows."""
    return {"LATENT": latent_dim, "BLOCK_H": BLOCK_H[copied], "num_warps": 4}


@functools.lru_cache(maxsize=64)
def _prepare(page_size: int, ratio: int) -> KernelLaunch:
    from portable_mla.backends.library.kernels.batch import prepare_step_kernel

    return KernelLaunch(prepare_step_kernel, prepare_constants(page_size, ratio))


def _report(status: Status, fault: Fault, words: Tensor) -> None:
    """Lower a status word to the first of the faults."""
    lowest = words.amin() if words.numel() else torch.tensor(NO_FAULT, dtype=torch.int64, device=status.words.device)
    torch.minimum(status.words[fault], lowest, out=status.words[fault])
