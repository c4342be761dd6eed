"""Card: what a GPU does at best, and the time that no decode on it can be faster than."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LATENT, ROPE = 512, 64


@dataclass(frozen=True)
class Card:
    """dram, copy: TB/s by the memory's clock and width, and of a copy, read and written; matmul: TFLOP/s of a bfloat16
    product of 8192^3; plain_us: microseconds of a kernel that does next to nothing."""

    dram: float
    copy: float
    matmul: float
    plain_us: float

    def floor_us(self, kv_lens: Sequence[int], heads: int, query_len: int) -> float:
        """Microseconds that a bfloat16 decode takes at least: cache rows, q and out once each, or the operations."""
        keys, rows = sum(kv_lens), len(kv_lens) * query_len * heads
        bytes_moved = 2 * (keys * (LATENT + ROPE) + rows * (LATENT + ROPE + LATENT))
        operations = 2 * keys * query_len * heads * (LATENT + ROPE + LATENT)
        return max(bytes_moved / self.dram, operations / self.matmul) / 1e6
