"""The kernel that finds sequences whose cached context is not within the bounds that the caller gave."""

import triton
import triton.language as tl

from portable_mla.metadata.kernels.status import CONTEXT_LEN, report_fault


@triton.jit(do_not_specialize=["max_len", "max_tokens", "tokens", "heads"])
def poison_rows_kernel(
    lens_ptr,  # [sequences] int32
    cu_seqlens_ptr,  # [sequences + 1] int32
    out_ptr,  # [tokens, heads, WIDTH]
    lse_ptr,  # [tokens, heads] float32
    status_ptr,  # [8] int64, or None
    max_len,
    max_tokens,
    tokens,
    heads,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # the power of two at or above WIDTH
    SCAN: tl.constexpr,
):
    """One program a sequence: NaN in its rows, and a fault, where its context or the sum up to it is over a bound."""
    sequence = tl.program_id(0)
    length = tl.load(lens_ptr + sequence)
    total = sequence.to(tl.int64) * 0
    for base in range(0, sequence + 1, SCAN):
        index = base + tl.arange(0, SCAN)
        lens = tl.load(lens_ptr + index, mask=index <= sequence, other=0)
        total += tl.sum(tl.maximum(lens, 0).to(tl.int64), 0)
    wrong = (length < 0) | (length > max_len) | ((length > 0) & (total > max_tokens))
    if wrong:
        if status_ptr is not None:
            one = sequence + tl.arange(0, 1)
            report_fault(status_ptr, CONTEXT_LEN, one, length + one - sequence, one >= 0)
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), tokens)
        stop = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), tokens)
        column = tl.arange(0, PADDED)
        for token in range(first, stop):
            wide = tl.cast(token, tl.int64)
            for head in range(heads):
                out_row_ptr = out_ptr + wide * stride_out_token + tl.cast(head, tl.int64) * stride_out_head
                nothing = tl.full([PADDED], float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(out_row_ptr + column, nothing, mask=column < WIDTH)
                tl.store(lse_ptr + wide * stride_lse_token + tl.cast(head, tl.int64) * stride_lse_head, float("nan"))
