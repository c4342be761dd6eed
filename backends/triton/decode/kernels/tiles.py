"""Which keys a step of the decode kernel attends to: the page of its tile, and the rows in it."""

import triton
import triton.language as tl

START_MAX = tl.constexpr(-1.0e30)  # finite, so that rows that saw nothing never form inf - inf


@triton.jit
def load_pages(table_row_ptr, tile, tile_hi, kv_len, pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of the tile, or of each of its positions where pages are smaller. Cells past the end are never read."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_row_ptr + tile * BLOCK_N // PAGE_SIZE, mask=tile < tile_hi, other=0)
    else:
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        end = tl.where(tile < tile_hi, kv_len, 0)
        page = tl.load(table_row_ptr + position // PAGE_SIZE, mask=position < end, other=0)
    tl.device_assert((page >= 0) & (page < pages), "the page table changed after it was planned")
    return page


@triton.jit
def key_rows(page, tile, kv_len, stride_kv_page, stride_kv_slot, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions, validity and cache offsets of the keys of one tile."""
    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = position % PAGE_SIZE
    if PAGE_SIZE % BLOCK_N == 0:
        slot = tile * BLOCK_N % PAGE_SIZE + tl.arange(0, BLOCK_N)
    offset = page.to(tl.int64) * stride_kv_page + slot.to(tl.int64) * stride_kv_slot
    return position, position < kv_len, offset
