"""CachedContext: tokens of the latent cache that a prefill attends to, brought into their expanded form in windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.cache_format import cache_format_of
from portable_mla.core.checks import check_cache_row, check_device, check_kv_scale, check_q_dtype
from portable_mla.core.device import arch_of
from portable_mla.core.quantize import dequantise_rows
from portable_mla.core.scalars import check_bound
from portable_mla.core.shape import MLAShape
from portable_mla.decode.api import scale_tensor
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.metadata import PagedBatch
from portable_mla.prefill.context_bounds import poison_rows

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
    the caller knows better than sequences * max_len: the work is bounded by it. Lengths over a bound are a ValueError
    where they are in host memory or under PORTABLE_MLA_DEBUG=1; elsewhere the rows of such a sequence are NaN, and the
    status words (`MLAAttention.status_words`), if given, say which. w_uk: [heads, nope, latent] and w_uv:
    [heads, v_dim, latent], of q's dtype. kv_scale: dequantisation scale of an fp8 cache, a float or one float32 value.
    """

    kv_cache: Tensor
    block_table: Tensor
    lens: Tensor
    max_len: int
    w_uk: Tensor
    w_uv: Tensor
    max_tokens: int | None = None
    kv_scale: Tensor | float | None = None
    status: Tensor | None = None

    def __post_init__(self) -> None:
        check_bound("max_len", self.max_len)
        if self.max_tokens is not None:
            check_bound("max_tokens", self.max_tokens)
        for name in ("kv_cache", "block_table", "lens", "w_uk", "w_uv"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(getattr(self, name)).__name__}")
        for name, dimensions in (("w_uk", "[heads, nope, latent]"), ("w_uv", "[heads, v_dim, latent]")):
            if getattr(self, name).dim() != 3:
                raise ValueError(f"{name}: expected {dimensions}, got shape {tuple(getattr(self, name).shape)}")
        object.__setattr__(self, "kv_scale", scale_tensor(self.kv_scale, self.kv_cache.device))

    @property
    def scale(self) -> Tensor | None:
        """kv_scale as a tensor; NaN where the device finds that it is not positive and finite."""
        scale = self.kv_scale
        assert scale is None or isinstance(scale, Tensor), "converted"
        if scale is None or scale.device.type == "cpu":
            return scale
        return torch.where((scale > 0) & (scale < torch.inf), scale, torch.nan)

    @property
    def most_tokens(self) -> int:
        """Upper bound of the tokens of all sequences."""
        most = self.lens.shape[0] * self.max_len
        return most if self.max_tokens is None else min(most, self.max_tokens)

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
        scale = self.kv_scale
        assert scale is None or isinstance(scale, Tensor), "converted"
        check_kv_scale(scale, cache_format, arch_of(q.device), self.kv_cache, values=values)
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
            total = int(self.lens.sum())
            if total > self.most_tokens:
                raise ValueError(f"max_tokens: expected at least {total}, the sum of lens, got {self.max_tokens}")

    def poison(self, cu_seqlens_q: Tensor, out: Tensor, lse: Tensor) -> None:
        """Make the rows NaN whose context is over the bounds, which windows leave out; reads nothing on the host."""
        bounds = {"max_len": self.max_len, "max_tokens": self.most_tokens}
        poison_rows(self.lens, cu_seqlens_q, out, lse, **bounds, status=self.status)

    def windows(self, rows: int, *, fixed: bool) -> Iterator[Window]:
        """All of the context in windows of at most so many rows. fixed: of one sequence each, cut by its own length and
        all of one size, since a matrix product's bits may depend on its rows."""
        sequences = self.lens.shape[0]
        lens = self.lens.long().clamp(min=0)
        if not fixed:
            ends = torch.cumsum(lens, 0)
            indptr = torch.cat([ends.new_zeros(1), ends])
            for low in range(0, self.most_tokens, rows):
                taken = min(rows, self.most_tokens - low)
                starts = (low - indptr[:-1]).clamp(min=0)
                yield Window(starts, (indptr - low).clamp(0, taken).int(), taken, min(taken, self.max_len))
            return
        length = min(rows, FIXED_WINDOW)
        index = torch.arange(sequences, device=lens.device, dtype=torch.int64)
        for sequence in range(sequences):
            for low in range(0, self.max_len, length):
                some = (lens - low).clamp(0, length).masked_fill(index != sequence, 0)
                cu_seqlens = torch.cat([some.new_zeros(1), torch.cumsum(some, 0)]).int()
                yield Window(torch.full_like(lens, low), cu_seqlens, length, length)

    def gather(self, window: Window, out: Tensor) -> None:
        """Write the window's latent rows, dequantised, to out [rows, latent + rope]; NaN for a page that is not there.
        Rows past the window are anything."""
        pages, page_size, _ = self.kv_cache.shape
        if not pages:
            out.fill_(torch.nan)
            return
        row = torch.arange(window.rows, device=out.device, dtype=torch.int64)
        sequence = torch.searchsorted(window.cu_seqlens, row.int(), right=True) - 1
        sequence = sequence.clamp(max=self.lens.shape[0] - 1)
        position = window.starts[sequence] + row - window.cu_seqlens[sequence]
        column = position // page_size
        last = self.block_table.shape[1] - 1
        page = self.block_table[sequence, column.clamp(max=last)].long()
        absent = (page < 0) | (page >= pages) | (column > last)
        stored = self.kv_cache[page.masked_fill(absent, 0), position % page_size]
        rows = dequantise_rows(stored, cache_format_of(self.kv_cache.dtype), self.scale, out.dtype)
        out.copy_(rows.masked_fill_(absent[:, None], torch.nan))
