"""Merges the partial results of split units; writes the rows that saw nothing, padding rows, and NaN to faulty rows."""

import triton
import triton.language as tl

from portable_mla.backends.triton.decode.kernels.decode import LN_2, START_MAX
from portable_mla.metadata.split_plan.kernels.plan import FAULTY, FINAL, TOKEN_FIELDS

WIDE_STATS = tl.constexpr(2)  # numbers beside a row of float32
NARROW_STATS = tl.constexpr(4)  # and beside one of float16


@triton.jit
def _wait_for_previous_kernel():
    """Wait until the kernel before has ended and its writes can be seen; launched as its dependent, this one may not.

    Plain inline assembly: the module of Triton's own function for it is not in every vendor's build.
    """
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _units(stats_ptr, row_sum, mask, column, first_column, LATENT: tl.constexpr, NARROW: tl.constexpr):
    """What partial results are in units of: each row's sum, or of float16 a number for each half of the columns."""
    HALF: tl.constexpr = LATENT // 2
    if not NARROW:
        return row_sum[:, :, None]
    elif column.shape[0] <= HALF:
        return tl.load(stats_ptr + 2 + first_column // HALF, mask=mask, other=0.0)[:, :, None]
    else:
        left = tl.load(stats_ptr + 2, mask=mask, other=0.0)
        right = tl.load(stats_ptr + 3, mask=mask, other=0.0)
        return tl.where((column < HALF)[None, None, :], left[:, :, None], right[:, :, None])


@triton.jit
def _merge(
    partial_out_ptr, partial_stats_ptr, slot_lo, slot_hi, row, row_valid, column, first_column, max_rows,
    LATENT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Base-2 maximum and sum of each row, and its weighted sum of partial results, over a run of slots."""
    NARROW: tl.constexpr = partial_out_ptr.dtype.element_ty != tl.float32
    STATS: tl.constexpr = NARROW_STATS if NARROW else WIDE_STATS
    largest = tl.full([row.shape[0]], START_MAX, tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in range(slot_lo, slot_hi, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)
        slot_row = slot.to(tl.int64)[:, None] * max_rows + row[None, :]
        mask = (slot < slot_hi)[:, None] & row_valid[None, :]
        stats_ptr = partial_stats_ptr + STATS * slot_row
        row_max = tl.load(stats_ptr, mask=mask, other=START_MAX)
        row_sum = tl.load(stats_ptr + 1, mask=mask, other=0.0)
        slot_row_ptr = partial_out_ptr + slot_row * LATENT
        part = tl.load(slot_row_ptr[:, :, None] + column[None, None, :], mask=mask[:, :, None], other=0.0)
        new_largest = tl.maximum(largest, tl.max(row_max, 0))
        rescale = tl.exp2(largest - new_largest)
        weight = tl.exp2(row_max - new_largest[None, :])
        unit = _units(stats_ptr, row_sum, mask, column, first_column, LATENT, NARROW)
        acc = acc * rescale[:, None] + tl.sum(part * (weight[:, :, None] * unit), 0)
        total = total * rescale + tl.sum(row_sum * weight, 0)
        largest = new_largest
    return largest, total, acc


@triton.jit
def _in_order(result):
    """Columns in their order: of each 32 of a float16 partial result, a 4 by 4 matrix of pairs is transposed."""
    ROWS: tl.constexpr = result.shape[0]
    COLUMNS: tl.constexpr = result.shape[1]
    pairs = tl.permute(tl.reshape(result, [ROWS, COLUMNS // 32, 4, 4, 2]), 0, 1, 3, 2, 4)
    return tl.reshape(pairs, [ROWS, COLUMNS])


@triton.jit
def _finish_rows(
    partial_out_ptr, partial_stats_ptr, out_ptr, lse_ptr, token, slot_lo, slot_hi, index, live, heads, max_rows,
    stride_out_token, stride_out_head, stride_lse_token, stride_lse_head,
    LATENT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Merges and writes this program's heads and columns of a token; reads and writes nothing unless live."""
    head = (tl.program_id(1) // (LATENT // BLOCK_D)) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_column = (tl.program_id(1) % (LATENT // BLOCK_D)) * BLOCK_D
    row_valid = (head < heads) & live
    row = index * heads + head
    column = first_column + tl.arange(0, BLOCK_D)
    if FEW == BLOCK_S or slot_hi - slot_lo <= FEW:
        largest, total, acc = _merge(
            partial_out_ptr, partial_stats_ptr, slot_lo, slot_hi, row, row_valid, column, first_column, max_rows,
            LATENT, FEW,
        )  # fmt: skip
    else:
        largest, total, acc = _merge(
            partial_out_ptr, partial_stats_ptr, slot_lo, slot_hi, row, row_valid, column, first_column, max_rows,
            LATENT, BLOCK_S,
        )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = tl.where(slot_hi == FAULTY, float("nan"), acc)
    out_row = token.to(tl.int64) * stride_out_token + head.to(tl.int64) * stride_out_head
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    if partial_out_ptr.dtype.element_ty != tl.float32:
        result = _in_order(result)
    tl.store(out_ptr + out_row[:, None] + column[None, :], result, mask=row_valid[:, None])
    if first_column == 0:
        lse_row = token.to(tl.int64) * stride_lse_token + head.to(tl.int64) * stride_lse_head
        lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN_2)
        lse = tl.where(slot_hi == FAULTY, float("nan"), lse)
        tl.store(lse_ptr + lse_row, lse, mask=row_valid)


@triton.jit(do_not_specialize=["heads", "max_rows"])
def combine_kernel(
    token_slots_ptr,  # [tokens, 4] int32: slot_lo, slot_hi or -1 (already final) or -2 (faulty), index in the unit, _
    partial_out_ptr,  # [slots, max_rows, LATENT] float32, or float16, see `_units` and `_in_order`
    partial_stats_ptr,  # [slots, max_rows, 2 or 4] float32: base-2 maximum, sum, unit of each half of the columns
    out_ptr,  # [tokens, heads, LATENT]
    lse_ptr,  # [tokens, heads] float32, natural log
    heads,
    max_rows,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    LATENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    FEW: tl.constexpr,
    REHEARSED: tl.constexpr,  # goes through the code once while it waits, so that it need not be fetched after
    DEPENDENT: tl.constexpr,  # launched before the decode kernel ends; the plan is older than both
):
    """One program merges BLOCK_D columns of BLOCK_R heads of a token, BLOCK_S splits at a time or up to FEW at once."""
    token = tl.program_id(0)
    slot_lo = tl.load(token_slots_ptr + token * TOKEN_FIELDS)
    slot_hi = tl.load(token_slots_ptr + token * TOKEN_FIELDS + 1)
    index = tl.load(token_slots_ptr + token * TOKEN_FIELDS + 2)
    if DEPENDENT:  # noqa: SIM102 a constant, then a value
        if (slot_hi == FINAL) & (token + tl.program_id(1) == 0):  # one must: this grid may not end before the other
            _wait_for_previous_kernel()
    if slot_hi != FINAL:
        first_turn = tl.minimum(heads, 0) if REHEARSED else 1  # 0, which the compiler does not know
        for turn in range(first_turn, 2):
            if DEPENDENT:  # noqa: SIM102
                if turn == 1:
                    _wait_for_previous_kernel()
            _finish_rows(
                partial_out_ptr, partial_stats_ptr, out_ptr, lse_ptr, token, slot_lo, slot_hi, index, turn == 1, heads,
                max_rows, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head, LATENT, BLOCK_D,
                BLOCK_R, BLOCK_S, FEW,
            )  # fmt: skip
