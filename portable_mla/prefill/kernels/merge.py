"""The kernel that merges attention over disjoint sets of keys by the logarithms of their sums."""

import triton
import triton.language as tl

_EMPTY = tl.constexpr(-1.0e30)  # a finite stand-in for the maximum of no lse, so that inf - inf is never formed


@triton.jit(do_not_specialize=["tokens", "heads", "parts"])
def merge_kernel(
    first_out_ptr,  # [tokens, heads, WIDTH]
    first_lse_ptr,  # [tokens, heads] float32, natural log
    rest_out_ptr,  # [parts, tokens, heads, WIDTH]
    rest_lse_ptr,  # [parts, tokens, heads] float32
    out_ptr,  # [tokens, heads, WIDTH], may be the first
    lse_ptr,  # [tokens, heads] float32, may be the first
    tokens,
    heads,
    parts,
    stride_first_token,
    stride_first_head,
    stride_rest_part,
    stride_rest_token,
    stride_rest_head,
    stride_out_token,
    stride_out_head,
    stride_first_lse_token,
    stride_first_lse_head,
    stride_rest_lse_part,
    stride_rest_lse_token,
    stride_rest_lse_head,
    stride_lse_token,
    stride_lse_head,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # the power of two at or above WIDTH
    ROWS: tl.constexpr,
):
    """One program merges ROWS rows (token x head). A part without keys, whose lse is -inf, changes no bit, whatever
    its values; the sums are of float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < tokens * heads
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    column = tl.arange(0, PADDED)[None, :]
    mask = valid[:, None] & (column < WIDTH)
    lse = tl.load(first_lse_ptr + token * stride_first_lse_token + head * stride_first_lse_head, mask=valid, other=0.0)
    largest = tl.maximum(lse, _EMPTY)
    total = tl.exp(lse - largest)
    first = (first_out_ptr + token * stride_first_token + head * stride_first_head)[:, None] + column
    acc = tl.load(first, mask=mask & (total > 0.0)[:, None], other=0.0).to(tl.float32) * total[:, None]
    rest_lse_row = rest_lse_ptr + token * stride_rest_lse_token + head * stride_rest_lse_head
    rest_row = rest_out_ptr + token * stride_rest_token + head * stride_rest_head
    for part in range(parts):
        index = tl.cast(part, tl.int64)
        lse = tl.load(rest_lse_row + index * stride_rest_lse_part, mask=valid, other=0.0)
        new_largest = tl.maximum(largest, lse)
        rescale, weight = tl.exp(largest - new_largest), tl.exp(lse - new_largest)
        cells = (rest_row + index * stride_rest_part)[:, None] + column
        values = tl.load(cells, mask=mask & (lse != float("-inf"))[:, None], other=0.0).to(tl.float32)
        acc = acc * rescale[:, None] + values * weight[:, None]
        total = total * rescale + weight
        largest = new_largest
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store((out_ptr + token * stride_out_token + head * stride_out_head)[:, None] + column, result, mask=mask)
    lse = tl.where(empty, float("-inf"), largest + tl.log(total))
    tl.store(lse_ptr + token * stride_lse_token + head * stride_lse_head, lse, mask=valid)
