"""PagedLatentCache: the latent rows of many requests in pages, for every layer of a model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from portable_mla.cache.page_pool import PagePool
from portable_mla.cache.write_arguments import check_slots
from portable_mla.core.checks import check_device
from portable_mla.core.shape import MLAShape
from portable_mla.metadata import PagedBatch
from portable_mla.runtime.torch_ops import without_gradients
from portable_mla.settings import Settings


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
        table = torch.tensor([[*row, *[0] * (width - len(row))] for row in pages], dtype=torch.int32, device="cpu")
        lens = [max_query_len] * len(requests) if query_lens is None else list(query_lens)
        positions = [max(p, 0) for kv_len, n in zip(kv_lens, lens, strict=True) for p in range(kv_len - n, kv_len)]
        return PagedBatch(
            table.view(len(requests), width).to(device),
            torch.tensor(kv_lens, dtype=torch.int32, device=device),
            None if query_lens is None else torch.tensor(lens, dtype=torch.int32, device=device),
            max_query_len,
            torch.tensor(positions, dtype=torch.int64, device=device),
            kv_lens_on_host=tuple(kv_lens),
        )

    def slots(self, request: Hashable, start: int, stop: int) -> Tensor:
        """[stop - start] int64: the flat slots `page * page_size + offset` of a request's tokens."""
        kv_len = self.pool.kv_len(request)
        if not 0 <= start <= stop <= kv_len:
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {kv_len}, got {start} and {stop}")
        page_size = self.shape.page_size
        pages = torch.tensor(self.pool.pages(request), dtype=torch.int64, device="cpu")
        tokens = torch.arange(start, stop, dtype=torch.int64, device="cpu")
        return (pages[tokens // page_size] * page_size + tokens % page_size).to(self.storage.device)

    @without_gradients()
    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Store rows [tokens, row_width], in the cache's dtype, at `slots` [tokens] int32 or int64 of one layer.

        -1 stores nothing. Raises IndexError naming the token for any other slot outside the cache, and writes nothing,
        where values are in host memory or under PORTABLE_MLA_DEBUG=1; on a GPU such a slot stores nothing, without a
        sync. Raises TypeError or ValueError for what does not fit.
        """
        self._check_write(layer, slots, rows)
        stored = self.storage[layer].view(-1, self.shape.row_width)
        if stored.dtype.itemsize == 1:  # torch selects no fp8
            stored, rows = stored.view(torch.uint8), rows.view(torch.uint8)
        if not slots.is_cuda or Settings.from_env().debug:
            check_slots(slots, len(stored))
        if not slots.is_cuda:
            kept = slots >= 0
            stored[slots[kept].long()] = rows[kept]
        elif len(slots) and len(stored):
            _write_on_device(stored, slots.long(), rows)

    def _check_write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        if not 0 <= layer < len(self.storage):
            raise IndexError(f"layer: expected 0 to {len(self.storage) - 1}, got {layer}")
        if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1:
            raise TypeError(f"slots: expected [tokens] int32 or int64, got {list(slots.shape)} {slots.dtype}")
        if rows.dtype != self.storage.dtype or rows.shape != (slots.shape[0], self.shape.row_width):
            raise ValueError(
                f"rows: expected [{slots.shape[0]}, {self.shape.row_width}] {self.storage.dtype}, "
                f"got {list(rows.shape)} {rows.dtype}"
            )
        check_device("slots", slots, self.storage, "the cache")
        check_device("rows", rows, self.storage, "the cache")


def _write_on_device(stored: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Store rows where their slot is one of `stored`'s, and read no value on the host: the others repeat the first of
    those, or write back what is there."""
    valid = (slots >= 0) & (slots < len(stored))
    first = valid.int().argmax()
    spare_slot = torch.where(valid.any(), slots[first], 0)
    spare_row = torch.where(valid.any(), rows[first], stored[0])
    stored[torch.where(valid, slots, spare_slot)] = torch.where(valid[:, None], rows, spare_row)
