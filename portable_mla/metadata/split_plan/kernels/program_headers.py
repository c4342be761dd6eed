"""Heads of programs: all that one needs to begin, in half a cache line; else three reads would wait for one another."""

import triton
import triton.language as tl

# First item, end, its last page, the page before; first row * 128 + rows, tiles of a part with starts of units, 0, 0; a
# copy of that item.
HEAD_FIELDS = tl.constexpr(16)
HEAD_PAGES = tl.constexpr(2)
HEAD_ROWS = tl.constexpr(4)
HEAD_ITEM = tl.constexpr(8)
ROWS_FIELD = tl.constexpr(128)  # what the first row is multiplied with
PROGRAM_ROWS = tl.constexpr(64)  # of a program's tile; half of them where a part has twice the programs


@triton.jit
def programs_of_a_part(used, parts, ROW_TILES: tl.constexpr, HALVES: tl.constexpr):
    """Programs that share a part's rows, and those of the whole grid: twice as many where half the parts are idle.

    used: parts that have items.
    """
    programs = ROW_TILES
    if HALVES:
        programs = tl.where(used * 2 <= parts, 2 * ROW_TILES, ROW_TILES)
    return programs, parts * ROW_TILES


@triton.jit
def open_part(heads_ptr, part, index, mask, programs):
    """A part begins at an item, and the part before ends there; nothing where there are no heads.

    programs: of a part, of the grid.
    """
    if heads_ptr is not None:
        for program in range(programs[0]):
            head = part * programs[0] + program
            tl.store(heads_ptr + head * HEAD_FIELDS, index, mask=mask & (head < programs[1]))
            before = head - programs[0]
            tl.store(heads_ptr + before * HEAD_FIELDS + 1, index, mask=mask & (part > 0) & (before < programs[1]))


@triton.jit
def write_item(item_ptr, item, mask):
    """The fields of each item, and a 0 behind them."""
    for field in tl.static_range(7):
        tl.store(item_ptr + field, item[field], mask=mask)
    tl.store(item_ptr + 7, 0, mask=mask)


@triton.jit
def write_heads(
    heads_ptr, part, item, row_ptr, columns, share, mask, programs,
    ROW_TILES: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of each program of a part, its rows, and copies of the first item and of the table's cells of the pages that this
    ends with; page 0 where there is none."""
    tile_lo, tile_hi = item[1], item[2]
    end = tl.minimum((tile_hi * BLOCK_N + PAGE_SIZE - 1) // PAGE_SIZE, columns)
    wanted = mask & (tile_lo < tile_hi)
    last = tl.load(row_ptr[:, None] + end - 1, mask=wanted & (end > 0), other=0)
    before = tl.load(row_ptr[:, None] + end - 2, mask=wanted & (end > 1), other=0)
    rows = PROGRAM_ROWS * ROW_TILES // programs[0]
    for program in range(programs[0]):
        head_ptr = heads_ptr + (part * programs[0] + program) * HEAD_FIELDS
        tl.store(head_ptr + HEAD_PAGES, last, mask=mask)
        tl.store(head_ptr + HEAD_PAGES + 1, before, mask=mask)
        tl.store(head_ptr + HEAD_ROWS, program * rows * ROWS_FIELD + rows, mask=mask)
        tl.store(head_ptr + HEAD_ROWS + 1, share, mask=mask)
        tl.store(head_ptr + HEAD_ROWS + 2, 0, mask=mask)
        tl.store(head_ptr + HEAD_ROWS + 3, 0, mask=mask)
        write_item(head_ptr + HEAD_ITEM, item, mask)
