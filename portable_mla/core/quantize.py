"""Rows of latents as a cache format stores them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from portable_mla.core.cache_format import GROUP, LARGEST, CacheFormat

_SMALLEST_SCALE = 2.0**-126


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
