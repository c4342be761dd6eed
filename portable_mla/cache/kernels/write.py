"""The kernel that normalises, rotates, quantises and stores the new rows of a latent cache."""

import triton
import triton.language as tl

from portable_mla.core import cache_format
from portable_mla.metadata.kernels.status import POSITION, SLOT, load_kv_scale, report_fault, report_kv_scale
from portable_mla.runtime.kernels.float8 import float8_bits

GROUP = tl.constexpr(cache_format.GROUP)
SMALLEST_SCALE = tl.constexpr(0x00800000)  # float32 bits of 2**-126


@triton.jit
def _report(status_ptr, FAULT: tl.constexpr, token, value, is_wrong):
    """Keep a wrong index, as near as an int32 comes."""
    if status_ptr is not None:
        one = tl.arange(0, 1)
        near = tl.minimum(tl.maximum(value.to(tl.int64), -2147483648), 2147483647)
        report_fault(status_ptr, FAULT, token + one, near + one, tl.where(is_wrong, one, 1) == 0)


@triton.jit
def _normalise(latent, norm_weight_ptr, eps, column, LATENT: tl.constexpr):
    """RMSNorm. The factor is found in float64, where the order of the sum does not show in its float32."""
    wide = latent.to(tl.float64)
    mean = tl.sum(wide * wide, 0) / LATENT
    factor = (1.0 / tl.sqrt(mean + eps)).to(tl.float32)
    weight = tl.load(norm_weight_ptr + column, mask=column < LATENT, other=0.0).to(tl.float32)
    return latent * factor * weight


@triton.jit
def _cos_sin(
    cos_sin_ptr, positions_ptr, status_ptr, token, table_rows, stride_position, stride_table, pair, HALF: tl.constexpr
):
    """Cosines and sines of a token's position; NaN, and a report, where the table has no such row."""
    position = tl.load(positions_ptr + token * stride_position).to(tl.int64)
    is_wrong = (position < 0) | (position >= table_rows)
    _report(status_ptr, POSITION, token, position, is_wrong)
    cell_ptr = cos_sin_ptr + tl.where(is_wrong, 0, position) * stride_table + pair
    there = pair < tl.where(is_wrong, 0, HALF)
    cos = tl.load(cell_ptr, mask=there, other=float("nan")).to(tl.float32)
    sin = tl.load(cell_ptr + HALF, mask=there, other=float("nan")).to(tl.float32)
    return cos, sin


