"""Whether the pages that units need are in the cache."""

import triton
import triton.language as tl


@triton.jit
def load_cells(row_ptr, columns, base, BLOCK_C: tl.constexpr):
    """BLOCK_C cells of each unit's row of the page table; 0 past its last page, where cells are not read."""
    column = base + tl.arange(0, BLOCK_C)[None, :]
    return tl.load(row_ptr[:, None] + column, mask=column < columns[:, None], other=0)


@triton.jit
def _wrong_cells(cells, columns, base, max_pages, BLOCK_C: tl.constexpr):
    """1 where a cell that is needed names a page that is not in the cache, and the page; else 0 and the least int."""
    column = base + tl.arange(0, BLOCK_C)[None, :]
    wrong = (column < columns[:, None]) & ((cells < 0) | (cells >= max_pages))
    return wrong.to(tl.int32), tl.where(wrong, cells, -(2**31))


@triton.jit
def check_pages(row_ptr, columns, cells, max_pages, BLOCK_C: tl.constexpr):
    """Whether a page that the unit needs is not in the cache, and such a page. cells: the first ones, loaded early."""
    faulty, strange = _wrong_cells(cells, columns, 0, max_pages, BLOCK_C)
    for base in range(BLOCK_C, tl.max(columns, 0), BLOCK_C):
        cells = load_cells(row_ptr, columns, base, BLOCK_C)
        faulty_here, strange_here = _wrong_cells(cells, columns, base, max_pages, BLOCK_C)
        faulty = tl.maximum(faulty, faulty_here)
        strange = tl.maximum(strange, strange_here)
    return tl.max(faulty, 1) != 0, tl.max(strange, 1)
