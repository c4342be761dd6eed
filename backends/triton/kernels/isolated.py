"""Attention over keys that some rows may not see and whose values may not be finite.

A hidden key weighs 0, but 0 * NaN is NaN. To keep such values out of each step would cost as many operations as there
are values; so a program looks for what they leave in its result, and then attends again, a few columns at a time.
"""

import triton
import triton.language as tl

from portable_mla.backends.triton.decode.kernels.keys import GROUP, dequantise, load_key, load_rope, load_stored
from portable_mla.backends.triton.decode.kernels.tiles import START_MAX, key_rows, load_pages

COLUMNS = tl.constexpr(GROUP.value)  # of a latent, at a time; they share a scale where rows carry scales
EXPANDED_COLUMNS = tl.constexpr(64)  # of expanded keys and values, at a time; with 32, Triton 3.6 leaves shared memory


@triton.jit
def rows_with_leaks(acc, row_sum):
    """1 for each row whose output is NaN though its sum, of the weights of the keys that it sees, is not; else 0."""
    total = tl.sum(acc, 1)
    return ((total != total) & (row_sum == row_sum)).to(tl.int32)


@triton.jit
def _finite_columns(
    kv_ptr, offset, valid, first, dtype: tl.constexpr, LATENT: tl.constexpr, FLOAT8: tl.constexpr, GROUPED: tl.constexpr
):
    """These columns of one tile's latents with 0 in place of what is not finite, and where that was not."""
    stored = load_stored(kv_ptr, offset + first, valid, COLUMNS, FLOAT8, GROUPED)
    if GROUPED:
        scale_ptr = (kv_ptr + LATENT).to(tl.pointer_type(tl.float32), bitcast=True)
        scales = tl.load(scale_ptr + offset // 4 + first // GROUP, mask=valid, other=0.0)
        latent = (dequantise(stored, tl.float32, FLOAT8) * scales[:, None]).to(dtype)
    else:
        latent = dequantise(stored, dtype, FLOAT8)
    finite = tl.abs(latent.to(tl.float32)) < float("inf")
    return tl.where(finite, latent, 0.0).to(dtype), finite


@triton.jit
def attend_isolated(
    q_row_ptr, row_valid, kv_ptr, table_row_ptr, first_column, tile_lo, tile_hi, kv_len, row_limit, scale, pages,
    stride_kv_page, stride_kv_slot,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    FLOAT8: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Unnormalised output of COLUMNS columns, sum and base-2 maximum of one row tile. A latent that is not finite makes
    the rows that see it NaN, and is nothing to the others."""
    dtype: tl.constexpr = q_row_ptr.dtype.element_ty
    column = tl.arange(0, COLUMNS)
    row_max = tl.full([BLOCK_H], START_MAX, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, COLUMNS], tl.float32)
    for tile in tl.range(tile_lo, tile_hi, num_stages=1):
        page = load_pages(table_row_ptr, tile, tile_hi, kv_len, pages, PAGE_SIZE, BLOCK_N)
        position, valid, offset = key_rows(page, tile, kv_len, stride_kv_page, stride_kv_slot, PAGE_SIZE, BLOCK_N)
        scores = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        sound = tl.full([BLOCK_N], 1, tl.int32)
        for first in tl.range(0, LATENT, COLUMNS, num_stages=1):
            q = tl.load(q_row_ptr[:, None] + (first + column)[None, :], mask=row_valid[:, None], other=0.0)
            latent, finite = _finite_columns(kv_ptr, offset, valid, first, dtype, LATENT, FLOAT8, GROUPED)
            sound = tl.minimum(sound, tl.min(finite.to(tl.int32), 1))
            scores = tl.dot(q, tl.trans(latent), scores)
        if ROPE > 0:
            rope_column = LATENT + tl.arange(0, ROPE)
            q = tl.load(q_row_ptr[:, None] + rope_column[None, :], mask=row_valid[:, None], other=0.0)
            rope = load_rope(kv_ptr, offset, valid, dtype, LATENT, ROPE, FLOAT8, GROUPED)
            scores = tl.dot(q, tl.trans(rope), scores)
        scores = tl.where(sound[None, :] > 0, scores * scale, float("nan"))
        scores = tl.where(position[None, :] < row_limit[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2(row_max - new_max)
        weights = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        value, _ = _finite_columns(kv_ptr, offset, valid, first_column, dtype, LATENT, FLOAT8, GROUPED)
        acc = tl.dot(weights.to(dtype), value, acc * rescale[:, None])
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def prefill_isolated(
    q_ptr, k_nope_ptr, k_pe_ptr, v_ptr, row_valid, key_lo, kv_len, row_limit, tile_hi, scale,
    stride_nope, stride_pe, stride_v,
    NOPE: tl.constexpr, ROPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Unnormalised output of EXPANDED_COLUMNS columns, sum and maximum, without the scale, of a block of query tokens.
    A value that is not finite makes its column NaN in the rows that see it, and is nothing to the others.

    q_ptr: of each row; v_ptr: of the first column.
    """
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    column = tl.arange(0, EXPANDED_COLUMNS)
    row_max = tl.full([BLOCK_M], START_MAX, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, EXPANDED_COLUMNS], tl.float32)
    for tile in tl.range(0, tile_hi, num_stages=1):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, valid = (key_lo + position).to(tl.int64), position < kv_len
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, NOPE, EXPANDED_COLUMNS, num_stages=1):
            q = tl.load(q_ptr[:, None] + (first + column)[None, :], mask=row_valid[:, None], other=0.0)
            scores = tl.dot(
                q, tl.trans(load_key(k_nope_ptr + first, row * stride_nope, valid, 0, EXPANDED_COLUMNS)), scores
            )
        if ROPE > 0:
            rope_column = NOPE + tl.arange(0, ROPE)
            q = tl.load(q_ptr[:, None] + rope_column[None, :], mask=row_valid[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(load_key(k_pe_ptr, row * stride_pe, valid, 0, ROPE)), scores)
        scores = tl.where(position[None, :] < row_limit[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2((row_max - new_max) * scale)
        weights = tl.exp2((scores - new_max[:, None]) * scale)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        v = load_key(v_ptr, row * stride_v, valid, 0, EXPANDED_COLUMNS)
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        # rows see their first keys: those that see a column's first fault of this tile, and no others, see a fault
        fault = tl.min(tl.where(finite, 0x7FFFFFFF, position[:, None]), 0)
        acc = tl.dot(weights.to(dtype), tl.where(finite, v, 0.0).to(dtype), acc * rescale[:, None])
        acc = tl.where(fault[None, :] < row_limit[:, None], float("nan"), acc)
        row_max = new_max
    return acc, row_sum, row_max
