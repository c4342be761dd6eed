"""CacheFormat: how one latent row is stored, and its dequantisation."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

GROUP = 128  # latent values that share one scale in fp8_656
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
_SMALLEST_SCALE = 2.0**-126


class CacheFormat(Enum):
    """Storage of a latent row `c_kv[latent] ++ k_pe[rope]`.

    fp8_656 is the byte row of FlashMLA (DeepSeek, 2025): 512 e4m3fn values, 4 float32 scales (one a group of 128),
    64 bfloat16 rope values.
    """

    bf16 = torch.bfloat16
    fp16 = torch.float16
    fp32 = torch.float32
    fp8_e4m3 = torch.float8_e4m3fn
    fp8_e4m3fnuz = torch.float8_e4m3fnuz
    fp8_656 = torch.uint8

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the cache tensor."""
        dtype: torch.dtype = self.value
        return dtype

    @property
    def quantised(self) -> bool:
        """Whether rows must be dequantised before they are attended to."""
        return self.dtype.itemsize == 1

    @property
    def float8(self) -> torch.dtype | None:
        """The flavour of the values of a quantised format."""
        return torch.float8_e4m3fn if self is CacheFormat.fp8_656 else self.dtype if self.quantised else None

    @property
    def needs_scale(self) -> bool:
        """Whether the call must carry a per-tensor `kv_scale` (fp8_656 carries its scales in each row)."""
        return self.quantised and self is not CacheFormat.fp8_656

    def row_width(self, latent_dim: int, rope_dim: int) -> int:
        """Elements of `dtype` in one stored row; raises ValueError for a geometry the format cannot hold."""
        if self is not CacheFormat.fp8_656:
            return latent_dim + rope_dim
        if (latent_dim, rope_dim) != (512, 64):
            raise ValueError(f"fp8_656 rows hold latent 512 and rope 64, got latent {latent_dim} and rope {rope_dim}")
        return 656


def cache_format_of(dtype: torch.dtype) -> CacheFormat:
    """The format that a cache tensor of this dtype holds; TypeError with the supported dtypes otherwise."""
    for cache_format in CacheFormat:
        if cache_format.dtype is dtype:
            return cache_format
    supported = ", ".join(str(cache_format.dtype) for cache_format in CacheFormat)
    raise TypeError(f"kv_cache: expected a dtype of {supported}, got {dtype}")


def stored_parts(rows: Tensor, cache_format: CacheFormat, latent_dim: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of rows [..., row_width] as stored: latents, rope, and the group scales of fp8_656."""
    if cache_format is not CacheFormat.fp8_656:
        return rows[..., :latent_dim], rows[..., latent_dim:], None
    latent, scales, rope = rows[..., :512], rows[..., 512:528], rows[..., 528:]
    return latent.view(torch.float8_e4m3fn), rope.view(torch.bfloat16), scales.view(torch.float32)


def quantise_rows(rows: Tensor, cache_format: CacheFormat, kv_scale: Tensor | None) -> Tensor:
    """float32 rows [tokens, latent + rope] -> [tokens, row_width] as stored, each value rounded once.

    fp8 values are clamped to the format's range. The scale of a group of fp8_656 is the smallest power of two that
    brings its largest value into the range, so that a dequantised value is exact in bfloat16.
    """
    if not cache_format.quantised:
        return rows.to(cache_format.dtype)
    if cache_format is not CacheFormat.fp8_656:
        assert kv_scale is not None, "checked"
        return to_float8(rows / kv_scale, cache_format.dtype)
    stored = torch.empty(*rows.shape[:-1], 656, dtype=torch.uint8, device=rows.device)
    latent, rope, scales = stored_parts(stored, cache_format, 512)
    assert scales is not None
    groups = rows[..., :512].unflatten(-1, (4, GROUP))
    largest = groups.abs().masked_fill(groups.isnan(), 0.0).amax(-1) / LARGEST[torch.float8_e4m3fn]
    bits = largest.clamp_min(_SMALLEST_SCALE).view(torch.int32)
    scales.copy_(((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32))
    latent.copy_(to_float8(groups / scales[..., None], torch.float8_e4m3fn).flatten(-2))
    rope.copy_(rows[..., 512:])
    return stored


def to_float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to nearest even and clamped to the range of `dtype`; NaN stays NaN."""
    return values.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def dequantise_rows(rows: Tensor, cache_format: CacheFormat, kv_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows [..., row_width] as stored -> [..., latent + rope] in `dtype`."""
    if cache_format is CacheFormat.fp8_656:
        latent, rope, scales = stored_parts(rows.contiguous(), cache_format, 512)
        assert scales is not None
        scales = scales.to(dtype).repeat_interleave(GROUP, dim=-1)
        return torch.cat([latent.to(dtype) * scales, rope.to(dtype)], dim=-1)
    if kv_scale is None:
        return rows.to(dtype)
    return rows.to(dtype) * kv_scale.to(dtype)