@triton.jit
def _pairs(PADDED_HALF: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Index of each pair, and the columns of its two values."""
    pair = tl.arange(0, PADDED_HALF)
    if INTERLEAVED:
        return pair, 2 * pair, 2 * pair + 1
    return pair, pair, pair + HALF


@triton.jit
def _to_cache(values, scale, FLOAT8: tl.constexpr, dtype: tl.constexpr):
    """float32 values as the cache stores them. FLOAT8: the flavour, None where it is not fp8."""
    if FLOAT8 is None:
        return values.to(dtype)
    else:
        return float8_bits(tl.div_rn(values, scale + tl.zeros_like(values)), FLOAT8 == "e4m3fnuz")


@triton.jit
def _group_scales(latent):
    """[GROUPS] powers of two that bring the values of each row of latent [GROUPS, GROUP] into the range."""
    largest = tl.max(tl.where(latent != latent, 0.0, tl.abs(latent)), 1)
    bits = tl.div_rn(largest, 448.0 + tl.zeros_like(largest)).to(tl.int32, bitcast=True)
    return ((tl.maximum(bits, SMALLEST_SCALE) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _write_latent(
    kv_latent_ptr, kv_group_ptr, rows_ptr, c_kv_ptr, norm_weight_ptr, eps, scale, offset, group_offset, is_stored,
    LATENT: tl.constexpr, PADDED: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, PADDED)
    latent = tl.load(c_kv_ptr + column, mask=column < LATENT, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        latent = _normalise(latent, norm_weight_ptr, eps, column, LATENT)
    if rows_ptr is not None:
        tl.store(rows_ptr + column, latent.to(rows_ptr.dtype.element_ty), mask=column < LATENT)
    kept = column < tl.where(is_stored, LATENT, 0)
    if kv_group_ptr is None:
        stored = _to_cache(latent, scale, FLOAT8, kv_latent_ptr.dtype.element_ty)
    else:
        groups = tl.reshape(latent, [PADDED // GROUP, GROUP])
        scales = _group_scales(groups)
        group = tl.arange(0, PADDED // GROUP)
        tl.store(kv_group_ptr + group_offset + group, scales, mask=group < tl.where(is_stored, PADDED // GROUP, 0))
        stored = tl.reshape(_to_cache(groups, scales[:, None], FLOAT8, tl.uint8), [PADDED])
    tl.store(kv_latent_ptr + offset + column, stored, mask=kept)


@triton.jit
def _turn(from_ptr, first, second, cos, sin, mask, TURNS: tl.constexpr):
    """The two values of each pair, turned where there is a table."""
    one = tl.load(from_ptr + first, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(from_ptr + second, mask=mask, other=0.0).to(tl.float32)
    if TURNS:
        return one * cos - other * sin, other * cos + one * sin
    return one, other


@triton.jit
def _store_pair(to_ptr, first, second, turned, mask):
    tl.store(to_ptr + first, turned[0].to(to_ptr.dtype.element_ty), mask=mask)
    tl.store(to_ptr + second, turned[1].to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_heads(
    q_source_ptr, q_pe_ptr, stride_source_head, stride_q_head, heads, cos, sin,
    PADDED_HALF: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """One block of a token's heads."""
    pair, first, second = _pairs(PADDED_HALF, HALF, INTERLEAVED)
    head = ((tl.program_id(1) - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
    mask = (head < heads)[:, None] & (pair < HALF)[None, :]
    from_ptr = q_source_ptr + (head * stride_source_head)[:, None]
    to_ptr = q_pe_ptr + (head * stride_q_head)[:, None]
    turned = _turn(from_ptr, first[None, :], second[None, :], cos[None, :], sin[None, :], mask, TURNS)
    _store_pair(to_ptr, first[None, :], second[None, :], turned, mask)


@triton.jit(do_not_specialize=["eps", "pages", "table_rows", "heads"])
def write_latent_kernel(
    kv_latent_ptr,  # [pages, PAGE_SIZE, LATENT] of the cache; uint8 where it is fp8
    kv_rope_ptr,  # [pages, PAGE_SIZE, ROPE] of the cache
    kv_group_ptr,  # [pages, PAGE_SIZE, LATENT / GROUP] float32 scales of fp8_656, or None
    slots_ptr,  # [tokens]
    c_kv_ptr,  # [tokens, LATENT]
    k_pe_ptr,  # [tokens, ROPE], or None
    norm_weight_ptr,  # [LATENT], or None
    positions_ptr,  # [tokens], or None
    cos_sin_ptr,  # [table_rows, ROPE], or None
    kv_scale_ptr,  # one float32, or None
    q_source_ptr,  # [tokens, heads, ROPE], or None
    q_pe_ptr,  # [tokens, heads, ROPE], may be q_source
    rows_ptr,  # [tokens, LATENT + ROPE], or None
    status_ptr,  # [8] int64, or None
    eps,
    pages,
    table_rows,
    heads,
    stride_kv_page,  # of the three parts, in their elements
    stride_kv_slot,
    stride_rope_page,
    stride_rope_slot,
    stride_group_page,
    stride_group_slot,
    stride_slot,
    stride_c_kv,
    stride_k_pe,
    stride_position,
    stride_table,
    stride_source_token,
    stride_source_head,
    stride_q_token,
    stride_q_head,
    stride_rows,
    PAGE_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    PADDED: tl.constexpr,  # the power of two at or above LATENT
    HALF: tl.constexpr,  # ROPE / 2
    PADDED_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Program (token, 0) stores the token's row; program (token, 1 + i) rotates the heads of block i."""
    token = tl.program_id(0).to(tl.int64)
    pair, first, second = _pairs(PADDED_HALF, HALF, INTERLEAVED)
    TURNS: tl.constexpr = cos_sin_ptr is not None
    cos, sin = pair, pair
    if TURNS:
        cos, sin = _cos_sin(
            cos_sin_ptr, positions_ptr, status_ptr, token, table_rows, stride_position, stride_table, pair, HALF
        )
    if tl.program_id(1) == 0:
        slot = tl.load(slots_ptr + token * stride_slot).to(tl.int64)
        is_wrong = (slot < -1) | (slot >= pages.to(tl.int64) * PAGE_SIZE)
        _report(status_ptr, SLOT, token, slot, is_wrong)
        is_stored = (slot >= 0) & (is_wrong == 0)
        page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
        scale = 1.0
        if kv_scale_ptr is not None:
            scale = load_kv_scale(kv_scale_ptr)
            report_kv_scale(kv_scale_ptr, status_ptr, token == 0)
            is_stored = is_stored & (scale == scale)
        if rows_ptr is not None:
            rows_ptr += token * stride_rows
        _write_latent(
            kv_latent_ptr, kv_group_ptr, rows_ptr, c_kv_ptr + token * stride_c_kv, norm_weight_ptr, eps, scale,
            page * stride_kv_page + place * stride_kv_slot, page * stride_group_page + place * stride_group_slot,
            is_stored, LATENT, PADDED, FLOAT8,
        )  # fmt: skip
        if k_pe_ptr is not None:
            turned = _turn(k_pe_ptr + token * stride_k_pe, first, second, cos, sin, pair < HALF, TURNS)
            if rows_ptr is not None:
                _store_pair(rows_ptr + LATENT, first, second, turned, pair < HALF)
            kv_rope_ptr += page * stride_rope_page + place * stride_rope_slot
            kept = pair < tl.where(is_stored, HALF, 0)
            if kv_group_ptr is None:
                dtype: tl.constexpr = kv_rope_ptr.dtype.element_ty
                turned = _to_cache(turned[0], scale, FLOAT8, dtype), _to_cache(turned[1], scale, FLOAT8, dtype)
            _store_pair(kv_rope_ptr, first, second, turned, kept)
    elif q_pe_ptr is not None:
        _rotate_heads(
            q_source_ptr + token * stride_source_token, q_pe_ptr + token * stride_q_token, stride_source_head,
            stride_q_head, heads, cos, sin, PADDED_HALF, HALF, INTERLEAVED, BLOCK_HEADS, TURNS,
        )  # fmt: skip
