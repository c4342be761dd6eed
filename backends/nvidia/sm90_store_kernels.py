"""How a warpgroup of the sm90 decode kernel writes its half of an item's result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.sm90_room_kernels import BLOCK, HALF, LATENT
from portable_mla.backends.nvidia.sm90_score_kernels import ACC_ROW, SCORES_ROW
from portable_mla.backends.nvidia.sm90_sync_kernels import opaque
from portable_mla.backends.triton.decode_kernels import LN_2
from portable_mla.metadata.split_kernels import ITEM_FIELDS
from portable_mla.metadata.status_kernels import QUERY_TOKENS

# The accumulator after one exchange between neighbouring lanes: a lane's columns come in fours, and a store instruction
# writes 64 bytes of each of its rows instead of 32. Stores took 2.5 of the 10 us of (1, 128, 1024), a line a cycle.
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)


@gluon.jit
def _store_stats(row_max, row_sum, row, valid, slot, query_start, results, HEADS: gl.constexpr):
    """LSE of a whole unit, or maximum and sum of a piece: their logarithm would lose the sum's digits."""
    if slot < 0:
        token = query_start + row // HEADS
        lse_row = token.to(gl.int64) * results.stride_lse_token + (row % HEADS).to(gl.int64) * results.stride_lse_head
        empty = row_sum == 0.0
        log2_sum = row_max + gl.log2(gl.where(empty, gl.full_like(row_sum, 1.0), row_sum))
        lse = gl.where(empty, gl.full_like(row_sum, float("-inf")), log2_sum * LN_2)
        gl.store(results.lse_ptr + lse_row, lse, mask=valid)
    else:
        stats_ptr = results.partial_stats_ptr + 2 * (slot.to(gl.int64) * results.max_rows + row)
        gl.store(stats_ptr, row_max, mask=valid)
        gl.store(stats_ptr + 1, row_sum, mask=valid)


@gluon.jit
def _report_missing(results, request, end):
    """Keep the first request whose rows q does not have, as `report_fault` does of a row of requests."""
    word = (request.to(gl.int64) << 32) | end.to(gl.int64)
    gl.atomic_min(results.status_ptr + QUERY_TOKENS, word)


@gluon.jit
def store_item(
    acc, row_max, row_sum, work, index, results, FIRST: gl.constexpr, HEADS: gl.constexpr
):  # fmt: skip
    """Normalises and writes columns FIRST..FIRST + 255; the left warpgroup also writes what the rows summed to.

    Rows that q does not have arrived as zeros and are not written; the left warpgroup reports their request.
    The item's fields are read again here: kept through the loop over keys they would cost registers.
    """
    item_ptr = work.items_ptr + opaque(index) * ITEM_FIELDS
    slot = gl.load(item_ptr + 3)
    query_start = gl.load(item_ptr + 5)
    query_end = query_start + gl.load(item_ptr + 6)
    rows = (gl.minimum(query_end, results.tokens) - query_start) * HEADS
    total = gl.where(row_sum == 0.0, gl.full_like(row_sum, 1.0), row_sum)
    acc = acc * gl.convert_layout(1.0 / total, ACC_ROW)[:, None]
    acc = gl.convert_layout(acc, WIDE)
    row = opaque(work.first_row) + gl.arange(0, BLOCK, gl.SliceLayout(1, WIDE))
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, WIDE))
    valid = row < rows
    if slot < 0:
        token = query_start + row // HEADS
        out_row = token.to(gl.int64) * results.stride_out_token
        out_row += (row % HEADS).to(gl.int64) * results.stride_out_head
        out = acc.to(results.out_ptr.dtype.element_ty)
        gl.store(results.out_ptr + out_row[:, None] + column[None, :].to(gl.int64), out, mask=valid[:, None])
    else:
        slot_row = (slot.to(gl.int64) * results.max_rows + row) * LATENT
        gl.store(results.partial_out_ptr + slot_row[:, None] + column[None, :].to(gl.int64), acc, mask=valid[:, None])
    if FIRST == 0:
        row = work.first_row + gl.arange(0, BLOCK, SCORES_ROW)
        _store_stats(row_max, row_sum, row, row < rows, slot, query_start, results, HEADS)
        if query_end > results.tokens:
            _report_missing(results, gl.load(item_ptr), query_end)
