"""Sm90Tile: what may differ between launches of the Gluon kernel for Hopper.

Comments: microseconds of an H100 80GB HBM3, bf16, page 64, at (batch, heads, context), Triton 3.6.0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sm90Tile:
    """The options of one launch."""

    min_tiles: int = 1  # 64-key tiles of the shortest part
    overhead: int = 2  # what starting a unit costs, in such tiles
    merge_cost: int = 48  # what merging a piece of a unit costs, in 256ths of such a tile
    long: int = 0  # tiles of parts whose keys are asked of L2 ahead, and not dropped first; 0: never
    far: int = 0  # tiles of parts whose keys are kept all the same, but not asked for; above `long`
    registers: int = 232  # of a thread of the warpgroups; 240 spill the loaders of 16-token pages
    loader_registers: int = 40  # 256 threads of the one and 128 of the other fill the register file
    boxes: int = 2  # TMA loads of half a block, where pages hold whole blocks
    early: bool = True  # a program sets itself up while the kernel before ends
    dependent: bool = True  # the combine starts while the last programs decode


def sm90_tile(rows: int) -> Sm90Tile:
    """The options for `rows` query rows (heads * query tokens) of a unit of the plan.

    Starts of 2 and of 1 tile, Azure, 32 requests of 16 heads: 24.7 and 25.3.
    """
    if rows <= 64:
        # Float16 and float32 partial results: (8, 64, 8192) 48.4 and 51.0, (32, 64, 4096) 71.3 and 76.2, predicted 2.5
        # less; of 16 heads, Azure, 128 and 256 requests 76.6 and 77.4, 141.7 and 144.3, (8, 16, 8192) 34.9 and 34.3
        # Partial results are small: (1, 16, 8192) 12.8 with parts of two tiles, 13.7 with three, 14.4 with four
        return Sm90Tile(merge_cost=15)
    if rows <= 128:
        # (1, 128, 8192) 18.1 with parts of four tiles, 18.8 with three
        # Starting a unit counted as 3 and 5 tiles, predicted better where parts are long, since Q and the result are
        # the bytes of four blocks: Azure, 32, 128 and 256 requests 35.1 36.2, 108.4 111.8, 189.2 190.2; Mooncake, 32
        # and 256 requests 236.5 234.8, 1883 1884
        # Both programs that share a part wait for the same memory, and L2 can have it ahead, which only pays where it
        # keeps it. Asked ahead from parts of 80 tiles on / never / always, in plans of two blocks a tile:
        # (128, 128, 4096) 251 257 254; at 32 requests 73.8 73.8 79.0; Azure, 256 requests 210 221 211; Mooncake, 32
        # requests 204 208 213. By each item's length instead: 226 there, since items that are asked ahead and items
        # that are not slow each other down. A part's next item asked ahead too: level, dropped
        # With the first program alone asking, the other fell so far behind in long parts, when the clock fell with the
        # power, that L2 had dropped its blocks: at 256 requests of Mooncake 5.3 to 5.9 GB were read, not 4.7. Each
        # asking from parts of 200 tiles on: 2010 to 2090 -> 1801 to 1815; in shorter parts that costs 3 %, (128, 128,
        # 4096) 238 and 247. None asking there instead, predicted as fast with less power: 256 and 128 requests after a
        # rest 1637 to 1772 -> 1679 to 1726, 820 -> 858, at the power limit 1932 to 2016 -> 1914 to 1937, 922 -> 902
        # with 5 % less energy. Keys dropped first there too: 1700 to 1728 and 868, 1933 to 1957 and 902
        return Sm90Tile(overhead=3, long=80, far=200)
    # Four programs share a part and three of them find it in L2: (128, 128, 4096) with two query tokens 470, asked
    # ahead 472. With two loads of half a block, then one: 435.6 and 425.9; with 128 rows level, (1, 16, 8192) 12.9
    # and 13.1
    return Sm90Tile(boxes=1)
