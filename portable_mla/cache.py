"""PagedLatentCache: the latent rows of many requests in pages, for every layer of a model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from portable_mla.metadata import PagedBatch
from portable_mla.pages import PagePool
from portable_mla.shape import MLAShape


class PagedLatentCache:
    """A page pool and the storage behind it; all layers share one page table.

    storage: [layers, pages, page_size, row_width] in the cache format's dtype, uninitialised: kernels never let a slot
    that was not written reach an output.
    """

    def __init__(self, shape: MLAShape, pages: int, *, layers: int = 1, device: torch.device | str = "cpu") -> None:
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.shape = shape
        self.pool = PagePool(pages, shape.page_size)
        self.storage = torch.empty(
            layers, pages, shape.page_size, shape.row_width, dtype=shape.cache_format.dtype, device=device
        )

    def __getitem__(self, layer: int) -> Tensor:
        """One layer's cache [pages, page_size, row_width], as the attention takes it."""
        return self.storage[layer]

    def allocate(self, request: Hashable, tokens: int) -> None:
        """Give a new request room for `tokens`; raises CacheFull, and changes nothing, when there is none."""
        self.pool.allocate(request, tokens)

    def extend(self, request: Hashable, tokens: int = 1) -> None:
        """Add room for `tokens` to a request; raises CacheFull, and changes nothing, when there is none."""
        self.pool.extend(request, tokens)

    def free(self, request: Hashable) -> None:
        """Return a request's pages."""
        self.pool.free(request)

    def batch(
        self, requests: Sequence[Hashable], *, query_lens: Sequence[int] | None = None, max_query_len: int = 1
    ) -> PagedBatch:
        """The step's batch: page table, lengths and positions of `requests`, in this order, on the cache's device."""
        device = self.storage.device
        pages = [self.pool.pages(request) for request in requests]
        kv_lens = [self.pool.kv_len(request) for request in requests]
        width = max((len(row) for row in pages), default=1) or 1
        table = torch.tensor([[*row, *[0] * (width - len(row))] for row in pages], dtype=torch.int32)
        lens = [max_query_len] * len(requests) if query_lens is None else list(query_lens)
        positions = [p for kv_len, n in zip(kv_lens, lens, strict=True) for p in range(kv_len - n, kv_len)]
        return PagedBatch(
            table.view(len(requests), width).to(device),
            torch.tensor(kv_lens, dtype=torch.int32, device=device),
            None if query_lens is None else torch.tensor(lens, dtype=torch.int32, device=device),
            max_query_len,
            torch.tensor(positions, dtype=torch.int64, device=device),
        )

    def slots(self, request: Hashable, start: int, stop: int) -> Tensor:
        """[stop - start] int64: the flat slots `page * page_size + offset` of a request's tokens."""
        kv_len = self.pool.kv_len(request)
        if not 0 <= start <= stop <= kv_len:
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {kv_len}, got {start} and {stop}")
        page_size = self.shape.page_size
        pages = torch.tensor(self.pool.pages(request), dtype=torch.int64)
        tokens = torch.arange(start, stop)
        return (pages[tokens // page_size] * page_size + tokens % page_size).to(self.storage.device)

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Store rows [tokens, row_width], already in the cache's dtype, at `slots` of one layer."""
        if rows.dtype != self.storage.dtype or rows.shape != (slots.shape[0], self.shape.row_width):
            raise ValueError(
                f"rows: expected [{slots.shape[0]}, {self.shape.row_width}] {self.storage.dtype}, "
                f"got {list(rows.shape)} {rows.dtype}"
            )
        self.storage[layer].view(-1, self.shape.row_width)[slots] = rows
