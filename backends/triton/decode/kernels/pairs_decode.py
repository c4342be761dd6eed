"""The KV loops of the decode kernel over fp8 that is loaded in pairs: both products are in float16."""

import triton
import triton.language as tl

from portable_mla.backends.triton.decode.kernels.keys import load_key, load_rope
from portable_mla.backends.triton.decode.kernels.pairs import (
    join_columns,
    join_quarters,
    query_units,
    split_columns,
    split_pairs,
    split_quarters,
)
from portable_mla.backends.triton.decode.kernels.tiles import START_MAX, key_rows, load_pages

# Weights, at most 1, are float16 times this: those down to 2^-29 keep all its digits, those down to 2^-32 bfloat16's
WEIGHT_UNIT = tl.constexpr(2.0**15)
LEAST_SCALE = tl.constexpr(1.0e-30)


@triton.jit
def _pair_scores(scores, query, pairs):
    """The product of these columns of the query and of the keys, added to the scores."""
    q_even, q_odd = split_columns(query)
    even, odd = split_pairs(tl.trans(pairs))
    return tl.dot(q_odd, odd, tl.dot(q_even, even, scores))


@triton.jit
def _pair_values(acc_even, acc_odd, rescale, weights, pairs):
    """One step of the weighted sum of these columns."""
    even, odd = split_pairs(pairs)
    return tl.dot(weights, even, acc_even * rescale[:, None]), tl.dot(weights, odd, acc_odd * rescale[:, None])


@triton.jit
def _weigh(scores, position, row_limit, scale, row_sum, row_max):
    """One online-softmax step up to the weights: those, what scales earlier sums, and sum and maximum."""
    scores = tl.where(position[None, :] < row_limit[:, None], scores * scale[:, None], float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2(row_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    return weights, rescale, row_sum * rescale + tl.sum(weights, 1), new_max


@triton.jit
def _load_scales(scale_ptr, offset, valid):
    """[BLOCK_N, 4]: of each key, the scales of its groups."""
    return load_key(scale_ptr.to(tl.pointer_type(tl.float32), bitcast=True), offset // 4, valid, 0, 4)


@triton.jit
def attend_pairs(
    q_latent, q_rope, kv_ptr, table_row_ptr, tile_lo, tile_hi, kv_len, row_limit, scale, pages,
    stride_kv_page, stride_kv_slot,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Unnormalised output, sum and base-2 maximum of one row tile, without the scale of the tensor.

    Latents are four runs of columns: those of one scale in fp8_656, and elsewhere few keys for a thread to address. The
    scales multiply scores, and weights instead of values: over the largest scale that the program has read, so that
    float16 holds the products whatever the cache's magnitude is.
    """
    RUN: tl.constexpr = LATENT // 8  # pairs
    power, inverse = query_units(q_latent, q_rope)
    scale = scale * power
    q_0, q_1, q_2, q_3 = split_quarters((q_latent * inverse[:, None]).to(tl.float16))
    q_rope = (q_rope * inverse[:, None]).to(q_rope.dtype if GROUPED else tl.float16)
    pairs_ptr = kv_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    row_max = tl.full([BLOCK_H], START_MAX, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    largest = LEAST_SCALE
    zeros = tl.zeros([BLOCK_H, RUN], tl.float32)
    even_0, even_1, even_2, even_3 = zeros, zeros, zeros, zeros
    odd_0, odd_1, odd_2, odd_3 = zeros, zeros, zeros, zeros
    page = load_pages(table_row_ptr, tile_lo, tile_hi, kv_len, pages, PAGE_SIZE, BLOCK_N)
    for tile in tl.range(tile_lo, tile_hi, num_stages=NUM_STAGES):
        next_page = load_pages(table_row_ptr, tile + 1, tile_hi, kv_len, pages, PAGE_SIZE, BLOCK_N)
        position, valid, offset = key_rows(page, tile, kv_len, stride_kv_page, stride_kv_slot, PAGE_SIZE, BLOCK_N)
        pairs_0 = load_key(pairs_ptr, offset // 2, valid, 0, RUN)
        pairs_1 = load_key(pairs_ptr, offset // 2, valid, RUN, RUN)
        pairs_2 = load_key(pairs_ptr, offset // 2, valid, 2 * RUN, RUN)
        pairs_3 = load_key(pairs_ptr, offset // 2, valid, 3 * RUN, RUN)
        none = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
        if GROUPED:
            scales = _load_scales(kv_ptr + LATENT, offset, valid)
            scale_0, scale_1, scale_2, scale_3 = split_quarters(scales)
            scores = _pair_scores(none, q_0, pairs_0) * tl.trans(scale_0)
            scores += _pair_scores(none, q_1, pairs_1) * tl.trans(scale_1)
            scores += _pair_scores(none, q_2, pairs_2) * tl.trans(scale_2)
            scores += _pair_scores(none, q_3, pairs_3) * tl.trans(scale_3)
            if ROPE > 0:
                rope = load_rope(kv_ptr, offset, valid, q_rope.dtype, LATENT, ROPE, None, True)
                scores = tl.dot(q_rope, tl.trans(rope), scores)
        else:
            scores = _pair_scores(_pair_scores(none, q_0, pairs_0), q_1, pairs_1)
            scores = _pair_scores(_pair_scores(scores, q_2, pairs_2), q_3, pairs_3)
            if ROPE > 0:
                scores = _pair_scores(scores, q_rope, load_key(pairs_ptr, offset // 2, valid, LATENT // 2, ROPE // 2))
        weights, rescale, row_sum, row_max = _weigh(scores, position, row_limit, scale, row_sum, row_max)
        weights *= WEIGHT_UNIT
        weights_0, weights_1, weights_2, weights_3 = weights, weights, weights, weights
        if GROUPED:
            new_largest = tl.maximum(largest, tl.max(tl.abs(scales)))
            rescale *= largest / new_largest
            weights *= 1.0 / new_largest
            largest = new_largest
            weights_0, weights_1 = weights * tl.trans(scale_0), weights * tl.trans(scale_1)
            weights_2, weights_3 = weights * tl.trans(scale_2), weights * tl.trans(scale_3)
        weights_0, weights_1 = weights_0.to(tl.float16), weights_1.to(tl.float16)
        weights_2, weights_3 = weights_2.to(tl.float16), weights_3.to(tl.float16)
        even_0, odd_0 = _pair_values(even_0, odd_0, rescale, weights_0, pairs_0)
        even_1, odd_1 = _pair_values(even_1, odd_1, rescale, weights_1, pairs_1)
        even_2, odd_2 = _pair_values(even_2, odd_2, rescale, weights_2, pairs_2)
        even_3, odd_3 = _pair_values(even_3, odd_3, rescale, weights_3, pairs_3)
        page = next_page
    latent_0, latent_1 = join_columns(even_0, odd_0), join_columns(even_1, odd_1)
    latent_2, latent_3 = join_columns(even_2, odd_2), join_columns(even_3, odd_3)
    acc = join_quarters(latent_0, latent_1, latent_2, latent_3) * (1.0 / WEIGHT_UNIT)
    if GROUPED:
        acc *= largest
    return acc, row_sum, row_max
