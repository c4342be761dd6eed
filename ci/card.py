"""Card: what a GPU does at best, and the time that no decode on it can be faster than."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from portable_mla import MLAShape


@dataclass(frozen=True)
class Card:
    """dram, copy: TB/s by the memory's clock and width, and of a copy, read and written; matmul: TFLOP/s of a bfloat16
    product of 8192^3; plain_us: microseconds of a kernel that does next to nothing."""

    dram: float
    copy: float
    matmul: float
    plain_us: float

    def floor_us(self, shape: MLAShape, kv_lens: Sequence[int], query_len: int) -> float:
        """Microseconds that a decode takes at least: cache rows, q and out once each, or the operations."""
        keys, rows, width = sum(kv_lens), len(kv_lens) * query_len * shape.heads, shape.qk_dim + shape.latent_dim
        bytes_moved = keys * shape.row_width * shape.cache_format.dtype.itemsize + rows * width * shape.q_dtype.itemsize
        operations = 2 * keys * query_len * shape.heads * width
        return max(bytes_moved / self.dram, operations / self.matmul) / 1e6
