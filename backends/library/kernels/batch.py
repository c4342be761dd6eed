"""A step as a vendor kernel may read it, and its results as ours are defined."""

import triton
import triton.language as tl

from portable_mla.metadata.kernels.lengths import load_lens
from portable_mla.metadata.kernels.status import PAGE_ID, QUERY_TOKENS, report_fault

SEES, EMPTY, FAULTY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _write_table(
    row_ptr, safe_row_ptr, status_ptr, request, pages, width, max_pages, RATIO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Copy the page ids of one request as those of pages RATIO times smaller, 0 for cells without a page; how many are
    not in the cache."""
    wrong_pages = 0
    stop = pages if safe_row_ptr is None else width
    for base in range(0, stop, BLOCK):
        column = base + tl.arange(0, BLOCK)
        page = tl.load(row_ptr + column // RATIO, mask=column < pages, other=0)
        wrong = (column < pages) & ((page < 0) | (page >= max_pages))
        report_fault(status_ptr, PAGE_ID, request + tl.zeros_like(page), page, wrong)
        wrong_pages += tl.sum(wrong.to(tl.int32), 0)
        if safe_row_ptr is not None:
            small_page = tl.where(column < pages, page * RATIO + column % RATIO, 0)
            tl.store(safe_row_ptr + column, tl.where(wrong, 0, small_page), mask=column < width)
    return wrong_pages


@triton.jit(
    do_not_specialize=[
        "batch",
        "max_batch",
        "tokens",
        "max_tokens",
        "max_kv_len",
        "max_query_len",
        "max_pages",
        "stride_table",
        "width",
    ]
)
def prepare_step_kernel(
    kv_lens_ptr,  # [batch] int32
    query_lens_ptr,  # [batch] int32, or None: max_query_len tokens each
    table_ptr,  # [batch, width] int32
    query_indptr_ptr,  # [max_batch + 1] int32
    safe_table_ptr,  # [max_batch, width] int32, or None
    safe_kv_lens_ptr,  # [max_batch] int32
    safe_query_indptr_ptr,  # [max_batch + 1] int32
    states_ptr,  # [max_tokens] int32
    status_ptr,  # [8] int64
    batch,
    max_batch,
    tokens,  # rows of q
    max_tokens,
    max_kv_len,
    max_query_len,
    max_pages,
    stride_table,
    width,
    PAGE_SIZE: tl.constexpr,  # of the table
    RATIO: tl.constexpr,  # pages of the safe table in one of them
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a request of the capacity: those past the batch become empty, the last one ends the query rows."""
    request = tl.program_id(0)
    exists = request < batch
    lens = (kv_lens_ptr, query_lens_ptr, batch, max_kv_len, max_query_len, max_query_len)
    kv_len, query_len = load_lens(lens, request, exists)
    start = tl.load(query_indptr_ptr + request)
    stop = tl.load(query_indptr_ptr + request + 1)
    right = (kv_len >= 0) & (kv_len <= max_kv_len) & (query_len >= 0) & (query_len <= max_query_len)
    used = tl.where(exists & right, kv_len, 0)
    safe_row_ptr = safe_table_ptr
    if safe_table_ptr is not None:
        safe_row_ptr = safe_table_ptr + request.to(tl.int64) * width
    row_ptr = table_ptr + request.to(tl.int64) * stride_table
    pages = (used + PAGE_SIZE // RATIO - 1) // (PAGE_SIZE // RATIO)
    wrong_pages = _write_table(row_ptr, safe_row_ptr, status_ptr, request, pages, width, max_pages, RATIO, BLOCK)
    one = request + tl.arange(0, 1)
    late = (stop > tokens) & (stop > start)
    report_fault(status_ptr, QUERY_TOKENS, one, stop, (one >= 0) & late)
    faulty = exists & (late | (wrong_pages > 0) | (right == 0))
    tl.store(safe_kv_lens_ptr + request, tl.where(faulty, 0, used))
    tl.store(safe_query_indptr_ptr + request, tl.minimum(start, tokens))
    for base in range(start, tl.minimum(stop, max_tokens), BLOCK_T):
        token = base + tl.arange(0, BLOCK_T)
        state = tl.where(used - (stop - token) < 0, EMPTY, SEES)
        tl.store(states_ptr + token, tl.where(faulty, FAULTY, state), mask=(token < stop) & (token < max_tokens))
    if request + 1 == max_batch:
        tl.store(safe_query_indptr_ptr + max_batch, tl.minimum(stop, tokens))
        for base in range(stop, max_tokens, BLOCK_T):
            token = base + tl.arange(0, BLOCK_T)
            tl.store(states_ptr + token, EMPTY, mask=token < max_tokens)


@triton.jit(
    do_not_specialize=[
        "heads",
        "query_len",
        "natural_per_unit",
        "stride_from_lse_request",
        "stride_from_lse_query",
        "stride_from_lse_head",
    ]
)
def finish_rows_kernel(
    states_ptr,  # [tokens] int32
    from_out_ptr,  # [tokens, heads, LATENT] dense, or None: out holds it
    from_lse_ptr,  # float32
    out_ptr,  # [tokens, heads, LATENT]
    lse_ptr,  # [tokens, heads] float32, natural log
    heads,
    query_len,  # tokens that follow one another by stride_from_lse_query
    natural_per_unit,  # of the library's LSE
    stride_from_lse_request,
    stride_from_lse_query,
    stride_from_lse_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    LATENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program finishes BLOCK_H heads of one token: LSE where we want it, rows that see nothing, faulty rows.

    Kept for one query token too: the libraries allocate their LSE, and only the device knows which rows see nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = head < heads
    state = tl.load(states_ptr + token)
    from_lse = token // query_len * stride_from_lse_request + token % query_len * stride_from_lse_query
    lse = tl.load(from_lse_ptr + from_lse + head.to(tl.int64) * stride_from_lse_head, mask=valid, other=0.0)
    fill = tl.where(state == EMPTY, 0.0, float("nan"))
    lse = tl.where(state == SEES, lse * natural_per_unit, tl.where(state == EMPTY, float("-inf"), fill))
    tl.store(lse_ptr + token * stride_lse_token + head.to(tl.int64) * stride_lse_head, lse, mask=valid)
    column = tl.arange(0, LATENT)
    out_row_ptr = out_ptr + token * stride_out_token + head.to(tl.int64)[:, None] * stride_out_head
    if from_out_ptr is not None:
        row_ptr = from_out_ptr + (token * heads + head)[:, None] * LATENT
        mask = valid[:, None] & (state == SEES)
        row = tl.load(row_ptr + column[None, :], mask=mask, other=0.0)
        row = tl.where(state == SEES, row, fill.to(row.dtype))
        tl.store(out_row_ptr + column[None, :], row, mask=valid[:, None])
    elif state != SEES:
        row = tl.zeros([BLOCK_H, LATENT], out_ptr.dtype.element_ty) + fill.to(out_ptr.dtype.element_ty)
        tl.store(out_row_ptr + column[None, :], row, mask=valid[:, None])
