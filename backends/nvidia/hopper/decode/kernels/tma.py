"""What the loaders of the sm90 decode kernel ask TMA for: boxes of Q and of blocks of keys, found by page."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import BLOCK, HALF, LATENT
from portable_mla.backends.nvidia.hopper.kernels.ptx import load_once, reinterpret, tma_load

TILE_BYTES = gl.constexpr(64 * 64 * 2)
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=3))  # of one tile of a page's rows
BOX_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=4))  # of several such tiles


@gluon.jit
def open_table(cache):
    """Address and row stride of the page table, found through the header so that a captured graph follows a new one."""
    base = gl.load(cache.table_header_ptr).to(gl.pointer_type(gl.int32), bitcast=True)
    return base, gl.load(cache.table_header_ptr + 1)


@gluon.jit
def table_row(table, item):
    """Page table of an item's request."""
    return table[0] + item.request.to(gl.int64) * table[1]


@gluon.jit
def _cache_row(table_row_ptr, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """Row of the cache, seen as rows, where `position` is. Cells past `last` are never read: its own stands in."""
    cell = gl.minimum(position, last) // PAGE_SIZE
    return gl.load(table_row_ptr + cell) * page_rows + position % PAGE_SIZE


@gluon.jit
def _row_of_page(position, last, PAGE_SIZE: gl.constexpr):
    """Row of its page where the box of a block begins, so that it ends with the block's last key: nothing behind a
    sequence is read. Ahead of the block's first key are keys before it, or none of the page, which TMA makes 0."""
    row = gl.minimum(last - (BLOCK - 1) - position, 0)
    if PAGE_SIZE > BLOCK:
        row += position % PAGE_SIZE
    return row


@gluon.jit
def block_rows(table_row_ptr, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """Where a block is: its page and the row there; of pages smaller than a block, the cache's row of each."""
    if PAGE_SIZE >= BLOCK:
        cell = position.to(gl.uint32) // PAGE_SIZE
        return gl.load(table_row_ptr + cell), _row_of_page(position, last, PAGE_SIZE)
    elif PAGE_SIZE == 32:
        return (
            _cache_row(table_row_ptr, position, last, page_rows, PAGE_SIZE),
            _cache_row(table_row_ptr, position + 32, last, page_rows, PAGE_SIZE),
        )
    else:
        return (
            _cache_row(table_row_ptr, position, last, page_rows, PAGE_SIZE),
            _cache_row(table_row_ptr, position + 16, last, page_rows, PAGE_SIZE),
            _cache_row(table_row_ptr, position + 32, last, page_rows, PAGE_SIZE),
            _cache_row(table_row_ptr, position + 48, last, page_rows, PAGE_SIZE),
        )


@gluon.jit
def first_rows(pages, cache, item, position, last, PAGE_SIZE: gl.constexpr):
    """`block_rows` of a part's first step. pages: of the item's last key, and the page before: the table is not asked
    where these two do."""
    if PAGE_SIZE >= BLOCK:
        same = position // PAGE_SIZE == last // PAGE_SIZE
        return gl.where(same, pages[0], pages[1]), _row_of_page(position, last, PAGE_SIZE)
    else:
        return block_rows(table_row(open_table(cache), item), position, last, cache.page_rows, PAGE_SIZE)


@gluon.jit
def _load_box(kv_desc, coordinates, full, tile, once):
    if once:
        load_once(kv_desc, coordinates, full, tile)
    else:
        tma_load(kv_desc, coordinates, full, tile)


@gluon.jit
def load_tile(kv_desc, rows, column, full, tile, once, PAGE_SIZE: gl.constexpr):
    """64 columns of a block."""
    mbarrier.expect(full, TILE_BYTES)
    if PAGE_SIZE >= BLOCK:
        tile = reinterpret(tile, [1, BLOCK, BLOCK], TILE_LAYOUT)
        _load_box(kv_desc, [rows[0], rows[1], column], full, tile, once)
    else:
        for box in gl.static_range(BLOCK // PAGE_SIZE):
            part = tile.slice(box * PAGE_SIZE, PAGE_SIZE, 0)
            _load_box(kv_desc, [rows[box], column], full, part, once)


@gluon.jit
def load_half(cache, rows, FIRST: gl.constexpr, full, half, once, PAGE_SIZE: gl.constexpr):
    """256 columns of a block, in as many boxes as there are mbarriers where pages hold whole blocks."""
    TILES: gl.constexpr = HALF // BLOCK // len(full)
    if PAGE_SIZE >= BLOCK:
        boxes = reinterpret(half.index(0), [len(full), TILES, 1, BLOCK, BLOCK], BOX_LAYOUT)
        for box in gl.static_range(len(full)):
            mbarrier.expect(full[box], TILES * TILE_BYTES)
            place = [FIRST // BLOCK + box * TILES, rows[0], rows[1], 0]
            _load_box(cache.boxes, place, full[box], boxes.index(box), once)
    else:
        for tile in gl.static_range(HALF // BLOCK):
            part = half.index(0).slice(tile * BLOCK, BLOCK, 1)
            load_tile(cache.rows, rows, FIRST + tile * BLOCK, full[tile], part, once, PAGE_SIZE)


@gluon.jit
def _load_query(q_desc, q_row, query, full, FIRST: gl.constexpr, COLUMNS: gl.constexpr, ROWS: gl.constexpr):
    """Columns of Q, from FIRST on.

    Rows past ROWS keep what they hold: rows never mix, and those are not written.
    """
    mbarrier.expect(full, COLUMNS * ROWS * 2)
    for tile in gl.static_range(COLUMNS // BLOCK):
        part = query.slice(tile * BLOCK, BLOCK, 1).slice(0, ROWS, 0)
        load_once(q_desc, [q_row, FIRST + tile * BLOCK], full, part)


@gluon.jit
def load_query_left(q_desc, q_row, room, ROWS: gl.constexpr):
    """Columns 0..255 of Q."""
    _load_query(q_desc, q_row, room.query.index(0).slice(0, HALF, 1), room.query_left_full, 0, HALF, ROWS)


@gluon.jit
def load_query_right(q_desc, q_row, room, ROWS: gl.constexpr):
    """Columns 256..511 of Q."""
    _load_query(q_desc, q_row, room.query.index(0).slice(HALF, HALF, 1), room.query_right_full, HALF, HALF, ROWS)


@gluon.jit
def load_query_rope(q_desc, q_row, room, ROWS: gl.constexpr):
    """The rest, ahead of the first keys: behind those of all programs it came last, and no score is complete without.
    Later items wait for the weights that are in its place."""
    _load_query(q_desc, q_row, room.weights1.index(0), room.query_rope_full, LATENT, BLOCK, ROWS)
