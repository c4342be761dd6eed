"""Ragged forms of a paged batch: row pointers, kv indices and positions, from block table and lengths in one launch."""

import triton
import triton.language as tl

from portable_mla.metadata.kernels.lengths import load_lens
from portable_mla.metadata.kernels.status import KV_LEN, PAGE_ID, QUERY_LEN, QUERY_TOKENS, report_fault


@triton.jit
def _lens(lens, request):
    """kv_len as used, 0 where it is wrong; query tokens as counted; both as given."""
    exists = (request >= 0) & (request < lens[2])
    kv_len, query_len = load_lens(lens, request, exists)
    used = tl.where((kv_len >= 0) & (kv_len <= lens[3]), kv_len, 0)
    return used, tl.minimum(tl.maximum(query_len, 0), lens[5]), kv_len, query_len


@triton.jit
def _before(lens, stop, INDEX_SIZE: tl.constexpr, SCAN: tl.constexpr):
    """Indices and query tokens of the requests before `stop`."""
    indices = 0
    tokens = 0
    for base in range(0, stop, SCAN):
        request = base + tl.arange(0, SCAN)
        kv_len, query_len, _, _ = _lens(lens, tl.where(request < stop, request, -1))
        indices += tl.sum((kv_len + INDEX_SIZE - 1) // INDEX_SIZE, 0)
        tokens += tl.sum(query_len, 0)
    return indices, tokens


@triton.jit
def _write_indices(
    row_ptr, kv_indices_ptr, status_ptr, request, start, count, chunk, chunks, max_indices, max_pages,
    PAGE_SIZE: tl.constexpr, INDEX_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every chunks-th block of the request's indices. A page that is not in the cache is reported and becomes 0."""
    for base in range(chunk * BLOCK_C, count, chunks * BLOCK_C):
        offset = base + tl.arange(0, BLOCK_C)
        mask = offset < count
        page = tl.load(row_ptr + offset * INDEX_SIZE // PAGE_SIZE, mask=mask, other=0)
        wrong = mask & ((page < 0) | (page >= max_pages))
        report_fault(status_ptr, PAGE_ID, request + tl.zeros_like(page), page, wrong)
        index = tl.where(wrong, 0, page) * (PAGE_SIZE // INDEX_SIZE) + offset % (PAGE_SIZE // INDEX_SIZE)
        place = start + offset
        tl.store(kv_indices_ptr + place, index, mask=mask & (place < max_indices))


@triton.jit
def _write_positions(
    positions_ptr, given_ptr, given, start, tokens, kv_len, query_len, max_tokens, BLOCK_C: tl.constexpr
):  # fmt: skip
    for base in range(0, tl.minimum(tokens, max_tokens), BLOCK_C):
        index = base + tl.arange(0, BLOCK_C)
        token = start + index
        mask = (index < tokens) & (token < max_tokens)
        position = tl.maximum(kv_len - query_len + index, 0)
        if given_ptr is not None:
            position = tl.load(given_ptr + token, mask=mask & (token < given), other=0).to(tl.int32)
        tl.store(positions_ptr + token, position, mask=mask)


@triton.jit
def _fill(ptr, first, stop, value, BLOCK_C: tl.constexpr):
    for base in range(first, stop, BLOCK_C):
        place = base + tl.arange(0, BLOCK_C)
        tl.store(ptr + place, value, mask=place < stop)


@triton.jit(
    do_not_specialize=[
        "batch",
        "given_positions",
        "max_batch",
        "max_tokens",
        "max_indices",
        "max_kv_len",
        "max_query_len",
        "counted_tokens",
        "max_pages",
        "stride_table",
    ]
)
def write_ragged_kernel(
    kv_lens_ptr,  # [batch] int32
    query_lens_ptr,  # [batch] int32, or None: max_query_len tokens each
    given_positions_ptr,  # [tokens] int32 or int64, or None
    table_ptr,  # [batch, width] int32
    query_indptr_ptr,  # [max_batch + 1] int32
    positions_ptr,  # [max_tokens] int32
    kv_indptr_ptr,  # [max_batch + 1] int32; this and the two below are None where no indices are wanted
    last_page_len_ptr,  # [max_batch] int32
    kv_indices_ptr,  # [max_indices] int32
    status_ptr,  # [8] int64
    batch,
    given_positions,
    max_batch,
    max_tokens,
    max_indices,
    max_kv_len,
    max_query_len,
    counted_tokens,
    max_pages,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    INDEX_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Programs [request, chunk]: chunk 0 also writes what a request has one of, the last request the tails."""
    lens = (kv_lens_ptr, query_lens_ptr, batch, max_kv_len, max_query_len, counted_tokens)
    request = tl.program_id(0)
    chunk = tl.program_id(1)
    start, query_start = _before(lens, request, INDEX_SIZE, SCAN)
    kv_len, tokens, given_kv_len, query_len = _lens(lens, request)
    count = (kv_len + INDEX_SIZE - 1) // INDEX_SIZE
    if kv_indices_ptr is not None:
        row_ptr = table_ptr + request.to(tl.int64) * stride_table
        _write_indices(
            row_ptr, kv_indices_ptr, status_ptr, request, start, count, chunk, tl.num_programs(1), max_indices,
            max_pages, PAGE_SIZE, INDEX_SIZE, BLOCK_C,
        )  # fmt: skip
    if chunk == 0:
        one = request + tl.arange(0, 1)
        report_fault(status_ptr, KV_LEN, one, given_kv_len, (one >= 0) & (given_kv_len != kv_len))
        wrong = (query_len < 0) | (query_len > max_query_len)
        report_fault(status_ptr, QUERY_LEN, one, query_len, (one >= 0) & wrong)
        end = query_start + tokens
        report_fault(status_ptr, QUERY_TOKENS, one, end, (one >= 0) & (tokens > 0) & (end > max_tokens))
        tl.store(query_indptr_ptr + request, query_start)
        _write_positions(
            positions_ptr,
            given_positions_ptr,
            given_positions,
            query_start,
            tokens,
            given_kv_len,
            tokens,
            max_tokens,
            BLOCK_C,
        )
        if kv_indices_ptr is not None:
            tl.store(kv_indptr_ptr + request, start)
            last = tl.where(kv_len > 0, (kv_len - 1) % INDEX_SIZE + 1, 0)
            tl.store(last_page_len_ptr + request, last, mask=request < batch)
        if request + 1 >= batch:
            _fill(query_indptr_ptr, tl.minimum(batch, request + 1), max_batch + 1, end, BLOCK_C)
            _fill(positions_ptr, end, max_tokens, 0, BLOCK_C)
            if kv_indices_ptr is not None:
                _fill(kv_indptr_ptr, tl.minimum(batch, request + 1), max_batch + 1, start + count, BLOCK_C)
                _fill(last_page_len_ptr, batch, max_batch, 0, BLOCK_C)
