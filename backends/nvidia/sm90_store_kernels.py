"""How a warpgroup of the sm90 decode kernel writes its half of an item's result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.sm90_room_kernels import BLOCK, HALF, LATENT, rows_of
from portable_mla.backends.nvidia.sm90_score_kernels import ACC, ACC_ROW, SCORES_ROW
from portable_mla.backends.nvidia.sm90_softmax_kernels import normaliser
from portable_mla.backends.nvidia.sm90_sync_kernels import multiply, opaque, pack_pairs
from portable_mla.backends.triton.combine_kernels import NARROW_STATS, WIDE_STATS
from portable_mla.backends.triton.decode_kernels import LN_2
from portable_mla.metadata.status_kernels import QUERY_TOKENS

# Pairs of 16-bit values after an exchange between neighbouring lanes: with stores of 8 bytes four lanes fill a sector,
# as they do with float32 values where they are. A second exchange, for stores of 16 bytes, was 130 instructions of 900
# that run once an item, too seldom for the instruction cache: predicted 0.5 without, (1, 128, 8192) 17.6 -> 16.8,
# (8, 64, 8192) 39.4 -> 38.9, (32, 128, 4096) 71.3 -> 70.6.
PAIRS_OF_2 = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 4], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
# Pairs where the accumulator has them, four of a row to a store of 16 bytes; the combine puts columns in order.
PAIRS_IN_PLACE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
LEAST_PEAK = gl.constexpr(2.0**-120)  # its reciprocal is finite


@gluon.jit
def tell_peak(acc, slot, vector, results):
    """The largest magnitude of each row, told to the other warpgroup; nothing where no float16 is to be written."""
    peak = gl.full([BLOCK], 1.0, gl.float32, ACC_ROW)
    if results.partial_out_ptr.dtype.element_ty != gl.float32:  # noqa: SIM102 a constant, then a value
        if slot >= 0:
            peak = gl.max(gl.abs(acc), 1)
            vector.store(peak)
    return peak


@gluon.jit
def hear_peak(peak, slot, vector, results):
    """The largest magnitude of each row over both warpgroups' columns."""
    if results.partial_out_ptr.dtype.element_ty != gl.float32:  # noqa: SIM102 a constant, then a value
        if slot >= 0:
            peak = gl.maximum(peak, vector.load(ACC_ROW))
    return peak


@gluon.jit
def _piece_row(row, slot, results):
    """Which of all partial results' rows a row of a piece is."""
    return slot.to(gl.int64) * opaque(results.max_rows) + row


@gluon.jit
def _store_stats(log2_level, row_sum, row, valid, slot, query_start, results, HEADS: gl.constexpr):
    """LSE of a whole unit, or level and sum of a piece: their logarithm would lose the sum's digits."""
    if slot < 0:
        token = query_start + row // HEADS
        lse_row = token.to(gl.int64) * results.stride_lse_token + (row % HEADS).to(gl.int64) * results.stride_lse_head
        empty = row_sum == 0.0
        log2_sum = log2_level + gl.log2(gl.where(empty, gl.full_like(row_sum, 1.0), row_sum))
        lse = gl.where(empty, gl.full_like(row_sum, float("-inf")), log2_sum * LN_2)
        gl.store(results.lse_ptr + lse_row, lse, mask=valid)
    else:
        STATS: gl.constexpr = WIDE_STATS if results.partial_out_ptr.dtype.element_ty == gl.float32 else NARROW_STATS
        stats_ptr = results.partial_stats_ptr + STATS * _piece_row(row, slot, results)
        gl.store(stats_ptr, log2_level, mask=valid)
        gl.store(stats_ptr + 1, row_sum, mask=valid)


@gluon.jit
def _report_missing(results, request, end):
    """Keep the first request whose rows q does not have, as `report_fault` does of a row of requests."""
    word = (request.to(gl.int64) << 32) | end.to(gl.int64)
    gl.atomic_min(results.status_ptr + QUERY_TOKENS, word)


