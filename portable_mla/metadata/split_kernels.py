"""Device-side split plan: cuts the KV tiles of a ragged batch into a fixed number of equal parts."""

import triton
import triton.language as tl

ITEM_FIELDS = tl.constexpr(8)  # of an item: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, 0


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _request_tiles(kv_lens_ptr, query_indptr_ptr, request, batch, BLOCK_N: tl.constexpr):
    """KV tiles of each request, 0 where it has no query tokens or does not exist."""
    exists = (request >= 0) & (request < batch)
    kv_len = tl.load(kv_lens_ptr + request, mask=exists, other=0)
    query_start = tl.load(query_indptr_ptr + request, mask=exists, other=0)
    query_stop = tl.load(query_indptr_ptr + request + 1, mask=exists, other=0)
    tiles = tl.where(query_stop > query_start, (tl.maximum(kv_len, 0) + BLOCK_N - 1) // BLOCK_N, 0)
    return tiles, kv_len, query_start, query_stop - query_start


@triton.jit
def _pieces(start, tiles, share, overhead, parts, MIN_PIECE: tl.constexpr):
    """First and last part of a request that begins at `start` of the cost line, and its number of pieces.

    A cut that would leave fewer than MIN_PIECE tiles on one side moves to the border of the request.
    """
    first = tl.minimum((start + overhead + MIN_PIECE - 1) // share, parts - 1)
    last = tl.minimum(tl.maximum((start + overhead + tiles - MIN_PIECE) // share, first), parts - 1)
    return first, last, tl.where(tiles > 0, last - first + 1, 0)


@triton.jit
def _share(
    kv_lens_ptr, query_indptr_ptr, batch, parts, min_tiles, OVERHEAD: tl.constexpr, BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Cost of one part, and what starting a request costs: nothing where the parts are as short as allowed."""
    tiles_sum = 0
    requests = 0
    for base in range(0, batch, SCAN):
        tiles, _, _, _ = _request_tiles(kv_lens_ptr, query_indptr_ptr, base + tl.arange(0, SCAN), batch, BLOCK_N)
        tiles_sum += tl.sum(tiles, 0)
        requests += tl.sum((tiles > 0).to(tl.int32), 0)
    share = (tiles_sum + requests * OVERHEAD + parts - 1) // parts
    short = share < min_tiles + OVERHEAD
    share = tl.where(short, tl.maximum((tiles_sum + parts - 1) // parts, min_tiles), share)
    return share, tl.where(short, 0, OVERHEAD)


@triton.jit
def _carry(
    kv_lens_ptr, query_indptr_ptr, stop, share, overhead, parts, MIN_PIECE: tl.constexpr, BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Cost, items, slots and last used part of the requests before `stop`."""
    cost = 0
    items = 0
    slots = 0
    last_part = -1
    for base in range(0, stop, SCAN):
        tiles, _, _, _ = _request_tiles(kv_lens_ptr, query_indptr_ptr, base + tl.arange(0, SCAN), stop, BLOCK_N)
        cost_here = tl.where(tiles > 0, tiles + overhead, 0)
        start = cost + tl.cumsum(cost_here, 0) - cost_here
        _, last, pieces = _pieces(start, tiles, share, overhead, parts, MIN_PIECE)
        cost += tl.sum(cost_here, 0)
        items += tl.sum(pieces, 0)
        slots += tl.sum(tl.where(pieces > 1, pieces, 0), 0)
        last_part = tl.maximum(last_part, tl.max(tl.where(tiles > 0, last, -1), 0))
    return cost, items, slots, last_part


@triton.jit
def _write_items(
    items_ptr, part_indptr_ptr, request, start, tiles, first, pieces, item_start, slot_start, previous_last, share,
    overhead, kv_len, query_start, query_len, BLOCK_P: tl.constexpr,
):  # fmt: skip
    for base in range(0, tl.max(pieces, 0), BLOCK_P):
        piece = base + tl.arange(0, BLOCK_P)[None, :]
        mask = piece < pieces[:, None]
        part = first[:, None] + piece
        origin = start[:, None] + overhead
        tile_lo = tl.where(piece == 0, 0, part * share - origin)
        tile_hi = tl.where(piece == pieces[:, None] - 1, tiles[:, None], (part + 1) * share - origin)
        slot = tl.where(pieces[:, None] > 1, slot_start[:, None] + piece, -1)
        index = item_start[:, None] + piece
        item_ptr = items_ptr + index * ITEM_FIELDS
        tl.store(item_ptr, request[:, None], mask=mask)
        tl.store(item_ptr + 1, tile_lo, mask=mask)
        tl.store(item_ptr + 2, tile_hi, mask=mask)
        tl.store(item_ptr + 3, slot, mask=mask)
        tl.store(item_ptr + 4, kv_len[:, None], mask=mask)
        tl.store(item_ptr + 5, query_start[:, None], mask=mask)
        tl.store(item_ptr + 6, query_len[:, None], mask=mask)
        tl.store(item_ptr + 7, 0, mask=mask)
        opens_part = (piece > 0) | (first > previous_last)[:, None]
        tl.store(part_indptr_ptr + part, index, mask=mask & opens_part)


@triton.jit
def _write_tokens(
    token_slots_ptr, query_start, query_len, pieces, slot_start, max_tokens, MAX_QUERY_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Slots of each query token. Tokens beyond the capacity are not written, whatever the lengths say."""
    token = tl.arange(0, BLOCK_Q)[None, :]
    mask = (token < query_len[:, None]) & (token < MAX_QUERY_LEN)
    mask = mask & (query_start[:, None] >= 0) & (query_start[:, None] + token < max_tokens)
    slot_lo = tl.where(pieces > 1, slot_start, 0)
    slot_hi = tl.where(pieces > 1, slot_start + pieces, tl.where(pieces == 1, -1, 0))
    record_ptr = token_slots_ptr + (query_start[:, None] + token) * 4
    tl.store(record_ptr, slot_lo[:, None], mask=mask)
    tl.store(record_ptr + 1, slot_hi[:, None], mask=mask)
    tl.store(record_ptr + 2, token, mask=mask)


@triton.jit
def _write_tails(
    token_slots_ptr, part_indptr_ptr, first_padding, max_tokens, first_part, parts, items, SCAN: tl.constexpr
):
    """Padding tokens have no slots; the parts behind the last used one are empty."""
    for base in range(first_padding, max_tokens, SCAN):
        token = base + tl.arange(0, SCAN)
        tl.store(token_slots_ptr + token * 4, 0, mask=token < max_tokens)
        tl.store(token_slots_ptr + token * 4 + 1, 0, mask=token < max_tokens)
        tl.store(token_slots_ptr + token * 4 + 2, 0, mask=token < max_tokens)
    for base in range(first_part, parts + 1, SCAN):
        part = base + tl.arange(0, SCAN)
        tl.store(part_indptr_ptr + part, items, mask=part <= parts)


@triton.jit(do_not_specialize=["batch", "parts", "max_tokens", "min_tiles"])
def plan_splits_kernel(
    kv_lens_ptr,  # [batch] int32
    query_indptr_ptr,  # [batch + 1] int32
    part_indptr_ptr,  # [parts + 1] int32
    items_ptr,  # [parts + batch, 8] int32
    token_slots_ptr,  # [max_tokens, 4] int32
    batch,
    parts,
    max_tokens,
    min_tiles,
    MAX_QUERY_LEN: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERHEAD: tl.constexpr,
    MIN_PIECE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Lays the requests on a line of cost, tiles + overhead each, and gives part p the stretch [p, p + 1) * share.

    Every program scans the whole batch and writes the items of BLOCK_B requests, so that programs need not meet.
    """
    own = tl.program_id(0) * BLOCK_B
    share, overhead = _share(kv_lens_ptr, query_indptr_ptr, batch, parts, min_tiles, OVERHEAD, BLOCK_N, SCAN)
    cost, items, slots, last_part = _carry(
        kv_lens_ptr, query_indptr_ptr, own, share, overhead, parts, MIN_PIECE, BLOCK_N, SCAN
    )
    request = own + tl.arange(0, BLOCK_B)
    tiles, kv_len, query_start, query_len = _request_tiles(kv_lens_ptr, query_indptr_ptr, request, batch, BLOCK_N)
    cost_here = tl.where(tiles > 0, tiles + overhead, 0)
    start = cost + tl.cumsum(cost_here, 0) - cost_here
    first, last, pieces = _pieces(start, tiles, share, overhead, parts, MIN_PIECE)
    item_start = items + tl.cumsum(pieces, 0) - pieces
    split = tl.where(pieces > 1, pieces, 0)
    slot_start = slots + tl.cumsum(split, 0) - split

    before, _, _, _ = _request_tiles(kv_lens_ptr, query_indptr_ptr, request - 1, batch, BLOCK_N)
    before = tl.where(request > own, before, 0)
    before_start = start - tl.where(before > 0, before + overhead, 0)
    _, before_last, _ = _pieces(before_start, before, share, overhead, parts, MIN_PIECE)
    before_last = tl.associative_scan(tl.where(before > 0, before_last, -1), 0, _maximum)
    previous_last = tl.maximum(before_last, last_part)

    _write_items(
        items_ptr, part_indptr_ptr, request, start, tiles, first, pieces, item_start, slot_start, previous_last, share,
        overhead, kv_len, query_start, query_len, BLOCK_P,
    )  # fmt: skip
    _write_tokens(token_slots_ptr, query_start, query_len, pieces, slot_start, max_tokens, MAX_QUERY_LEN, BLOCK_Q)
    if own + BLOCK_B >= batch:
        last_part = tl.maximum(last_part, tl.max(tl.where(tiles > 0, last, -1), 0))
        first_padding = tl.load(query_indptr_ptr + batch)
        _write_tails(
            token_slots_ptr, part_indptr_ptr, first_padding, max_tokens, last_part + 1, parts,
            items + tl.sum(pieces, 0), SCAN,
        )  # fmt: skip
