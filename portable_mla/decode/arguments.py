"""DecodeArguments: the tensors of one decode call, checked from host attributes alone (no sync, no launch)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from portable_mla.core.cache_format import CacheFormat, cache_format_of
from portable_mla.core.checks import (
    check_cache_row,
    check_device,
    check_kv_scale,
    check_q_dtype,
    check_tensors,
    span_bytes,
)
from portable_mla.core.device import arch_of
from portable_mla.core.scalars import check_scale
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.metadata import PagedBatch


@dataclass(frozen=True)
class DecodeArguments:
    """One decode call as the caller made it. Shapes as in `mla_decode`."""

    q: Tensor
    kv_cache: Tensor
    batch: PagedBatch
    latent_dim: int
    softmax_scale: float
    kv_scale: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensors(self.q, self.kv_cache)
        check_device("block_table", self.batch.block_table, self.kv_cache)
        object.__setattr__(self, "softmax_scale", check_scale("softmax_scale", self.softmax_scale))
        check_kv_scale(self.kv_scale, cache_format_of(self.kv_cache.dtype), arch_of(self.q.device), self.kv_cache)
        shape = self.shape
        if self.q.shape[2] != shape.qk_dim:
            raise ValueError(f"q: expected last dimension {shape.qk_dim}, got {self.q.shape[2]}")
        check_cache_row(self.kv_cache, shape)
        check_q_dtype(self.q.dtype, shape.cache_format)
        batch = self.batch
        tokens = batch.size * batch.max_query_len
        if batch.query_lens is None and self.q.shape[0] != tokens:
            raise ValueError(
                f"q: expected {tokens} tokens ({batch.size} requests x max_query_len {batch.max_query_len}), "
                f"got {self.q.shape[0]}. Give query_lens for ragged queries"
            )

    @functools.cached_property
    def shape(self) -> MLAShape:
        """What the tensors say of the model."""
        cache_format = cache_format_of(self.kv_cache.dtype)
        rope_dim = 64 if cache_format is CacheFormat.fp8_656 else self.q.shape[2] - self.latent_dim
        if self.latent_dim < 1 or rope_dim < 0:
            raise ValueError(
                f"latent_dim: expected 1 to {self.q.shape[2]} (q's last dimension is latent + rope), "
                f"got {self.latent_dim}"
            )
        page_size = self.kv_cache.shape[1]
        return MLAShape(self.q.shape[1], self.latent_dim, rope_dim, page_size, self.q.dtype, cache_format)

    def request(self, deterministic: bool) -> Request:
        """The tightest request that this call fits."""
        batch, shape = self.batch, self.shape
        capacity = Capacity(
            max_batch=batch.size,
            max_query_tokens=self.q.shape[0],
            max_query_len=batch.max_query_len,
            max_context=batch.block_table.shape[1] * shape.page_size,
            max_pages=self.kv_cache.shape[0],
            cache_bytes=span_bytes(self.kv_cache),
        )
        uniform = batch.query_lens is None
        arch = arch_of(self.q.device)
        return Request(arch, shape, Phase.decode, batch.max_query_len, uniform, deterministic, capacity)