@gluon.jit
def _pairs(acc):
    """Even and odd columns of the accumulator, which share a thread."""
    return gl.split(gl.reshape(acc, [BLOCK, HALF // 2, 2]))


@gluon.jit
def _wide(stride):
    """A stride in 64 bits; of one of 32, known not to be negative, the upper half needs no register."""
    return stride.to(gl.uint32).to(gl.int64) if stride.dtype == gl.int32 else stride


@gluon.jit
def _store_whole(bits, first_row, rows, query_start, results, FIRST: gl.constexpr, HEADS: gl.constexpr):
    """Pairs of the result of a unit that was not cut."""
    row = opaque(first_row) + gl.arange(0, BLOCK, gl.SliceLayout(1, PAIRS_OF_2))
    token = query_start + row // HEADS
    head = (row % HEADS).to(gl.int64)
    row_start = token.to(gl.int64) * _wide(results.stride_out_token) + head * _wide(results.stride_out_head)
    bits = gl.convert_layout(bits, PAIRS_OF_2)
    pair = FIRST // 2 + gl.arange(0, HALF // 2, gl.SliceLayout(0, PAIRS_OF_2))
    pair_ptr = results.out_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (row_start // 2)[:, None]
    gl.store(pair_ptr + pair[None, :].to(gl.int64), bits, mask=(row < rows)[:, None])


@gluon.jit
def _store_wide(acc, norm, rows, query_start, slot, first_row, results, FIRST: gl.constexpr, HEADS: gl.constexpr):
    """The result of a unit that was not cut, or a partial one in float32."""
    acc = acc * norm[:, None]
    if slot < 0:
        left, right = _pairs(acc)
        bits = pack_pairs(left, right, results.out_ptr.dtype.element_ty)
        _store_whole(bits, first_row, rows, query_start, results, FIRST, HEADS)
    else:
        _store_floats(acc, first_row, rows, slot, results, FIRST)


@gluon.jit
def _store_floats(acc, first_row, rows, slot, results, FIRST: gl.constexpr):
    """A partial result in float32."""
    row = opaque(first_row) + gl.arange(0, BLOCK, ACC_ROW)
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, ACC))
    piece_row = _piece_row(row, slot, results) * LATENT
    partial_ptr = results.partial_out_ptr + piece_row[:, None] + column[None, :].to(gl.int64)
    gl.store(partial_ptr, acc, mask=(row < rows)[:, None])


@gluon.jit
def _store_in_place(bits, first_row, rows, slot, results, FIRST: gl.constexpr):
    """A partial result in the accumulator's order: of each 32 columns, a 4 by 4 matrix of pairs is transposed."""
    bits = gl.permute(gl.reshape(bits, [BLOCK, HALF // 32, 4, 4]), [0, 1, 3, 2])
    bits = gl.convert_layout(gl.reshape(bits, [BLOCK, HALF // 2]), PAIRS_IN_PLACE, assert_trivial=True)
    row = opaque(first_row) + gl.arange(0, BLOCK, gl.SliceLayout(1, PAIRS_IN_PLACE))
    place = FIRST // 2 + gl.arange(0, HALF // 2, gl.SliceLayout(0, PAIRS_IN_PLACE))
    base_ptr = results.partial_out_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    pair_ptr = base_ptr + (_piece_row(row, slot, results) * LATENT // 2)[:, None] + place[None, :].to(gl.int64)
    gl.store(pair_ptr, bits, mask=(row < rows)[:, None])


@gluon.jit
def _store_narrow(
    acc, norm, peak, rows, query_start, slot, first_row, results, FIRST: gl.constexpr, HEADS: gl.constexpr
):
    """The same where a partial one is float16, in units of each row's peak, which loses 2**-12 of what bfloat16 does.
    Both are scaled by the same code, for less of it to fetch."""
    whole = slot < 0
    peak = gl.maximum(peak * norm, gl.full_like(peak, LEAST_PEAK))
    left, right = _pairs(acc * gl.where(whole, norm, norm * (1.0 / peak))[:, None])
    bits = pack_pairs(left, right, results.out_ptr.dtype.element_ty) if whole else pack_pairs(left, right, gl.float16)
    if whole:
        _store_whole(bits, first_row, rows, query_start, results, FIRST, HEADS)
    else:
        _store_in_place(bits, first_row, rows, slot, results, FIRST)
    if FIRST == 0:
        peak_row = first_row + gl.arange(0, BLOCK, ACC_ROW)
        peak_ptr = results.partial_stats_ptr + NARROW_STATS * _piece_row(peak_row, slot, results) + 2
        gl.store(peak_ptr, peak, mask=(peak_row < rows) & (slot >= 0))


@gluon.jit
def store_item(
    acc, level, row_sum, gain, scale, peak, part, item, results, DTYPE: gl.constexpr, FIRST: gl.constexpr,
    HEADS: gl.constexpr,
):  # fmt: skip
    """Normalises and writes columns FIRST..FIRST + 255; the left warpgroup also writes what the rows summed to.

    Rows that q does not have arrived as zeros and are not written; the left warpgroup reports their request.
    """
    first_row, end_row = rows_of(part)
    query_start = item.query_start
    query_end = query_start + item.query_len
    rows = gl.minimum((gl.minimum(query_end, results.tokens) - query_start) * HEADS, end_row)
    log2_level = multiply(level, scale)
    norm = gl.convert_layout(normaliser(level, row_sum, gain, scale, DTYPE), ACC_ROW)
    if results.partial_out_ptr.dtype.element_ty == gl.float32:
        _store_wide(acc, norm, rows, query_start, item.slot, first_row, results, FIRST, HEADS)
    else:
        _store_narrow(acc, norm, peak, rows, query_start, item.slot, first_row, results, FIRST, HEADS)
    if FIRST == 0:
        row = first_row + gl.arange(0, BLOCK, SCORES_ROW)
        _store_stats(log2_level, row_sum, row, row < rows, item.slot, query_start, results, HEADS)
        if query_end > results.tokens:
            _report_missing(results, item.request, query_end)
