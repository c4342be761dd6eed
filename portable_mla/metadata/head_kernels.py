"""Heads of parts: all that a program needs to begin, in a cache line; else three reads would wait for one another."""

import triton
import triton.language as tl

# First item, end, its last page, the page before, address and row stride of the page table as int64, and a copy of that
# item with the tiles of a part, starts of units included, where an item has a 0.
HEAD_FIELDS = tl.constexpr(16)
HEAD_PAGES = tl.constexpr(2)
HEAD_TABLE = tl.constexpr(4)
HEAD_ITEM = tl.constexpr(8)


@triton.jit
def open_part(part_heads_ptr, part, index, mask, parts):
    """A part begins at an item, and the part before ends there; nothing where there are no heads."""
    if part_heads_ptr is not None:
        head_ptr = part_heads_ptr + part * HEAD_FIELDS
        tl.store(head_ptr, index, mask=mask & (part < parts))
        tl.store(head_ptr - HEAD_FIELDS + 1, index, mask=mask & (part > 0))


@triton.jit
def write_item(item_ptr, item, last, mask):
    """The fields of each item, and a last one."""
    for field in tl.static_range(7):
        tl.store(item_ptr + field, item[field], mask=mask)
    tl.store(item_ptr + 7, last, mask=mask)


@triton.jit
def write_head(head_ptr, item, table, row_ptr, columns, share, mask, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Copies of a part's first item and of the table's cells of the pages it ends with, page 0 where there is none;
    where the table is. table: its address, row stride."""
    write_item(head_ptr + HEAD_ITEM, item, share, mask)
    table_ptr = (head_ptr + HEAD_TABLE).to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(table_ptr, table[0].to(tl.int64), mask=mask)
    tl.store(table_ptr + 1, table[1].to(tl.int64), mask=mask)
    tile_lo, tile_hi = item[1], item[2]
    end = tl.minimum((tile_hi * BLOCK_N + PAGE_SIZE - 1) // PAGE_SIZE, columns)
    for before in tl.static_range(2):
        column = end - 1 - before
        wanted = mask & (tile_lo < tile_hi) & (column >= 0)
        page = tl.load(row_ptr[:, None] + column, mask=wanted, other=0)
        tl.store(head_ptr + HEAD_PAGES + before, page, mask=mask)
