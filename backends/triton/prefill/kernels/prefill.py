"""The prefill kernel of expanded MLA: ragged sequences, per-head keys and values, rope keys shared by all heads."""

import triton
import triton.language as tl

from portable_mla.backends.triton.decode.kernels.decode import LN_2, LOG2_E, START_MAX
from portable_mla.backends.triton.kernels.isolated import EXPANDED_COLUMNS, prefill_isolated, rows_with_leaks
from portable_mla.backends.triton.kernels.program_id import grouped_program_id


@triton.jit
def _load_offset(cu_ptr, index, valid, most):
    """An offset, forced into [0, most]: whatever it says, no row outside is touched, and no difference overflows."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + index, mask=valid, other=0), 0), most)


@triton.jit
def _find_block(cu_q_ptr, program, sequences, tokens, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """Sequence and block of query tokens of one program; `sequences` for those past the last query token.

    The blocks of the sequences before are counted from their offsets, SEARCH at a time: nothing is planned.
    """
    sequence = 0
    before = 0
    counted = 0
    for first in range(0, sequences, SEARCH):
        index = first + tl.arange(0, SEARCH)
        start = _load_offset(cu_q_ptr, index, index < sequences, tokens)
        length = _load_offset(cu_q_ptr, index + 1, index < sequences, tokens) - start
        blocks = (tl.maximum(length, 0) + BLOCK_M - 1) // BLOCK_M
        passed = (counted + tl.cumsum(blocks, 0) <= program) & (index < sequences)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, blocks, 0), 0)
        counted += tl.sum(blocks, 0)
    return sequence, program - before


@triton.jit
def _span(cu_ptr, sequence, sequences, most):
    """First row and rows of one sequence; of padding, what is left."""
    start = _load_offset(cu_ptr, sequence, True, most)
    end = _load_offset(cu_ptr, sequence + 1, sequence < sequences, most)
    return start, tl.maximum(tl.where(sequence < sequences, end, most) - start, 0)


@triton.jit
def _load_rows(head_ptr, row, valid, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    cells = (head_ptr + row.to(tl.int64) * stride)[:, None] + column[None, :]
    if MASKED:
        return tl.load(cells, mask=valid[:, None], other=0.0)
    return tl.load(cells)


@triton.jit
def _walk(
    acc, row_sum, row_max, q_nope, q_rest, q_rope, k_nope_ptr, k_pe_ptr, v_ptr, nope_desc, rest_desc, rope_desc, v_desc,
    head, first_key, kv_len, row_limit, tile_lo, tile_hi, scale, stride_nope, stride_pe, stride_v,
    NOPE: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles [tile_lo, tile_hi); row_max is of scores without their scale.

    Only masked tiles may hold a key that some row must not see: they load by pointer, so that rows past the sequence
    arrive as zeros, never as somebody's NaN.
    """
    for tile in tl.range(tile_lo, tile_hi, num_stages=NUM_STAGES):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row, valid = first_key + position, position < kv_len
        if DESCRIPTORS and not MASKED:
            k_nope = nope_desc.load([first_key + tile * BLOCK_N, head, 0]).reshape(BLOCK_N, NOPE)
        else:
            k_nope = _load_rows(k_nope_ptr, row, valid, stride_nope, 0, NOPE, MASKED)
        scores = tl.dot(q_nope, tl.trans(k_nope))
        if REST > 0:
            if DESCRIPTORS and not MASKED:
                k_rest = rest_desc.load([first_key + tile * BLOCK_N, head, NOPE]).reshape(BLOCK_N, REST)
            else:
                k_rest = _load_rows(k_nope_ptr, row, valid, stride_nope, NOPE, REST, MASKED)
            scores = tl.dot(q_rest, tl.trans(k_rest), scores)
        if ROPE > 0:
            if DESCRIPTORS and not MASKED:
                k_pe = rope_desc.load([first_key + tile * BLOCK_N, 0])
            else:
                k_pe = _load_rows(k_pe_ptr, row, valid, stride_pe, 0, ROPE, MASKED)
            scores = tl.dot(q_rope, tl.trans(k_pe), scores)
        if MASKED:
            scores = tl.where(position[None, :] < row_limit[:, None], scores, float("-inf"))
        # The difference comes before the scale, which is positive. A fused scores * scale - maximum would spare a
        # multiplication a score, but differs from 0 where both are equal and large: weights of 1 then round
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2((row_max - new_max) * scale)
        weights = tl.exp2((scores - new_max[:, None]) * scale)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        if DESCRIPTORS and not MASKED:
            v = v_desc.load([first_key + tile * BLOCK_N, head, 0]).reshape(BLOCK_N, V)
        else:
            v = _load_rows(v_ptr, row, valid, stride_v, 0, V, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _write_block(
    acc, row_sum, row_max, softmax_scale, column, token, head, row_valid, out_ptr, lse_ptr, stride_out_token,
    stride_out_head, stride_lse_token, stride_lse_head,
):  # fmt: skip
    """Columns of a block of query tokens."""
    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    result = acc / row_sum[:, None]
    out_row = token * stride_out_token + head * stride_out_head
    tl.store(
        (out_ptr + out_row)[:, None] + column[None, :], result.to(out_ptr.dtype.element_ty), mask=row_valid[:, None]
    )
    lse = tl.where(empty, float("-inf"), (row_max * softmax_scale * LOG2_E + tl.log2(row_sum)) * LN_2)
    tl.store(lse_ptr + token * stride_lse_token + head * stride_lse_head, lse, mask=row_valid)


@triton.jit(do_not_specialize=["softmax_scale", "tokens", "keys", "sequences", "heads"])
def prefill_kernel(
    q_ptr,  # [tokens, heads, NOPE + REST + ROPE]
    k_nope_ptr,  # [keys, heads, NOPE + REST]
    k_pe_ptr,  # [keys, ROPE]
    v_ptr,  # [keys, heads, V]
    nope_desc,  # descriptor of k_nope, block [BLOCK_N, 1, NOPE], or None
    rest_desc,  # descriptor of k_nope, block [BLOCK_N, 1, REST], or None
    rope_desc,  # descriptor of k_pe, block [BLOCK_N, ROPE], or None
    v_desc,  # descriptor of v, block [BLOCK_N, 1, V], or None
    cu_q_ptr,  # [sequences + 1] int32
    cu_k_ptr,  # [sequences + 1] int32
    out_ptr,  # [tokens, heads, V]
    lse_ptr,  # [tokens, heads] float32, natural log
    softmax_scale,
    tokens,
    keys,
    sequences,
    heads,
    stride_q_token,
    stride_q_head,
    stride_nope_token,
    stride_nope_head,
    stride_pe_token,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    NOPE: tl.constexpr,  # the power of two below or at the nope width
    REST: tl.constexpr,  # what is left of it, a power of two or 0
    ROPE: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NUM_XCDS: tl.constexpr,
):
    """One program attends for one block of query tokens of one head. The blocks of a head are neighbours, to find its
    keys in L2, and the last of a sequence, which see most, begin first."""
    blocks = tl.num_programs(0) // heads
    program = grouped_program_id(NUM_XCDS)
    head = program // blocks
    sequence, block = _find_block(cu_q_ptr, blocks - 1 - program % blocks, sequences, tokens, BLOCK_M, SEARCH)
    first_token, query_len = _span(cu_q_ptr, sequence, sequences, tokens)
    first = block * BLOCK_M
    if first < query_len:
        first_key, kv_len = _span(cu_k_ptr, sequence, sequences, keys)
        kv_len = tl.where(sequence < sequences, kv_len, 0)
        index = first + tl.arange(0, BLOCK_M)
        row_valid = index < query_len
        row_limit, least_limit, most_limit = tl.where(row_valid, kv_len, 0), kv_len, kv_len
        if CAUSAL:
            hidden = kv_len - query_len + 1  # keys that query token 0 sees
            row_limit = tl.where(row_valid, hidden + index, 0)
            least_limit = tl.maximum(hidden + first, 0)
            most_limit = tl.maximum(hidden + tl.minimum(first + BLOCK_M, query_len) - 1, 0)
            least_limit = tl.minimum(least_limit, most_limit)
        tile_full = least_limit // BLOCK_N
        tile_hi = (most_limit + BLOCK_N - 1) // BLOCK_N

        wide_head = head.to(tl.int64)
        token = (first_token + index).to(tl.int64)
        q_head_ptr = q_ptr + wide_head * stride_q_head
        q_nope = _load_rows(q_head_ptr, token, row_valid, stride_q_token, 0, NOPE, True)
        q_rest, q_rope = q_nope, q_nope
        if REST > 0:
            q_rest = _load_rows(q_head_ptr, token, row_valid, stride_q_token, NOPE, REST, True)
        if ROPE > 0:
            q_rope = _load_rows(q_head_ptr, token, row_valid, stride_q_token, NOPE + REST, ROPE, True)
        row_max = tl.full([BLOCK_M], START_MAX, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, V], tl.float32)
        nope_head_ptr, v_head_ptr = k_nope_ptr + wide_head * stride_nope_head, v_ptr + wide_head * stride_v_head
        for masked in tl.static_range(2):
            acc, row_sum, row_max = _walk(
                acc, row_sum, row_max, q_nope, q_rest, q_rope, nope_head_ptr, k_pe_ptr, v_head_ptr,
                nope_desc, rest_desc, rope_desc, v_desc, head, first_key, kv_len, row_limit,
                tile_full * masked, tile_full + (tile_hi - tile_full) * masked, softmax_scale * LOG2_E,
                stride_nope_token, stride_pe_token, stride_v_token,
                NOPE, REST, ROPE, V, BLOCK_N, NUM_STAGES, DESCRIPTORS, masked == 1,
            )  # fmt: skip

        leaks = tl.zeros([BLOCK_M], tl.int32)
        if CAUSAL:  # noqa: SIM102 a constant, then a value
            # only masked tiles have hidden keys; and Triton 3.6 compiles no result of tcgen05 that is reduced over
            # columns and then over rows, unless a branch is between
            if tile_full < tile_hi:
                leaks = rows_with_leaks(acc, row_sum)
        _write_block(
            acc, row_sum, row_max, softmax_scale, tl.arange(0, V), token, wide_head, row_valid, out_ptr,
            lse_ptr, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head,
        )  # fmt: skip
        if CAUSAL:  # noqa: SIM102 a constant, then a value
            if tl.max(leaks, 0) > 0:
                tl.debug_barrier()  # what follows overwrites what other threads wrote
                for column in tl.range(0, V, EXPANDED_COLUMNS, num_stages=1):
                    some, some_sum, some_max = prefill_isolated(
                        q_head_ptr + token * stride_q_token, nope_head_ptr, k_pe_ptr, v_head_ptr + column, row_valid,
                        first_key, kv_len, row_limit, tile_hi, softmax_scale * LOG2_E, stride_nope_token,
                        stride_pe_token, stride_v_token, NOPE + REST, ROPE, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    _write_block(
                        some, some_sum, some_max, softmax_scale, column + tl.arange(0, EXPANDED_COLUMNS), token,
                        wide_head, row_valid, out_ptr, lse_ptr, stride_out_token, stride_out_head, stride_lse_token,
                        stride_lse_head,
                    )  # fmt: skip
