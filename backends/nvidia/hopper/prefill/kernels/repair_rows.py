"""Rows that a value which they do not see made NaN, computed again key by key: its weight of 0 times NaN is NaN.

Products of whole blocks cannot leave such a value out for some of their rows alone. Looking for it in each block, by
the warp that loads values, cost 1 to 20 % of a prefill: predicted none, H200, 4x2048x128 1060 us -> 1146. Looking at an
item's results instead: predicted 0.5 %, 1081 -> 1094. What follows runs on broken inputs alone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.hopper.kernels.ptx import synchronize
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import HALF, read_address
from portable_mla.backends.triton.decode.kernels.decode import LN_2

STEP = gl.constexpr(32)  # rows at a time
COLUMNS = gl.constexpr(32)  # of a part of a score; widths are multiples of it


@gluon.jit
def _rows_of(room, DTYPE: gl.constexpr, TENSOR: gl.constexpr, head, row):
    """Pointers to rows of q, k_nope or v (0, 1, 3) of one head, or of k_pe (2)."""
    base = read_address(room, TENSOR).to(gl.pointer_type(DTYPE), bitcast=True)
    if TENSOR != 2:
        base += head.to(gl.int64) * read_address(room, 8 + (TENSOR if TENSOR < 2 else 2))
    return base + row.to(gl.int64) * read_address(room, 4 + TENSOR)


@gluon.jit
def _add_scores(scores, q_row_ptr, k_row_ptr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """Adds the product of so many columns of each row's query and of one key."""
    for part in range(WIDTH // COLUMNS):
        column = part * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        q = gl.load(q_row_ptr[:, None] + column[None, :]).to(gl.float32)
        scores += gl.sum(q * gl.load(k_row_ptr + column).to(gl.float32)[None, :], 1)
    return scores


@gluon.jit
def mend_rows(
    room, item, results, scale, NOPE: gl.constexpr, ROPE: gl.constexpr, V_DIM: gl.constexpr, WARPGROUP: gl.constexpr
):
    """Write the item's results anew where they are NaN, each row over the keys that it sees; NaN that it sees stays.
    Behind `store`, whose LSE is right already."""
    synchronize()
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    DTYPE: gl.constexpr = room.values.dtype
    column = gl.arange(0, V_DIM, gl.SliceLayout(0, layout))
    for first in range(WARPGROUP * HALF, WARPGROUP * HALF + HALF, STEP):
        row = first + gl.arange(0, STEP, rows)
        valid = row < item.rows
        token = item.first_row + gl.minimum(row, gl.maximum(item.rows - 1, 0))
        lse_row = token.to(gl.int64) * results.stride_lse_token + item.head.to(gl.int64) * results.stride_lse_head
        log2_sum = gl.load(results.lse_ptr + lse_row) / LN_2
        q_row_ptr = _rows_of(room, DTYPE, 0, item.head, token)
        acc = gl.zeros([STEP, V_DIM], gl.float32, layout)
        for key in range(gl.minimum(item.sees + gl.minimum(first + STEP, item.rows) - 1, item.key_len)):
            key_row = item.first_key + key
            scores = gl.zeros([STEP], gl.float32, rows)
            scores = _add_scores(scores, q_row_ptr, _rows_of(room, DTYPE, 1, item.head, key_row), NOPE, layout)
            if ROPE:
                k_pe_ptr = _rows_of(room, DTYPE, 2, item.head, key_row)
                scores = _add_scores(scores, q_row_ptr + NOPE, k_pe_ptr, ROPE, layout)
            value = gl.load(_rows_of(room, DTYPE, 3, item.head, key_row) + column).to(gl.float32)
            weight = gl.exp2(scores * scale - log2_sum)
            seen = key < item.sees + row
            acc += gl.where(seen[:, None], weight[:, None] * value[None, :], gl.zeros_like(acc))
        out_row = token.to(gl.int64) * results.stride_out_token + item.head.to(gl.int64) * results.stride_out_head
        out_ptr = (results.out_ptr + out_row)[:, None] + column[None, :].to(gl.int64)
        stored = gl.load(out_ptr).to(gl.float32)
        gl.store(out_ptr, acc.to(results.out_ptr.dtype.element_ty), mask=valid[:, None] & (stored != stored))
