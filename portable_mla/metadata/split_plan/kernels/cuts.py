"""Where a ragged batch is cut: units, their cost, and the parts of the cost line that they fall into.

A unit is a block of at most BLOCK_Q query tokens of one request; it has the KV tiles that its last token sees.
"""

import triton
import triton.language as tl

from portable_mla.metadata.kernels.lengths import load_lens


@triton.jit
def load_units(lens, unit, BLOCK_Q: tl.constexpr, QUERY_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """KV tiles of each unit, what its last token sees, its tokens, and whether its request's lengths are right."""
    request = unit // QUERY_BLOCKS
    block = unit % QUERY_BLOCKS
    exists = (unit >= 0) & (request < lens[2])
    kv_len, query_len = load_lens(lens, request, exists)
    right = (kv_len >= 0) & (kv_len <= lens[3]) & (query_len >= 0) & (query_len <= lens[4])
    rest = tl.minimum(tl.maximum(query_len, 0), lens[5]) - block * BLOCK_Q
    tokens = tl.where(exists, tl.maximum(rest, 0), 0)
    if QUERY_BLOCKS > 1:
        tokens = tl.where(block == QUERY_BLOCKS - 1, tokens, tl.minimum(tokens, BLOCK_Q))
    seen = kv_len - tl.maximum(rest - tokens, 0)
    tiles = tl.where(right & (tokens > 0), (tl.maximum(seen, 0) + BLOCK_N - 1) // BLOCK_N, 0)
    return tiles, seen, tokens, right


@triton.jit
def fixed_pieces(tiles, FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr):
    """Tiles of each piece and number of pieces of a unit whose cuts may depend on nothing else."""
    piece_tiles = tl.maximum((tiles + MAX_PIECES - 1) // MAX_PIECES, FIXED_TILES)
    return piece_tiles, (tiles + piece_tiles - 1) // piece_tiles


@triton.jit
def unit_cost(tiles, overhead, FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr):
    """What a unit costs: its tiles, and a start; of each piece where cuts are fixed."""
    if FIXED_TILES > 0:
        _, pieces = fixed_pieces(tiles, FIXED_TILES, MAX_PIECES)
        return tiles + pieces * overhead
    else:
        return tl.where(tiles > 0, tiles + overhead, 0)


@triton.jit
def cut_units(start, tiles, cuts, MIN_PIECE: tl.constexpr, FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr):
    """First and last part of a unit that begins at `start` of the cost line, and its number of pieces.

    cuts: share, overhead, parts. A cut at a share's border that would leave fewer than MIN_PIECE tiles on one side
    moves to the border of the unit.
    """
    share, overhead, parts = cuts
    if FIXED_TILES > 0:
        piece_tiles, pieces = fixed_pieces(tiles, FIXED_TILES, MAX_PIECES)
        first = tl.minimum(start // share, parts - 1)
        last = tl.minimum((start + tl.maximum(pieces - 1, 0) * (piece_tiles + overhead)) // share, parts - 1)
        return first, last, pieces
    else:
        first = tl.minimum((start + overhead + MIN_PIECE - 1) // share, parts - 1)
        last = tl.minimum(tl.maximum((start + overhead + tiles - MIN_PIECE) // share, first), parts - 1)
        return first, last, tl.where(tiles > 0, last - first + 1, 0)


@triton.jit
def share_of_a_part(
    lens, parts, min_tiles, OVERHEAD: tl.constexpr, MERGE_COST: tl.constexpr, BLOCK_Q: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Cost of one part, what starting a unit costs, and the parts that are used, at most."""
    tiles_sum = 0
    starts = 0
    longest = 0
    for base in range(0, lens[2] * QUERY_BLOCKS, SCAN):
        tiles, _, _, _ = load_units(lens, base + tl.arange(0, SCAN), BLOCK_Q, QUERY_BLOCKS, BLOCK_N)
        tiles_sum += tl.sum(tiles, 0)
        starts += tl.sum(unit_cost(tiles, 1, FIXED_TILES, MAX_PIECES) - tiles, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
    if FIXED_TILES > 0:
        return tl.maximum((tiles_sum + starts * OVERHEAD + parts - 1) // parts, 1), OVERHEAD, parts
    else:
        share, overhead = _balanced_share(tiles_sum, starts, longest, parts, min_tiles, OVERHEAD, MERGE_COST)
        return share, overhead, (tiles_sum + starts * overhead + share - 1) // share


@triton.jit
def _balanced_share(tiles_sum, units, longest, parts, min_tiles, OVERHEAD: tl.constexpr, MERGE_COST: tl.constexpr):
    """Starting costs nothing where parts are as short as is worth it.

    Units that are all as long are cut alike, or not at all, where that makes no part longer by over a sixteenth; starts
    are free where each has two parts, since each of its pieces has one. (H100, ragged: free starts cost 32 requests of
    the Azure trace 10 %.)
    """
    same = longest * units == tiles_sum
    overhead = tl.where(same & (units * 2 <= parts), 0, OVERHEAD)
    share = tl.maximum((tiles_sum + units * overhead + parts - 1) // parts, 1)
    # a part of s tiles and the merge of longest / s pieces take least time together at the root
    merged = tl.sqrt_rn((longest * MERGE_COST // 256).to(tl.float32)).to(tl.int32)
    least = tl.maximum(min_tiles, merged)
    short = share < least + overhead
    overhead = tl.where(short, 0, overhead)
    share = tl.where(short, tl.maximum((tiles_sum + parts - 1) // parts, least), share)
    cost = tl.maximum(longest + overhead, 1)
    pieces = tl.maximum(cost // share, 1)
    even = tl.where(share < cost, (cost + pieces - 1) // pieces, (share + cost - 1) // cost * cost)
    return tl.where(same & (even * 16 <= share * 17), even, share), overhead


@triton.jit
def carry_before(
    lens, stop, cuts, MIN_PIECE: tl.constexpr, BLOCK_Q: tl.constexpr, QUERY_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr, FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Cost, items, slots, query tokens and last used part of the units before `stop`."""
    cost = 0
    items = 0
    slots = 0
    tokens_before = 0
    last_part = -1
    for base in range(0, stop, SCAN):
        unit = base + tl.arange(0, SCAN)
        tiles, _, tokens, _ = load_units(lens, tl.where(unit < stop, unit, -1), BLOCK_Q, QUERY_BLOCKS, BLOCK_N)
        cost_here = unit_cost(tiles, cuts[1], FIXED_TILES, MAX_PIECES)
        start = cost + tl.cumsum(cost_here, 0) - cost_here
        _, last, pieces = cut_units(start, tiles, cuts, MIN_PIECE, FIXED_TILES, MAX_PIECES)
        cost += tl.sum(cost_here, 0)
        items += tl.sum(pieces, 0)
        slots += tl.sum(tl.where(pieces > 1, pieces, 0), 0)
        tokens_before += tl.sum(tokens, 0)
        last_part = tl.maximum(last_part, tl.max(tl.where(tiles > 0, last, -1), 0))
    return cost, items, slots, tokens_before, last_part
