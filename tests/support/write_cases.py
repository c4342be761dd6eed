"""WriteCase: a small description of a cache write, and the tensors built from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla import CacheFormat, rope_table
from portable_mla.cache.write_arguments import WriteArguments, is_interleaved
from portable_mla.core.rope import RopeLayout

PAGES, PAGE_SIZE, HEADS, TABLE = 5, 16, 20, 100
SLOTS = (5, -1, 63, 79, 0, 33)
SIZES = (1.0, 1.0, 10.0, 1e-3, 300.0, 0.0)  # of c_kv's rows: normal, clamped, subnormal in fp8, zero
POSITIONS = (3, 1, 99, 5, 0, 44, 7, 7)  # longer than the tokens, as persistent metadata is


@dataclass(frozen=True)
class WriteCase:
    """One cache write of six tokens, one of which is not stored."""

    cache_format: CacheFormat = CacheFormat.bf16
    dtype: torch.dtype = torch.bfloat16
    layout: RopeLayout = "interleaved"
    latent_dim: int = 512
    rope_dim: int = 64
    norm: bool = True
    turned: bool = True
    scale: float = 0.013
    gaps: bool = False  # rows and pages of the cache with gaps between them, and every other position and slot
    index: torch.dtype = torch.int32

    def build(self) -> WriteArguments:
        """The call, over a cache full of sevens."""
        rng = torch.Generator().manual_seed(3)
        tokens, turned = len(SLOTS), self.turned and self.rope_dim > 0
        q = torch.randn(tokens, HEADS, self.latent_dim + self.rope_dim, generator=rng).to(self.dtype)
        c_kv = torch.randn(tokens, self.latent_dim, generator=rng) * torch.tensor(SIZES)[:, None]
        k_pe = torch.randn(tokens, self.rope_dim, generator=rng) * 3
        weight = torch.rand(self.latent_dim, generator=rng) + 0.5
        return WriteArguments(
            self.cache(),
            self._strided(torch.tensor(SLOTS, dtype=self.index)),
            c_kv.to(self.dtype),
            k_pe.to(self.dtype) if self.rope_dim else None,
            weight.to(self.dtype) if self.norm else None,
            float(torch.tensor(1e-6)),
            self._strided(torch.tensor(POSITIONS, dtype=self.index)) if turned else None,
            rope_table(TABLE, self.rope_dim) if turned else None,
            is_interleaved(self.layout),
            torch.tensor(self.scale) if self.cache_format.needs_scale else None,
            None,
            q[..., self.latent_dim :] if turned else None,
            torch.zeros(tokens, self.latent_dim + self.rope_dim, dtype=self.dtype),
            None,
        )

    def cache(self) -> Tensor:
        """[PAGES, PAGE_SIZE, row_width]."""
        width, gap = self.cache_format.row_width(self.latent_dim, self.rope_dim), 16 if self.gaps else 0
        whole = torch.full((PAGES, PAGE_SIZE + gap, width + gap), 7.0).to(self.cache_format.dtype)
        return whole[:, :PAGE_SIZE, :width]

    def _strided(self, index: Tensor) -> Tensor:
        return index.repeat_interleave(2)[::2] if self.gaps else index


def written_bytes(call: WriteArguments) -> dict[str, Tensor]:
    """What a write changes, as bytes: two writes agree when these are equal."""
    results = {"kv_cache": call.kv_cache, "q_pe": call.q_pe, "rows": call.rows}
    return {name: one.contiguous().view(torch.uint8) for name, one in results.items() if one is not None}


CASES = [
    *(WriteCase(one, dtype) for one in CacheFormat for dtype in (torch.bfloat16, torch.float16)),
    *(WriteCase(one, layout="half") for one in CacheFormat),
    *(WriteCase(one, gaps=True, index=torch.int64) for one in CacheFormat),
    *(WriteCase(one, norm=False, turned=False) for one in CacheFormat),
    WriteCase(rope_dim=0),
    WriteCase(latent_dim=256, rope_dim=32, layout="half"),
    WriteCase(CacheFormat.fp8_e4m3, latent_dim=128, rope_dim=32),
    WriteCase(CacheFormat.fp8_e4m3, scale=7.0),
    WriteCase(CacheFormat.fp8_e4m3fnuz, scale=1e-3),
    WriteCase(latent_dim=96, rope_dim=24),
]
