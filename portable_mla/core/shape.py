"""What a call looks like, as facts that hold no tensors: MLAShape, Capacity, Request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

import torch

from portable_mla.core.arch import Arch
from portable_mla.core.cache_format import CacheFormat, cache_format_of


class Phase(Enum):
    """decode: queries against the latent cache (absorbed). prefill: expanded per-head keys and values."""

    decode = "decode"
    prefill = "prefill"


@dataclass(frozen=True)
class MLAShape:
    """One rank's view of a model's attention.

    latent_dim and rope_dim are the two parts of a cache row (rope_dim may be 0); page_size is in tokens; nope_dim and
    v_dim are the per-head widths of the expanded form, None where only absorbed decode is used. A prefill reads heads,
    nope_dim, rope_dim, v_dim and q_dtype alone, and is described by `expanded` where there is no cache.
    Raises ValueError for values that are not positive.
    """

    heads: int
    latent_dim: int
    rope_dim: int
    page_size: int
    q_dtype: torch.dtype
    cache_format: CacheFormat
    nope_dim: int | None = None
    v_dim: int | None = None

    def __post_init__(self) -> None:
        widths = [(name, 1) for name in ("nope_dim", "v_dim") if getattr(self, name) is not None]
        least_latent = 0 if len(widths) == 2 else 1
        for name, least in (("heads", 1), ("latent_dim", least_latent), ("rope_dim", 0), ("page_size", 1), *widths):
            _at_least(name, getattr(self, name), least)
        self.cache_format.row_width(self.latent_dim, self.rope_dim)

    @classmethod
    def expanded(cls, heads: int, nope_dim: int, rope_dim: int, v_dim: int, q_dtype: torch.dtype) -> MLAShape:
        """The shape of a prefill that knows no latent cache: latent_dim is 0, page_size 1."""
        return cls(heads, 0, rope_dim, 1, q_dtype, cache_format_of(q_dtype), nope_dim, v_dim)

    @property
    def qk_dim(self) -> int:
        """Width of an absorbed query and of a dequantised cache row."""
        return self.latent_dim + self.rope_dim

    @property
    def row_width(self) -> int:
        """Elements of one stored cache row."""
        return self.cache_format.row_width(self.latent_dim, self.rope_dim)


@dataclass(frozen=True)
class Capacity:
    """Upper bounds that hold for the life of a plan: they size buffers, grids and captured graphs.

    max_context: tokens of one request; max_pages: pages of one layer's cache; cache_bytes: bytes from the first to the
    last byte of one layer's cache (kernels with 32-bit offsets refuse large ones), None for those of max_pages dense
    pages: see `Request.cache_bytes`. Of a prefill, max_batch are sequences, max_query_len and max_context the caller's
    max_seqlen_q and max_seqlen_k, and nothing is in pages.
    """

    max_batch: int
    max_query_tokens: int
    max_query_len: int
    max_context: int
    max_pages: int
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "cache_bytes" or self.cache_bytes is not None:
                _at_least(field.name, getattr(self, field.name), 0)
        _at_least("max_query_len", self.max_query_len, 1)


@dataclass(frozen=True)
class Request:
    """Everything that a refusal or an order of backends may read. Hashable, and free of tensors, so that dispatch for
    any architecture can be asked on any machine.

    uniform_queries: every request of a batch has exactly max_query_len query tokens.
    deterministic: a row's bits must not depend on the rest of the batch.
    float32_out: of a prefill whose results are merged afterwards, out is float32; else it has q's dtype.
    """

    arch: Arch
    shape: MLAShape
    phase: Phase
    max_query_len: int
    uniform_queries: bool
    deterministic: bool
    capacity: Capacity
    float32_out: bool = False

    def __str__(self) -> str:
        queries = "uniform" if self.uniform_queries else "ragged"
        return (
            f"{self.phase.value} on {self.arch.name}: {self.shape.heads} heads, {self._widths()}, "
            f"query_len <= {self.max_query_len} ({queries}), "
            f"{'float32 out, ' if self.float32_out else ''}{'deterministic, ' if self.deterministic else ''}"
            f"batch <= {self.capacity.max_batch}, context <= {self.capacity.max_context}"
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes that one layer's cache spans at most: those that the capacity states, else those of its dense pages."""
        shape, capacity = self.shape, self.capacity
        if capacity.cache_bytes is not None:
            return capacity.cache_bytes
        return capacity.max_pages * shape.page_size * shape.row_width * shape.cache_format.dtype.itemsize

    def unstated(self) -> tuple[str, ...]:
        """What a prefill needs to know of its shape and does not, as reasons of a refusal."""
        nope_dim, v_dim = self.shape.nope_dim, self.shape.v_dim
        if self.phase is Phase.decode or None not in (nope_dim, v_dim):
            return ()
        return (f"needs a shape's nope_dim and v_dim, got {nope_dim} and {v_dim}",)

    def _widths(self) -> str:
        shape, dtype = self.shape, str(self.shape.q_dtype).removeprefix("torch.")
        if self.phase is Phase.prefill:
            return f"nope {shape.nope_dim} + rope {shape.rope_dim}, v {shape.v_dim}, q {dtype}"
        return (
            f"latent {shape.latent_dim} + rope {shape.rope_dim}, page_size {shape.page_size}, q {dtype}, "
            f"cache {shape.cache_format.name}"
        )


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
