"""Device-side split plan: cuts the KV tiles of a ragged batch into a fixed number of equal parts, in one launch."""

import triton
import triton.language as tl

from portable_mla.metadata.kernels.status import KV_LEN, PAGE_ID, QUERY_LEN, QUERY_TOKENS, report_fault
from portable_mla.metadata.split_plan.kernels.cuts import (
    carry_before,
    cut_units,
    fixed_pieces,
    load_units,
    share_of_a_part,
    unit_cost,
)
from portable_mla.metadata.split_plan.kernels.page_checks import check_pages, load_cells
from portable_mla.metadata.split_plan.kernels.program_headers import (
    open_part,
    programs_of_a_part,
    write_heads,
    write_item,
)

ITEM_FIELDS = tl.constexpr(8)  # of an item: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, 0
TOKEN_FIELDS = tl.constexpr(
    4
)  # of a query token: slot_lo, slot_hi or one of the two below, index in its unit, position
FINAL = tl.constexpr(-1)  # the decode kernel writes the row itself
FAULTY = tl.constexpr(-2)  # the row becomes NaN


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _write_items(
    items_ptr, part_indptr_ptr, heads_ptr, row_ptr, columns, request, start, tiles, first, pieces, item_start,
    slot_start, previous_last, cuts, programs, faulty, seen, query_start, tokens,
    ROW_TILES: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    FIXED_TILES: tl.constexpr, MAX_PIECES: tl.constexpr,
):  # fmt: skip
    """Items of each unit, and where each part begins: the first item of a part also opens the empty parts before it."""
    share, overhead, parts = cuts
    for base in range(0, tl.max(pieces, 0), BLOCK_P):
        piece = base + tl.arange(0, BLOCK_P)[None, :]
        mask = piece < pieces[:, None]
        if FIXED_TILES > 0:
            piece_tiles, _ = fixed_pieces(tiles, FIXED_TILES, MAX_PIECES)
            step = (piece_tiles + overhead)[:, None]
            part = tl.minimum((start[:, None] + piece * step) // share, parts - 1)
            before = tl.minimum((start[:, None] + (piece - 1) * step) // share, parts - 1)
            tile_lo = piece * piece_tiles[:, None]
            tile_hi = tl.minimum(tile_lo + piece_tiles[:, None], tiles[:, None])
        else:
            part = first[:, None] + piece
            before = part - 1
            origin = start[:, None] + overhead
            tile_lo = tl.where(piece == 0, 0, part * share - origin)
            tile_hi = tl.where(piece == pieces[:, None] - 1, tiles[:, None], (part + 1) * share - origin)
        before = tl.where(piece == 0, previous_last[:, None], before)
        slot = tl.where(pieces[:, None] > 1, slot_start[:, None] + piece, -1)
        index = item_start[:, None] + piece
        tile_hi = tl.where(faulty[:, None], tile_lo, tile_hi)
        item = (request[:, None], tile_lo, tile_hi, slot, seen[:, None], query_start[:, None], tokens[:, None])
        write_item(items_ptr + index * ITEM_FIELDS, item, mask)
        if heads_ptr is not None:
            opens = mask & (part > before)
            write_heads(
                heads_ptr, part, item, row_ptr, columns[:, None], share, opens, programs, ROW_TILES, PAGE_SIZE, BLOCK_N
            )
        if FIXED_TILES > 0:
            opened = tl.where(mask, part - before, 0)
            for empty in range(tl.max(tl.max(opened, 1), 0)):
                tl.store(part_indptr_ptr + before + 1 + empty, index, mask=empty < opened)
                open_part(heads_ptr, before + 1 + empty, index, empty < opened, programs)
        else:  # a share is longer than what starting a unit costs, so that no part between two units is empty
            tl.store(part_indptr_ptr + part, index, mask=mask & (part > before))
            open_part(heads_ptr, part, index, mask & (part > before), programs)


@triton.jit
def _write_tokens(
    token_slots_ptr, positions_ptr, query_start, tokens, seen, pieces, slot_start, faulty, given, max_tokens,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Slots and position of each query token. Tokens beyond the capacity are not written, whatever the lengths say."""
    slot_lo = tl.where(pieces > 1, slot_start, 0)
    slot_hi = tl.where(pieces > 1, slot_start + pieces, tl.where(pieces == 1, FINAL, 0))
    slot_hi = tl.where(faulty, FAULTY, slot_hi)
    for base in range(0, tl.minimum(tl.max(tokens, 0), max_tokens), BLOCK_Q):
        index = base + tl.arange(0, BLOCK_Q)[None, :]
        token = query_start[:, None] + index
        mask = (index < tokens[:, None]) & (token < max_tokens)
        position = tl.maximum((seen - tokens)[:, None] + index, 0)
        if positions_ptr is not None:
            position = tl.load(positions_ptr + token, mask=mask & (token < given), other=0).to(tl.int32)
        record_ptr = token_slots_ptr + token.to(tl.int64) * TOKEN_FIELDS
        tl.store(record_ptr, slot_lo[:, None], mask=mask)
        tl.store(record_ptr + 1, slot_hi[:, None], mask=mask)
        tl.store(record_ptr + 2, index, mask=mask)
        tl.store(record_ptr + 3, position, mask=mask)


@triton.jit
def _write_tails(
    token_slots_ptr, part_indptr_ptr, heads_ptr, padding, max_tokens, first_part, parts, items, programs,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Padding tokens have no slots and position 0; the parts behind the last used one are empty."""
    for base in range(padding, max_tokens, SCAN):
        token = base + tl.arange(0, SCAN)
        record_ptr = token_slots_ptr + token.to(tl.int64) * TOKEN_FIELDS
        for field in tl.static_range(TOKEN_FIELDS):
            tl.store(record_ptr + field, 0, mask=token < max_tokens)
    for base in range(first_part, parts + 1, SCAN):
        part = base + tl.arange(0, SCAN)
        tl.store(part_indptr_ptr + part, items, mask=part <= parts)
        open_part(heads_ptr, part, items, part <= parts, programs)


@triton.jit
def _report(status_ptr, lens, unit, strange_page, bad_page, faulty, end, max_tokens, QUERY_BLOCKS: tl.constexpr):
    """Set the status words for what is wrong with these units."""
    missing = end > max_tokens
    if tl.max((faulty | missing).to(tl.int32), 0) != 0:
        request = unit // QUERY_BLOCKS
        exists = request < lens[2]
        kv_len = tl.load(lens[0] + request, mask=exists, other=0)
        report_fault(status_ptr, PAGE_ID, request, strange_page, bad_page)
        report_fault(status_ptr, KV_LEN, request, kv_len, (kv_len < 0) | (kv_len > lens[3]))
        report_fault(status_ptr, QUERY_TOKENS, request, end, missing & exists)
        if lens[1] is not None:
            query_len = tl.load(lens[1] + request, mask=exists, other=0)
            report_fault(status_ptr, QUERY_LEN, request, query_len, (query_len < 0) | (query_len > lens[4]))


@triton.jit(
    do_not_specialize=[
        "batch",
        "given_positions",
        "parts",
        "max_tokens",
        "min_tiles",
        "max_kv_len",
        "max_query_len",
        "counted_tokens",
        "max_pages",
        "stride_table",
    ]
)
def plan_splits_kernel(
    kv_lens_ptr,  # [batch] int32
    query_lens_ptr,  # [batch] int32, or None: max_query_len tokens each
    positions_ptr,  # [tokens] int32 or int64, or None: where the token stands in its request
    table_ptr,  # [batch, width] int32
    table_header_ptr,  # [3] int64: address and row stride of the table, tiles of a part
    part_indptr_ptr,  # [parts + 1] int32
    heads_ptr,  # [parts * ROW_TILES, 16] int32, or None
    items_ptr,  # [max_items, 8] int32
    token_slots_ptr,  # [max_tokens, 4] int32
    summary_ptr,  # [4] int32: longest query_len, query tokens, items, slots
    status_ptr,  # [8] int64
    batch,
    given_positions,
    parts,
    max_tokens,
    min_tiles,
    max_kv_len,
    max_query_len,
    counted_tokens,
    max_pages,
    stride_table,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERHEAD: tl.constexpr,
    MERGE_COST: tl.constexpr,
    MIN_PIECE: tl.constexpr,
    FIXED_TILES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCAN: tl.constexpr,
    ROW_TILES: tl.constexpr,  # programs that share a part, each of which has a head
    HALVES: tl.constexpr,  # twice as many where half the parts are idle
):
    """Lays the units on a line of cost, tiles + overhead each, and gives part p the stretch [p, p + 1) * share.

    Every program scans the whole batch and writes the items of BLOCK_U units, so that programs need not meet.
    """
    lens = (kv_lens_ptr, query_lens_ptr, batch, max_kv_len, max_query_len, counted_tokens)
    own = tl.program_id(0) * BLOCK_U
    unit = own + tl.arange(0, BLOCK_U)
    request = unit // QUERY_BLOCKS
    tiles, seen, tokens, right = load_units(lens, unit, BLOCK_Q, QUERY_BLOCKS, BLOCK_N)
    row_ptr = table_ptr + request.to(tl.int64) * stride_table
    columns = tl.where(tiles > 0, (seen + PAGE_SIZE - 1) // PAGE_SIZE, 0)
    cells = load_cells(row_ptr, columns, 0, BLOCK_C)

    share, overhead, used = share_of_a_part(
        lens, parts, min_tiles, OVERHEAD, MERGE_COST, BLOCK_Q, QUERY_BLOCKS, BLOCK_N, FIXED_TILES, MAX_PIECES, SCAN
    )
    cuts = (share, overhead, parts)
    programs = programs_of_a_part(used, parts, ROW_TILES, HALVES)
    cost, items, slots, tokens_before, last_part = carry_before(
        lens, own, cuts, MIN_PIECE, BLOCK_Q, QUERY_BLOCKS, BLOCK_N, FIXED_TILES, MAX_PIECES, SCAN
    )
    cost_here = unit_cost(tiles, overhead, FIXED_TILES, MAX_PIECES)
    start = cost + tl.cumsum(cost_here, 0) - cost_here
    first, last, pieces = cut_units(start, tiles, cuts, MIN_PIECE, FIXED_TILES, MAX_PIECES)
    item_start = items + tl.cumsum(pieces, 0) - pieces
    split = tl.where(pieces > 1, pieces, 0)
    slot_start = slots + tl.cumsum(split, 0) - split
    query_start = tokens_before + tl.cumsum(tokens, 0) - tokens

    before, _, _, _ = load_units(lens, tl.where(unit > own, unit - 1, -1), BLOCK_Q, QUERY_BLOCKS, BLOCK_N)
    before_start = start - unit_cost(before, overhead, FIXED_TILES, MAX_PIECES)
    _, before_last, _ = cut_units(before_start, before, cuts, MIN_PIECE, FIXED_TILES, MAX_PIECES)
    before_last = tl.associative_scan(tl.where(before > 0, before_last, -1), 0, _maximum)
    previous_last = tl.maximum(before_last, last_part)

    bad_page, strange = check_pages(row_ptr, columns, cells, max_pages, BLOCK_C)
    faulty = bad_page | (right == 0)
    _write_items(
        items_ptr, part_indptr_ptr, heads_ptr, row_ptr, columns, request, start, tiles, first, pieces, item_start,
        slot_start, previous_last, cuts, programs, faulty, seen, query_start, tokens, ROW_TILES, PAGE_SIZE, BLOCK_N,
        BLOCK_P, FIXED_TILES, MAX_PIECES,
    )  # fmt: skip
    _write_tokens(
        token_slots_ptr,
        positions_ptr,
        query_start,
        tokens,
        seen,
        pieces,
        slot_start,
        faulty,
        given_positions,
        max_tokens,
        BLOCK_T,
    )
    end = tl.where(tokens > 0, query_start + tokens, 0)
    _report(status_ptr, lens, unit, strange, bad_page, faulty, end, max_tokens, QUERY_BLOCKS)
    if own + BLOCK_U >= batch * QUERY_BLOCKS:
        last_part = tl.maximum(last_part, tl.max(tl.where(tiles > 0, last, -1), 0))
        all_items = items + tl.sum(pieces, 0)
        all_tokens = tokens_before + tl.sum(tokens, 0)
        _write_tails(
            token_slots_ptr, part_indptr_ptr, heads_ptr, all_tokens, max_tokens, last_part + 1, parts, all_items,
            programs, SCAN,
        )  # fmt: skip
        tl.store(summary_ptr + 1, all_tokens)
        tl.store(summary_ptr + 2, all_items)
        tl.store(summary_ptr + 3, slots + tl.sum(split, 0))
    if own == 0:
        _write_header(table_ptr, stride_table, share, table_header_ptr, summary_ptr, lens, SCAN)


@triton.jit
def _write_header(table_ptr, stride_table, share, table_header_ptr, summary_ptr, lens, SCAN: tl.constexpr):
    """Where the step's page table is, what a part costs, and the longest of the query lengths."""
    tl.store(table_header_ptr, table_ptr.to(tl.int64))
    tl.store(table_header_ptr + 1, stride_table.to(tl.int64))
    tl.store(table_header_ptr + 2, share.to(tl.int64))
    longest = lens[4]
    if lens[1] is not None:
        longest = 0
        for base in range(0, lens[2], SCAN):
            request = base + tl.arange(0, SCAN)
            longest = tl.maximum(longest, tl.max(tl.load(lens[1] + request, mask=request < lens[2], other=0), 0))
    tl.store(summary_ptr, longest)
