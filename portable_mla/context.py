"""CachedContext: tokens of the latent cache that a prefill attends to, brought into their expanded form in windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.arguments import check_cache_row, check_device, check_kv_scale, check_q_dtype
from portable_mla.backend import PrefillInputs
from portable_mla.cache_format import cache_format_of, dequantise_rows
from portable_mla.device import arch_of
from portable_mla.metadata import PagedBatch
from portable_mla.shape import MLAShape

FIXED_WINDOW = 1024  # tokens of a window where a row's bits must not depend on the other sequences


@dataclass(frozen=True)
class Window:
    """Some context tokens of every sequence: from which one on, and where they lie among those of the others."""

    starts: Tensor  # [sequences] int64: first token of each
    cu_seqlens: Tensor  # [sequences + 1] int32
    rows: int  # upper bound of them all
    longest: int  # of one sequence


@dataclass(frozen=True)
class CachedContext:
    """What each sequence of a prefill has in the cache before its new tokens.

    kv_cache: [pages, page_size, row] of q's dtype or fp8, any outer strides; block_table: [sequences, width] int32;
    lens: [sequences] int32, read on the device alone; max_len: upper bound of one; max_tokens: of all together, where
    the caller knows better than sequences * max_len: the work is bounded by it. w_uk: [heads, nope, latent] and w_uv:
    [heads, v_dim, latent], of q's dtype. kv_scale: dequantisation scale of an fp8 cache, one float32 value.
    """

    kv_cache: Tensor
    block_table: Tensor
    lens: Tensor
    max_len: int
    w_uk: Tensor
    w_uv: Tensor
    max_tokens: int | None = None
    kv_scale: Tensor | None = None

    @property
    def most_tokens(self) -> int:
        """Upper bound of the tokens of all sequences."""
        return self.lens.shape[0] * self.max_len if self.max_tokens is None else self.max_tokens

    def check(self, inputs: PrefillInputs, *, values: bool) -> None:
        """Raises TypeError or ValueError for what does not fit the prefill, and with `values`, which waits for the
        device, for lengths and page ids too."""
        q, (heads, nope, latent_dim) = inputs.q, self.w_uk.shape
        for name, tensor, shape in (
            ("w_uk", self.w_uk, (q.shape[1], inputs.k_nope.shape[2], latent_dim)),
            ("w_uv", self.w_uv, (q.shape[1], inputs.v.shape[2], latent_dim)),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != q.dtype:
                raise ValueError(f"{name}: expected {shape} of {q.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")
            check_device(name, tensor, q, "q")
        if self.kv_cache.dim() != 3:
            raise ValueError(f"kv_cache: expected [pages, page_size, row], got shape {tuple(self.kv_cache.shape)}")
        cache_format = cache_format_of(self.kv_cache.dtype)
        check_q_dtype(q.dtype, cache_format)
        check_kv_scale(self.kv_scale, cache_format, arch_of(q.device), self.kv_cache)
        page_size, rope_dim = self.kv_cache.shape[1], inputs.k_pe.shape[1]
        check_cache_row(self.kv_cache, MLAShape(heads, latent_dim, rope_dim, page_size, q.dtype, cache_format, nope))
        batch = PagedBatch(self.block_table, self.lens)
        if batch.size != inputs.sequences:
            raise ValueError(f"lens: expected one for each of {inputs.sequences} sequences, got {batch.size}")
        for name, tensor in (("kv_cache", self.kv_cache), ("lens", self.lens)):
            check_device(name, tensor, q, "q")
        if values:
            batch.check_values(page_size, self.kv_cache.shape[0], batch.size)
            longest = int(self.lens.max()) if batch.size else 0
            if longest > self.max_len:
                raise ValueError(f"lens: expected at most {self.max_len} (max_len), got {longest}")

    def windows(self, rows: int, *, fixed: bool) -> Iterator[Window]:
        """All of the context in windows of at most so many rows. fixed: of one sequence each, cut by its own length and
        all of one size, since a matrix product's bits may depend on its rows."""
        sequences = self.lens.shape[0]
        lens = self.lens.long()
        if not fixed:
            ends = torch.cumsum(lens, 0)
            indptr = torch.cat([ends.new_zeros(1), ends])
            for low in range(0, self.most_tokens, rows):
                taken = min(rows, self.most_tokens - low)
                starts = (low - indptr[:-1]).clamp(min=0)
                yield Window(starts, (indptr - low).clamp(0, taken).int(), taken, min(taken, self.max_len))
            return
        length = min(rows, FIXED_WINDOW)
        index = torch.arange(sequences, device=lens.device)
        for sequence in range(sequences):
            for low in range(0, self.max_len, length):
                some = (lens - low).clamp(0, length).masked_fill(index != sequence, 0)
                cu_seqlens = torch.cat([some.new_zeros(1), torch.cumsum(some, 0)]).int()
                yield Window(torch.full_like(lens, low), cu_seqlens, length, length)

    def gather(self, window: Window, out: Tensor) -> None:
        """Write the window's latent rows, dequantised, to out [rows, latent + rope]; NaN for a page that is not there.
        Rows past the window are anything."""
        pages, page_size, _ = self.kv_cache.shape
        row = torch.arange(window.rows, device=out.device)
        sequence = torch.searchsorted(window.cu_seqlens, row.int(), right=True) - 1
        sequence = sequence.clamp(max=self.lens.shape[0] - 1)
        position = window.starts[sequence] + row - window.cu_seqlens[sequence]
        column = position // page_size
        last = self.block_table.shape[1] - 1
        page = self.block_table[sequence, column.clamp(max=last)].long()
        absent = (page < 0) | (page >= pages) | (column > last)
        stored = self.kv_cache[page.masked_fill(absent, 0), position % page_size]
        rows = dequantise_rows(stored, cache_format_of(self.kv_cache.dtype), self.kv_scale, out.dtype)
        out.copy_(rows.masked_fill_(absent[:, None], torch.nan))
