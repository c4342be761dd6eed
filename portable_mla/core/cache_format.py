"""CacheFormat: how one latent row is stored, and its dequantisation."""

from __future__ import annotations

from enum import Enum

import torch

GROUP = 128  # latent values that share one scale in fp8_656
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


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
