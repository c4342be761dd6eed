"""Sm90Tile: what may differ between launches of the Gluon kernel for Hopper.

Comments: microseconds of an H100 80GB HBM3, bf16, page 64, at (batch, heads, context), Triton 3.6.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sm90Tile:
    """The options of one launch."""

    min_tiles: int = 1  # 128-key tiles of the shortest part
    overhead: int = 1  # what starting a unit costs, in such tiles
    merge_cost: int = 24  # what merging a piece of a unit costs, in 256ths of such a tile
    long: int = 0  # tiles of parts whose keys are asked of L2 ahead, and not dropped first; 0: never
    registers: int = 232  # of a thread of the warpgroups; 240 spill the loaders of 16-token pages
    loader_registers: int = 40  # 256 threads of the one and 128 of the other fill the register file
    narrow: bool = True  # partial results of bfloat16 are float16, in units of their row's peak
    early: bool = True  # a program sets itself up while the kernel before ends
    dependent: bool = True  # the combine starts while the last programs decode


def sm90_tile(rows: int) -> Sm90Tile:
    """The options for `rows` query rows (heads * query tokens) of a unit of the plan."""
    if rows <= 16:
        # (1, 16, 8192) 15.8, with narrow partial results 16.8: few rows are soon stored, and peaks take longer
        return Sm90Tile(merge_cost=15, narrow=False)
    if rows <= 64:
        # (8, 64, 8192) 48.4, with wide partial results 51.0; (32, 64, 4096) 71.3 and 76.2. Predicted 2.5 less
        # Partial results are small: (1, 16, 8192) 14.2 with parts of one tile, 16.4 with two
        return Sm90Tile(merge_cost=15)
    if rows <= 128:
        # (1, 128, 8192) 19.7, with parts of one tile 24.5
        # Starting a unit counted as two tiles: predicted 3 % for ragged batches; Azure, 128 requests 127 -> 120, and
        # 32 requests 50.2 -> 48.1; Mooncake, 32 requests 219 -> 210
        # Both programs that share a part wait for the same memory, and L2 can have it ahead, which only pays where it
        # keeps it. Asked ahead from parts of 40 tiles on / never / always: (128, 128, 4096) 251 257 254; at 32 requests
        # 73.8 73.8 79.0; Azure, 256 requests 210 221 211; Mooncake, 32 requests 204 208 213. By each item's length
        # instead: 226 there, since items that are asked ahead and items that are not slow each other down
        return Sm90Tile(overhead=2, long=40)
    # Four programs share a part and three of them find it in L2: (128, 128, 4096) with two query tokens 470, asked
    # ahead 472
    return Sm90Tile()
