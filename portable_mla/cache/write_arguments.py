"""WriteArguments: the tensors of one cache write, checked from host attributes alone (no sync, no launch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.cache_format import CacheFormat, cache_format_of
from portable_mla.core.checks import check_cache_alignment, check_dense, check_device, check_kv_scale
from portable_mla.core.device import arch_of
from portable_mla.core.rope import RopeLayout
from portable_mla.metadata.status import Fault

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class WriteArguments:
    """One cache write. Shapes as in `write_latent`; q_source: what is rotated into q_pe, None for q_pe itself."""

    kv_cache: Tensor
    slots: Tensor
    c_kv: Tensor
    k_pe: Tensor | None
    norm_weight: Tensor | None
    eps: float
    positions: Tensor | None
    cos_sin: Tensor | None
    interleaved: bool
    kv_scale: Tensor | None
    q_source: Tensor | None
    q_pe: Tensor | None
    rows: Tensor | None
    status: Tensor | None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_shapes()
        self._check_rope()
        check_kv_scale(self.kv_scale, self.cache_format, arch_of(self.kv_cache.device), self.kv_cache)
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: expected a finite number, at least 0, got {self.eps}")
        check_cache_alignment(self.kv_cache, self.cache_format)

    @property
    def cache_format(self) -> CacheFormat:
        """How the cache stores rows."""
        return cache_format_of(self.kv_cache.dtype)

    @property
    def latent_dim(self) -> int:
        """Width of c_kv."""
        return self.c_kv.shape[1]

    @property
    def rope_dim(self) -> int:
        """Width of k_pe."""
        return 0 if self.k_pe is None else self.k_pe.shape[1]

    @property
    def rope_layout(self) -> RopeLayout:
        """Which values turn together."""
        return "interleaved" if self.interleaved else "half"

    def check_values(self) -> None:
        """Slots and positions name rows that exist; IndexError otherwise. Reads them on the host."""
        check_slots(self.slots, self.kv_cache.shape[0] * self.kv_cache.shape[1])
        if self.cos_sin is not None and self.positions is not None:
            _check_range("positions", self.positions[: len(self.slots)], 0, len(self.cos_sin))

    def _check_kinds(self) -> None:
        """Every tensor has its number of dimensions and a dtype of its kind, and lives with the cache."""
        for name, tensor, dims, dtypes in (
            ("kv_cache", self.kv_cache, 3, None),
            ("slots", self.slots, 1, _INDICES),
            ("c_kv", self.c_kv, 2, _FLOATS),
            ("k_pe", self.k_pe, 2, _FLOATS),
            ("norm_weight", self.norm_weight, 1, _FLOATS),
            ("positions", self.positions, 1, _INDICES),
            ("cos_sin", self.cos_sin, 2, _FLOATS),
            ("q_pe", self.q_source, 3, _FLOATS),
            ("q_pe" if self.q_source is None else "q_pe_out", self.q_pe, 3, _FLOATS),
            ("rows_out", self.rows, 2, _FLOATS),
            ("status", self.status, 1, (torch.int64,)),
        ):
            if tensor is None:
                continue
            if tensor.dim() != dims:
                raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
            if dtypes is not None and tensor.dtype not in dtypes:
                raise TypeError(f"{name}: expected a dtype of {', '.join(map(str, dtypes))}, got {tensor.dtype}")
            check_device(name, tensor, self.kv_cache)
            if name not in ("slots", "positions"):
                check_dense(name, tensor)

    def _check_shapes(self) -> None:
        tokens, width = len(self.slots), self.latent_dim + self.rope_dim
        row_width = self.cache_format.row_width(self.latent_dim, self.rope_dim)
        q = self.q_pe if self.q_source is None else self.q_source
        heads = 0 if q is None else q.shape[1]
        for name, tensor, shape in (
            ("kv_cache", self.kv_cache, (*self.kv_cache.shape[:2], row_width)),
            ("c_kv", self.c_kv, (tokens, self.latent_dim)),
            ("k_pe", self.k_pe, (tokens, self.rope_dim)),
            ("norm_weight", self.norm_weight, (self.latent_dim,)),
            ("q_pe", q, (tokens, heads, self.rope_dim)),
            ("q_pe_out", self.q_pe, (tokens, heads, self.rope_dim)),
            ("rows_out", self.rows, (tokens, width)),
            ("status", self.status, (len(Fault),)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if self.q_source is not None and self.q_pe is not None and self.q_pe.dtype != self.q_source.dtype:
            raise TypeError(f"q_pe_out: expected {self.q_source.dtype} like q_pe, got {self.q_pe.dtype}")

    def _check_rope(self) -> None:
        """A table and positions come together, for something to turn."""
        if self.k_pe is not None and (self.rope_dim == 0 or self.rope_dim % 2):
            raise ValueError(f"k_pe: expected a positive even width, got {self.rope_dim}; None where there is no rope")
        if self.q_pe is not None and self.cos_sin is None:
            raise ValueError("cos_sin: expected a table to rotate q_pe with, got None")
        if self.cos_sin is None or self.positions is None:
            if self.cos_sin is not self.positions:
                missing = "positions" if self.positions is None else "cos_sin"
                raise ValueError(f"{missing}: positions and cos_sin come together, got None")
            return
        if self.k_pe is None:
            raise ValueError("k_pe: expected a tensor to rotate by cos_sin, got None")
        if self.cos_sin.shape[1] != self.rope_dim:
            raise ValueError(f"cos_sin: expected rows of {self.rope_dim} like k_pe, got {self.cos_sin.shape[1]}")
        if len(self.positions) < len(self.slots):
            raise ValueError(f"positions: expected at least {len(self.slots)}, got {len(self.positions)}")


def is_interleaved(layout: str) -> bool:
    """Of a rope_layout; ValueError for one that is not known."""
    if layout not in ("half", "interleaved"):
        raise ValueError(f"rope_layout: expected 'half' or 'interleaved', got {layout!r}")
    return layout == "interleaved"


def check_slots(slots: Tensor, total: int) -> None:
    """Slots by value: -1 is nowhere, any other is one of the `total`. Raises IndexError naming the token."""
    _check_range("slots", slots, -1, total)


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    wrong = (values < low) | (values >= high)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0, 0])
        raise IndexError(f"{name}: token {token}: expected {low} to {high - 1}, got {int(values[token])}")
