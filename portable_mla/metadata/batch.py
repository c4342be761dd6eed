"""PagedBatch: one step's requests over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """One step's requests, as the caller holds them. All tensors live on one device.

    kv_lens include this step's tokens. Query token i of the n of a request sees positions <= kv_len - n + i.
    query_lens None: every request has exactly max_query_len query tokens; else max_query_len is the caller's upper
    bound. Cells of block_table past a request's last page are never read. A table without columns is one of requests
    without pages.
    """

    block_table: Tensor  # [batch, width] int32: page ids, any row stride
    kv_lens: Tensor  # [batch] int32
    query_lens: Tensor | None = None  # [batch] int32
    max_query_len: int = 1
    positions: Tensor | None = None  # [tokens] int32 or int64: RoPE positions, 0 for query tokens before the first
    kv_lens_on_host: Sequence[int] | None = None  # kv_lens as the scheduler has them, where it has: spares a sync

    def __post_init__(self) -> None:
        _check_ints("block_table", self.block_table, 2)
        if self.block_table.shape[1] == 0:
            object.__setattr__(self, "block_table", self.block_table.new_full((self.block_table.shape[0], 1), -1))
        _check_per_request("kv_lens", self.kv_lens, self.block_table)
        if self.query_lens is not None:
            _check_per_request("query_lens", self.query_lens, self.block_table)
        if self.max_query_len < 1:
            raise ValueError(f"max_query_len: expected at least 1, got {self.max_query_len}")
        if self.positions is not None:
            self._check_positions(self.positions)
        if self.kv_lens_on_host is not None and len(self.kv_lens_on_host) != self.size:
            raise ValueError(f"kv_lens_on_host: expected {self.size} lengths, got {len(self.kv_lens_on_host)}")

    def _check_positions(self, positions: Tensor) -> None:
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
        if positions.dim() != 1 or (positions.shape[0] > 1 and positions.stride(0) != 1):
            raise ValueError(
                f"positions: expected one dense dimension, got shape {tuple(positions.shape)} and strides "
                f"{positions.stride()}"
            )
        if positions.device != self.device:
            raise ValueError(f"positions: is on {positions.device}, block_table on {self.device}")
        tokens = self.size * self.max_query_len
        if self.query_lens is None and positions.shape[0] != tokens:
            raise ValueError(f"positions: expected one for each of {tokens} query tokens, got {positions.shape[0]}")

    @property
    def size(self) -> int:
        """Requests in the batch."""
        return self.kv_lens.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the batch lives."""
        return self.block_table.device

    def check_values(self, page_size: int, max_pages: int, max_query_tokens: int) -> None:
        """Check lengths and page ids by value: free for a batch in host memory, a sync for one on a GPU.

        Raises ValueError for a length outside its bounds and IndexError for a page id outside the cache, each naming
        the request.
        """
        if self.kv_lens_on_host is not None and self.kv_lens.tolist() != list(self.kv_lens_on_host):
            expected, got = self.kv_lens.tolist(), list(self.kv_lens_on_host)
            raise ValueError(f"kv_lens_on_host: expected those of kv_lens, {expected}, got {got}")
        capacity = self.block_table.shape[1] * page_size
        _check_range("kv_lens", self.kv_lens, capacity, f"block_table holds {capacity} tokens a request")
        tokens = self.size * self.max_query_len
        if self.query_lens is not None:
            _check_range("query_lens", self.query_lens, self.max_query_len, "that is max_query_len")
            tokens = int(self.query_lens.sum())
        if tokens > max_query_tokens:
            raise ValueError(f"query_lens: {tokens} query tokens, but there is room for {max_query_tokens}")
        columns = torch.arange(self.block_table.shape[1], device=self.device, dtype=torch.int64)
        read = columns * page_size < self.kv_lens[:, None]
        bad = read & ((self.block_table < 0) | (self.block_table >= max_pages))
        if bool(bad.any()):
            request, column = bad.nonzero()[0].tolist()
            page = int(self.block_table[request, column])
            raise IndexError(
                f"block_table: request {request} column {column}: expected a page in [0, {max_pages}), got {page}"
            )


def _check_ints(name: str, tensor: Tensor, rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {tensor.dtype}. Convert with .to(torch.int32)")
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last-dimension stride of 1, got strides {tensor.stride()}")


def _check_per_request(name: str, tensor: Tensor, block_table: Tensor) -> None:
    _check_ints(name, tensor, 1)
    if tensor.shape[0] != block_table.shape[0]:
        raise ValueError(f"{name}: expected [{block_table.shape[0]}] as block_table has rows, got {tensor.shape[0]}")
    if tensor.device != block_table.device:
        raise ValueError(f"{name}: is on {tensor.device}, block_table on {block_table.device}")


def _check_range(name: str, lens: Tensor, most: int, why: str) -> None:
    bad = ((lens < 0) | (lens > most)).nonzero()
    if bad.numel():
        row = int(bad[0])
        raise ValueError(f"{name}: request {row}: expected 0 to {most} ({why}), got {int(lens[row])}")
