"""How a warpgroup of the sm90 decode kernel writes its half of an item's result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.hopper.decode.kernels.scores import ACC, ACC_ROW, SCORES_ROW
from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import BLOCK, HALF, LATENT, rows_of
from portable_mla.backends.nvidia.hopper.kernels.ptx import opaque, pack_pairs
from portable_mla.backends.triton.combine.kernels.combine import NARROW_STATS, WIDE_STATS
from portable_mla.backends.triton.decode.kernels.decode import LN_2
from portable_mla.metadata.kernels.status import QUERY_TOKENS

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
def _piece_row(row, slot, results):
    """Which of all partial results' rows a row of a piece is."""
    return slot.to(gl.int64) * opaque(results.max_rows) + row


@gluon.jit
def _store_lse(log2_level, row_sum, row, rows, query_start, results, HEADS: gl.constexpr):
    """LSE of a whole unit."""
    token = query_start + row // HEADS
    lse_row = token.to(gl.int64) * results.stride_lse_token + (row % HEADS).to(gl.int64) * results.stride_lse_head
    empty = row_sum == 0.0
    log2_sum = log2_level + gl.log2(gl.where(empty, gl.full_like(row_sum, 1.0), row_sum))
    lse = gl.where(empty, gl.full_like(row_sum, float("-inf")), log2_sum * LN_2)
    gl.store(results.lse_ptr + lse_row, lse, mask=row < rows)


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
def _store_floats(acc, norm, first_row, rows, slot, results, FIRST: gl.constexpr):
    """A partial result in float32."""
    row = opaque(first_row) + gl.arange(0, BLOCK, ACC_ROW)
    column = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, ACC))
    piece_row = _piece_row(row, slot, results) * LATENT
    partial_ptr = results.partial_out_ptr + piece_row[:, None] + column[None, :].to(gl.int64)
    gl.store(partial_ptr, acc * norm[:, None], mask=(row < rows)[:, None])


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
def _stored_rows(part, item, results, HEADS: gl.constexpr):
    """The program's first row, and the end of those that q has: rows that it does not have arrived as zeros."""
    first_row, end_row = rows_of(part)
    query_end = gl.minimum(item.query_start + item.query_len, results.tokens)
    return first_row, gl.minimum((query_end - item.query_start) * HEADS, end_row)


@gluon.jit
def is_wide(item, results):
    """Whether an item's result is of a unit that was not cut, or float32."""
    return results.partial_out_ptr.dtype.element_ty == gl.float32 or item.slot < 0


@gluon.jit
def store_narrow(acc, right_vector, part, item, results, FIRST: gl.constexpr, HEADS: gl.constexpr):
    """Columns FIRST..FIRST + 255 of a partial result as float16 in units of each row's peak among them, of which it
    loses at most 2**-12. The peak is returned, and told by the right warpgroup; what rows sum to need not be known.
    Nothing where the result is wide."""
    peak = gl.full([BLOCK], 1.0, gl.float32, ACC_ROW)
    if results.partial_out_ptr.dtype.element_ty != gl.float32:  # noqa: SIM102 a constant, then a value
        if item.slot >= 0:
            peak = gl.maximum(gl.max(gl.abs(acc), 1), gl.full_like(peak, LEAST_PEAK))
            if FIRST > 0:
                right_vector.store(peak)
            first_row, rows = _stored_rows(part, item, results, HEADS)
            left, right = _pairs(acc * (1.0 / peak)[:, None])
            _store_in_place(pack_pairs(left, right, gl.float16), first_row, rows, item.slot, results, FIRST)
    return peak


@gluon.jit
def store_wide(acc, norm, part, item, results, FIRST: gl.constexpr, HEADS: gl.constexpr):
    """Columns FIRST..FIRST + 255 of the result of a unit that was not cut, or of a partial one in float32."""
    first_row, rows = _stored_rows(part, item, results, HEADS)
    norm = gl.convert_layout(norm, ACC_ROW)
    if item.slot < 0:
        left, right = _pairs(acc * norm[:, None])
        bits = pack_pairs(left, right, results.out_ptr.dtype.element_ty)
        _store_whole(bits, first_row, rows, item.query_start, results, FIRST, HEADS)
    elif results.partial_out_ptr.dtype.element_ty == gl.float32:
        _store_floats(acc, norm, first_row, rows, item.slot, results, FIRST)


@gluon.jit
def store_stats(
    log2_level, row_sum, norm, left_peak, right_vector, part, item, results, HEADS: gl.constexpr
):  # fmt: skip
    """LSE of a whole unit; of a piece level and sum, whose logarithm would lose the sum's digits, and of a float16 one
    what each half of the columns is in units of. The request is reported whose rows q does not have."""
    first_row, rows = _stored_rows(part, item, results, HEADS)
    row = first_row + gl.arange(0, BLOCK, SCORES_ROW)
    if item.slot < 0:
        _store_lse(log2_level, row_sum, row, rows, item.query_start, results, HEADS)
    else:
        NARROW: gl.constexpr = results.partial_out_ptr.dtype.element_ty != gl.float32
        STATS: gl.constexpr = NARROW_STATS if NARROW else WIDE_STATS
        stats_ptr = results.partial_stats_ptr + STATS * _piece_row(row, item.slot, results)
        gl.store(stats_ptr, log2_level, mask=row < rows)
        gl.store(stats_ptr + 1, row_sum, mask=row < rows)
        if NARROW:
            unit = row_sum * norm
            gl.store(stats_ptr + 2, unit * gl.convert_layout(left_peak, SCORES_ROW), mask=row < rows)
            gl.store(stats_ptr + 3, unit * right_vector.load(SCORES_ROW), mask=row < rows)
    if item.query_start + item.query_len > results.tokens:
        _report_missing(results, item.request, item.query_start + item.query_len)
