"""The split-KV decode kernel of absorbed MLA: scores, softmax and the weighted sum over one read of each latent row."""

import triton
import triton.language as tl

from portable_mla.backends.triton.decode.kernels.keys import load_latent, load_rope
from portable_mla.backends.triton.decode.kernels.pairs_decode import attend_pairs
from portable_mla.backends.triton.decode.kernels.tiles import START_MAX, key_rows, load_pages
from portable_mla.backends.triton.kernels.isolated import COLUMNS, attend_isolated, rows_with_leaks
from portable_mla.backends.triton.kernels.program_id import grouped_program_id
from portable_mla.metadata.kernels.status import QUERY_TOKENS, load_kv_scale, report_fault, report_kv_scale
from portable_mla.metadata.split_plan.kernels.plan import ITEM_FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _table_row(table_header_ptr, request):
    """Where the page table of this request is. Read for each item (hence volatile), so as to keep no register."""
    table = tl.load(table_header_ptr, volatile=True)
    return table.to(tl.pointer_type(tl.int32)) + request * tl.load(table_header_ptr + 1, volatile=True)


@triton.jit
def _load_query(q_row_ptr, row_valid, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    return tl.load(q_row_ptr[:, None] + column[None, :], mask=row_valid[:, None], other=0.0)


@triton.jit
def _described_rows(tile, kv_len, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First slot, in its page, of one tile for a descriptor load, and the positions its rows hold.

    The last tile slides back to end at kv_len, so that no slot past the end is read. Rows it shares with the tile
    before are masked; rows before the page are out of the descriptor's bounds and arrive as zeros.
    """
    first = tl.minimum(tile * BLOCK_N, kv_len - BLOCK_N)
    slot = first - tile * BLOCK_N // PAGE_SIZE * PAGE_SIZE
    position = first + tl.arange(0, BLOCK_N)
    position = tl.where(position >= tile * BLOCK_N, position, kv_len)
    return slot, position


@triton.jit
def _fold_tile(acc, row_sum, row_max, scores, value):
    """One online-softmax step on base-2 scores. Scaling after the maximum instead of before lost 4 % at 64 rows."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc)
    return acc, row_sum, new_max


@triton.jit
def _attend(
    q_latent, q_rope, kv_ptr, latent_desc, rope_desc, table_row_ptr, tile_lo, tile_hi, kv_len, row_limit, scale, pages,
    stride_kv_page, stride_kv_slot,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, FLOAT8: tl.constexpr, GROUPED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Unnormalised output, sum and base-2 maximum of one row tile over the KV tiles [tile_lo, tile_hi)."""
    row_max = tl.full([BLOCK_H], START_MAX, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, LATENT], tl.float32)
    page = load_pages(table_row_ptr, tile_lo, tile_hi, kv_len, pages, PAGE_SIZE, BLOCK_N)
    for tile in tl.range(tile_lo, tile_hi, num_stages=NUM_STAGES):
        # the page of the next tile is asked for one step ahead: loads that wait for a load would cost pipeline stages
        next_page = load_pages(table_row_ptr, tile + 1, tile_hi, kv_len, pages, PAGE_SIZE, BLOCK_N)
        if DESCRIPTORS:
            slot, position = _described_rows(tile, kv_len, PAGE_SIZE, BLOCK_N)
            latent = latent_desc.load([page, slot, 0]).reshape(BLOCK_N, LATENT)
        else:
            position, valid, offset = key_rows(page, tile, kv_len, stride_kv_page, stride_kv_slot, PAGE_SIZE, BLOCK_N)
            latent = load_latent(kv_ptr, offset, valid, q_latent.dtype, LATENT, BLOCK_N, FLOAT8, GROUPED, EARLY)
        scores = tl.dot(q_latent, tl.trans(latent))
        if ROPE > 0:
            if DESCRIPTORS:
                rope = rope_desc.load([page, slot, LATENT]).reshape(BLOCK_N, ROPE)
            else:
                rope = load_rope(kv_ptr, offset, valid, q_latent.dtype, LATENT, ROPE, FLOAT8, GROUPED)
            scores = tl.dot(q_rope, tl.trans(rope), scores)
        scores = tl.where(position[None, :] < row_limit[:, None], scores * scale, float("-inf"))
        acc, row_sum, row_max = _fold_tile(acc, row_sum, row_max, scores, latent)
        page = next_page
    return acc, row_sum, row_max


@triton.jit
def _item_rows(item_ptr, first_row, tokens, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Row, query token, head and validity of each row of the tile.

    Read from the item before and again (hence volatile) after the KV loop: row addresses kept through the loop would
    spill. The last field of an item is 0, which the compiler does not know: it cannot hoist them out of the item loop.
    """
    query_start = tl.load(item_ptr + 5, volatile=True)
    query_len = tl.load(item_ptr + 6, volatile=True)
    row = tl.load(item_ptr + 7, volatile=True) + first_row + tl.arange(0, BLOCK_H)
    token = row // HEADS
    return row, query_start + token, row - token * HEADS, (token < query_len) & (query_start + token < tokens)


@triton.jit
def _row_limit(kv_len, query_len, token, query_start):
    """Keys that a row sees: those of its query token, the first ones."""
    return kv_len - query_len + (token - query_start) + 1


@triton.jit
def _report_missing(status_ptr, request, end):
    one = request + tl.arange(0, 1)
    report_fault(status_ptr, QUERY_TOKENS, one, end, one >= 0)


@triton.jit
def _write_final(
    acc, log2_sum, column, token, head, row_valid, out_ptr, lse_ptr, stride_out_token, stride_out_head,
    stride_lse_token, stride_lse_head,
):  # fmt: skip
    out_row_ptr = out_ptr + token.to(tl.int64) * stride_out_token + head.to(tl.int64) * stride_out_head
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_row_ptr[:, None] + column[None, :], out, mask=row_valid[:, None])
    lse_row = token.to(tl.int64) * stride_lse_token + head.to(tl.int64) * stride_lse_head
    tl.store(lse_ptr + lse_row, log2_sum * LN_2, mask=row_valid)


@triton.jit
def _write_partial(
    acc, row_max, row_sum, column, row, row_valid, slot, max_rows, partial_out_ptr, partial_stats_ptr,
    LATENT: tl.constexpr,
):  # fmt: skip
    """Maximum and sum stay apart: their logarithm would lose the sum's digits where the logits are large."""
    slot_row = slot.to(tl.int64) * max_rows + row
    tl.store((partial_out_ptr + slot_row * LATENT)[:, None] + column[None, :], acc, mask=row_valid[:, None])
    tl.store(partial_stats_ptr + 2 * slot_row, row_max, mask=row_valid)
    tl.store(partial_stats_ptr + 2 * slot_row + 1, row_sum, mask=row_valid)


@triton.jit
def _write_item(
    acc, row_sum, row_max, column, item_ptr, first_row, kv_scale_ptr, out_ptr, lse_ptr, partial_out_ptr,
    partial_stats_ptr, tokens, max_rows, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head,
    HEADS: tl.constexpr, LATENT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Columns of a row tile, final or partial."""
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if kv_scale_ptr is not None:
        acc *= tl.load(kv_scale_ptr)
    row, token, head, row_valid = _item_rows(item_ptr, first_row, tokens, HEADS, BLOCK_H)
    slot = tl.load(item_ptr + 3)
    if slot < 0:
        log2_sum = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum))
        _write_final(
            acc, log2_sum, column, token, head, row_valid, out_ptr, lse_ptr, stride_out_token, stride_out_head,
            stride_lse_token, stride_lse_head,
        )  # fmt: skip
    else:
        _write_partial(
            acc, row_max, row_sum, column, row, row_valid, slot, max_rows, partial_out_ptr, partial_stats_ptr, LATENT
        )


@triton.jit
def _redo_item(
    item_ptr, first_row, q_ptr, kv_ptr, kv_scale_ptr, table_header_ptr, out_ptr, lse_ptr, partial_out_ptr,
    partial_stats_ptr, scale, tokens, pages, max_rows, stride_q_token, stride_q_head, stride_kv_page, stride_kv_slot,
    stride_out_token, stride_out_head, stride_lse_token, stride_lse_head,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, FLOAT8: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """A row tile of an item, whatever its hidden values are. The item is read again (hence volatile), so that nothing
    of it stays in registers through the KV loop."""
    request = tl.load(item_ptr, volatile=True)
    tile_lo, tile_hi = tl.load(item_ptr + 1, volatile=True), tl.load(item_ptr + 2, volatile=True)
    kv_len, query_start = tl.load(item_ptr + 4, volatile=True), tl.load(item_ptr + 5, volatile=True)
    query_len = tl.load(item_ptr + 6, volatile=True)
    tile_hi = tl.where(first_row < query_len * HEADS, tile_hi, tile_lo)
    _, token, head, row_valid = _item_rows(item_ptr, first_row, tokens, HEADS, BLOCK_H)
    q_row_ptr = q_ptr + token.to(tl.int64) * stride_q_token + head.to(tl.int64) * stride_q_head
    row_limit = _row_limit(kv_len, query_len, token, query_start)
    for first_column in tl.range(0, LATENT, COLUMNS, num_stages=1):
        acc, row_sum, row_max = attend_isolated(
            q_row_ptr, row_valid, kv_ptr, _table_row(table_header_ptr, request), first_column, tile_lo, tile_hi,
            kv_len, row_limit, scale, pages, stride_kv_page, stride_kv_slot,
            LATENT, ROPE, PAGE_SIZE, BLOCK_H, BLOCK_N, FLOAT8, GROUPED,
        )  # fmt: skip
        _write_item(
            acc, row_sum, row_max, first_column + tl.arange(0, COLUMNS), item_ptr, first_row, kv_scale_ptr, out_ptr,
            lse_ptr, partial_out_ptr, partial_stats_ptr, tokens, max_rows, stride_out_token, stride_out_head,
            stride_lse_token, stride_lse_head, HEADS, LATENT, BLOCK_H,
        )  # fmt: skip


@triton.jit(do_not_specialize=["softmax_scale", "tokens", "pages", "max_rows"])
def decode_kernel(
    q_ptr,  # [tokens, HEADS, LATENT + ROPE]
    kv_ptr,  # [pages, PAGE_SIZE, LATENT + ROPE], or uint8 [pages, PAGE_SIZE, 656] where GROUPED
    kv_scale_ptr,  # one float32, or None
    latent_desc,  # descriptor of kv, block [1, BLOCK_N, LATENT], or None
    rope_desc,  # descriptor of kv, block [1, BLOCK_N, ROPE], or None
    table_header_ptr,  # [3] int64: address and row stride of the page table, tiles of a part
    part_indptr_ptr,  # [parts + 1] int32
    items_ptr,  # [items, 8] int32: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, 0
    out_ptr,  # [tokens, HEADS, LATENT]
    lse_ptr,  # [tokens, HEADS] float32, natural log
    partial_out_ptr,  # [slots, max_rows, LATENT] float32
    partial_stats_ptr,  # [slots, max_rows, 2] float32: base-2 maximum, sum
    status_ptr,  # [8] int64
    softmax_scale,
    tokens,
    pages,
    max_rows,
    stride_q_token,
    stride_q_head,
    stride_kv_page,
    stride_kv_slot,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NUM_XCDS: tl.constexpr,
    FLOAT8: tl.constexpr,  # of an fp8 cache: "hardware" converts it, else the flavour of its uint8
    GROUPED: tl.constexpr,  # rows are fp8_656's
    EARLY: tl.constexpr,  # fp8 is converted once, before it is shared, else by each reader of it
    PAIRS: tl.constexpr,  # fp8 is read two values at a time, for products in float16
    HIDDEN_KEYS: tl.constexpr,  # items have several query tokens, all but the last of which may not see the last keys
):
    """Each program runs one row tile of one part of the plan; the row tiles of a part are neighbours and share L2."""
    pid = grouped_program_id(NUM_XCDS)
    part = pid // ROW_TILES
    first_row = (pid % ROW_TILES) * BLOCK_H
    item_lo = tl.load(part_indptr_ptr + part)
    item_hi = tl.load(part_indptr_ptr + part + 1)
    if kv_scale_ptr is not None:
        softmax_scale *= load_kv_scale(kv_scale_ptr)
    leaks = tl.zeros([BLOCK_H], tl.int32)  # of each row
    for index in range(item_lo, item_hi):
        item_ptr = items_ptr + index * ITEM_FIELDS
        request = tl.load(item_ptr)
        tile_lo = tl.load(item_ptr + 1)
        tile_hi = tl.load(item_ptr + 2)
        kv_len = tl.load(item_ptr + 4)
        query_start = tl.load(item_ptr + 5)
        query_len = tl.load(item_ptr + 6)
        tile_hi = tl.where(first_row < query_len * HEADS, tile_hi, tile_lo)
        if query_start + query_len > tokens:  # rows that q does not have; their request is reported
            _report_missing(status_ptr, request, query_start + query_len)

        _, token, head, row_valid = _item_rows(item_ptr, first_row, tokens, HEADS, BLOCK_H)
        q_row_ptr = q_ptr + token.to(tl.int64) * stride_q_token + head.to(tl.int64) * stride_q_head
        q_latent = _load_query(q_row_ptr, row_valid, 0, LATENT)
        q_rope = q_latent
        if ROPE > 0:
            q_rope = _load_query(q_row_ptr, row_valid, LATENT, ROPE)
        row_limit = _row_limit(kv_len, query_len, token, query_start)
        if PAIRS:
            acc, row_sum, row_max = attend_pairs(
                q_latent, q_rope, kv_ptr, _table_row(table_header_ptr, request), tile_lo, tile_hi, kv_len, row_limit,
                softmax_scale * LOG2_E, pages, stride_kv_page, stride_kv_slot,
                LATENT, ROPE, PAGE_SIZE, BLOCK_H, BLOCK_N, NUM_STAGES, GROUPED,
            )  # fmt: skip
        else:
            acc, row_sum, row_max = _attend(
                q_latent, q_rope, kv_ptr, latent_desc, rope_desc, _table_row(table_header_ptr, request),
                tile_lo, tile_hi, kv_len, row_limit, softmax_scale * LOG2_E, pages, stride_kv_page, stride_kv_slot,
                LATENT, ROPE, PAGE_SIZE, BLOCK_H, BLOCK_N, NUM_STAGES, DESCRIPTORS, FLOAT8, GROUPED, EARLY,
            )  # fmt: skip

        if HIDDEN_KEYS:
            leaks += rows_with_leaks(acc, row_sum)
        _write_item(
            acc, row_sum, row_max, tl.arange(0, LATENT), item_ptr, first_row, kv_scale_ptr, out_ptr, lse_ptr,
            partial_out_ptr, partial_stats_ptr, tokens, max_rows, stride_out_token, stride_out_head,
            stride_lse_token, stride_lse_head, HEADS, LATENT, BLOCK_H,
        )  # fmt: skip
    if HIDDEN_KEYS:  # noqa: SIM102
        if tl.max(leaks, 0) > 0:
            tl.debug_barrier()  # the same is written again, by other threads
            for index in range(tl.load(part_indptr_ptr + part, volatile=True), item_hi):
                _redo_item(
                    items_ptr + index * ITEM_FIELDS, first_row, q_ptr, kv_ptr, kv_scale_ptr, table_header_ptr, out_ptr,
                    lse_ptr, partial_out_ptr, partial_stats_ptr, softmax_scale * LOG2_E, tokens, pages, max_rows,
                    stride_q_token, stride_q_head, stride_kv_page, stride_kv_slot, stride_out_token, stride_out_head,
                    stride_lse_token, stride_lse_head,
                    HEADS, LATENT, ROPE, PAGE_SIZE, BLOCK_H, BLOCK_N, FLOAT8, GROUPED,
                )  # fmt: skip
    report_kv_scale(kv_scale_ptr, status_ptr, pid == 0)
