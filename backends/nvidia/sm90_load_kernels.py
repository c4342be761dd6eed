"""The two loader warps of the sm90 decode kernel: TMA of each half of Q and of every block of keys.

Each loader walks the same blocks as the warpgroups, a lone one first and then pairs, from the end of the sequence to
its start, and refills a half block when the warpgroup that read it last lets go of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from portable_mla.backends.nvidia.sm90_room_kernels import BLOCK, HALF, LATENT, item_at, open_part
from portable_mla.backends.nvidia.sm90_sync_kernels import (
    FREE_LEFT_0,
    FREE_LEFT_1,
    FREE_QUERY,
    FREE_RIGHT_0,
    FREE_RIGHT_1,
    QUERY_THREADS,
    RELEASE_THREADS,
    launch_dependents,
    load_once,
    meet,
    prefetch_bytes,
    reinterpret,
    tma_load,
)

TILE_BYTES = gl.constexpr(64 * 64 * 2)
BOX_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=3))
EVEN_USED, ODD_USED = gl.constexpr(1), gl.constexpr(2)


@gluon.jit
def _cache_row(table_row_ptr, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """Row of the cache, seen as rows, where `position` is. Cells past `last` are never read: its own stands in."""
    cell = gl.minimum(position, last) // PAGE_SIZE
    return gl.load(table_row_ptr + cell) * page_rows + position % PAGE_SIZE


@gluon.jit
def block_rows(table_row_ptr, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """Cache rows where the boxes of a block begin: one box, or one a page where pages are smaller than a block."""
    if PAGE_SIZE >= BLOCK:
        return (_cache_row(table_row_ptr, position, last, page_rows, PAGE_SIZE),)
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
def _first_rows(pages, row_ptr, position, last, page_rows, PAGE_SIZE: gl.constexpr):
    """`block_rows` of a part's first step. pages: of the item's last key, and the page before."""
    if PAGE_SIZE >= BLOCK:
        same = gl.minimum(position, last) // PAGE_SIZE == last // PAGE_SIZE
        return (gl.where(same, pages[0], pages[1]) * page_rows + position % PAGE_SIZE,)
    else:
        return block_rows(row_ptr, position, last, page_rows, PAGE_SIZE)


@gluon.jit
def _load_box(kv_desc, coordinates, full, tile, once):
    if once:
        load_once(kv_desc, coordinates, full, tile)
    else:
        tma_load(kv_desc, coordinates, full, tile)


@gluon.jit
def _load_tile(kv_desc, rows, column, full, tile, once, PAGE_SIZE: gl.constexpr):
    """64 columns of a block."""
    mbarrier.expect(full, TILE_BYTES)
    if PAGE_SIZE >= BLOCK:
        _load_box(kv_desc, [rows[0], column], full, tile, once)
    else:
        for box in gl.static_range(BLOCK // PAGE_SIZE):
            part = tile.slice(box * PAGE_SIZE, PAGE_SIZE, 0)
            _load_box(kv_desc, [rows[box], column], full, part, once)


@gluon.jit
def _load_half(cache, rows, FIRST: gl.constexpr, full, half, once, PAGE_SIZE: gl.constexpr):
    """256 columns of a block, in as many boxes as there are mbarriers where pages hold whole blocks."""
    TILES: gl.constexpr = HALF // BLOCK // len(full)
    if PAGE_SIZE >= BLOCK:
        boxes = reinterpret(half.index(0), [len(full), TILES, BLOCK, BLOCK], BOX_LAYOUT)
        for box in gl.static_range(len(full)):
            mbarrier.expect(full[box], TILES * TILE_BYTES)
            _load_box(cache.boxes, [FIRST // BLOCK + box * TILES, rows[0], 0], full[box], boxes.index(box), once)
    else:
        for tile in gl.static_range(HALF // BLOCK):
            part = half.index(0).slice(tile * BLOCK, BLOCK, 1)
            _load_tile(cache.rows, rows, FIRST + tile * BLOCK, full[tile], part, once, PAGE_SIZE)


@gluon.jit
def _load_query(q_desc, q_row, query, full, FIRST: gl.constexpr, QUERY_ROWS: gl.constexpr):
    """Half of Q's latent columns.

    Rows past QUERY_ROWS keep what they hold: rows never mix, and those are not written.
    """
    mbarrier.expect(full, HALF * QUERY_ROWS * 2)
    for tile in gl.static_range(HALF // BLOCK):
        part = query.index(0).slice(FIRST + tile * BLOCK, BLOCK, 1).slice(0, QUERY_ROWS, 0)
        load_once(q_desc, [q_row, FIRST + tile * BLOCK], full, part)


@gluon.jit
def _load_query_rope(q_desc, q_row, room, QUERY_ROWS: gl.constexpr):
    """Ahead of the first keys: behind those of all programs it came last, and no score is complete without it. Later
    items wait for the weights that are in its place."""
    mbarrier.expect(room.query_rope_full, BLOCK * QUERY_ROWS * 2)
    part = room.weights1.index(0).slice(0, QUERY_ROWS, 0)
    load_once(q_desc, [q_row, LATENT], room.query_rope_full, part)


@gluon.jit
def even_position(item, step):
    """First key of the block that a step of an item loads into the even block's room: the lone one comes first."""
    return (item.first_block + 2 * (item.pairs + item.lone - 1 - step)) * BLOCK


@gluon.jit
def loads_odd(item, step):
    """Whether a step loads a pair's odd block too. With a lone block, the first pair's is loaded beside it, for its
    room would be idle."""
    return (item.lone == 0) | (step > 1) | ((step == 0) & (item.pairs > 0))


@gluon.jit
def odd_position(item, step):
    """First key of that odd block, some key of the item where there is none."""
    beside = gl.where((item.lone > 0) & (step == 0), -BLOCK, BLOCK)
    return gl.maximum(even_position(item, step) + beside, 0)


@gluon.jit
def _prefetch(cache, row_ptr, position, item, first_row, once, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Bring a block of the next pair into L2; the first row tile does it."""
    if (position >= item.first_block * BLOCK) & (first_row == 0) & (once == 0):
        rows = block_rows(row_ptr, position, item.kv_end - 1, cache.page_rows, PAGE_SIZE)
        box_ptr = cache.kv_ptr + rows[0].to(gl.int64) * cache.stride_slot
        prefetch_bytes(box_ptr, ((BLOCK - 1) * cache.stride_slot + LATENT + ROPE) * 2)


@gluon.jit
def _begin_left(
    room, cache, q_desc, item, pages, row_ptr, first_row, once, HEADS: gl.constexpr, ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """The first step of a part, into rooms that nobody has used."""
    q_row = item.query_start * HEADS + first_row
    _load_query(q_desc, q_row, room.query, room.query_left_full, 0, QUERY_ROWS)
    if ROPE:
        _load_query_rope(q_desc, q_row, room, QUERY_ROWS)
    position, last = even_position(item, 0), item.kv_end - 1
    rows = _first_rows(pages, row_ptr, position, last, cache.page_rows, PAGE_SIZE)
    _load_half(cache, rows, 0, room.even.left_full, room.even.left, once, PAGE_SIZE)
    if loads_odd(item, 0):
        rows = _first_rows(pages, row_ptr, odd_position(item, 0), last, cache.page_rows, PAGE_SIZE)
        mbarrier.wait(room.query_left_full, 0)
        _load_half(cache, rows, 0, room.odd.left_full, room.odd.left, once, PAGE_SIZE)
    if LONG:
        _prefetch(cache, row_ptr, position - 2 * BLOCK, item, first_row, once, ROPE, PAGE_SIZE)


@gluon.jit
def load_left(
    room, work, cache, q_desc, HEADS: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr,
    QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """Columns 0..255 and the rope part of Q, and columns 0..255 of all blocks, which warpgroup 0 lets go of.

    All programs begin at once, and their first loads take as long as a few pairs: those of the first odd block wait
    for Q, so that the scores of the even one begin, and its room is filled again, while the memory is still busy.
    """
    used = 0  # EVEN_USED, and ODD_USED until its room was let go of
    start, stop, pages, item, table_ptr, stride_table, share = open_part(work, HEADS)
    once = True if LONG == 0 else share < LONG
    begun = 0  # steps of the first item
    if (start < stop) & (item.pairs + item.lone > 0):
        row_ptr = table_ptr + item.request.to(gl.int64) * stride_table
        _begin_left(
            room, cache, q_desc, item, pages, row_ptr, work.first_row, once, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG
        )
        used = EVEN_USED + gl.where(loads_odd(item, 0), ODD_USED, 0)
        begun = 1
    for index in range(start, stop):
        item = item_at(work, item, start, index, HEADS)
        row_ptr = table_ptr + item.request.to(gl.int64) * stride_table
        last = item.kv_end - 1
        for step in range(gl.where(index > start, 0, begun), item.pairs + item.lone):
            position = even_position(item, step)
            rows = block_rows(row_ptr, position, last, cache.page_rows, PAGE_SIZE)
            q_row = item.query_start * HEADS + work.first_row
            if step == 0:
                if used & EVEN_USED:
                    meet(FREE_QUERY, QUERY_THREADS)
                _load_query(q_desc, q_row, room.query, room.query_left_full, 0, QUERY_ROWS)
            if used & EVEN_USED:
                meet(FREE_LEFT_0, RELEASE_THREADS)
            _load_half(cache, rows, 0, room.even.left_full, room.even.left, once, PAGE_SIZE)
            rows = block_rows(row_ptr, odd_position(item, step), last, cache.page_rows, PAGE_SIZE)
            if (used == EVEN_USED + ODD_USED) & ((step == 0) | loads_odd(item, step)):
                meet(FREE_LEFT_1, RELEASE_THREADS)
                used = EVEN_USED
            if ROPE and step == 0:
                _load_query_rope(q_desc, q_row, room, QUERY_ROWS)
            if loads_odd(item, step):
                _load_half(cache, rows, 0, room.odd.left_full, room.odd.left, once, PAGE_SIZE)
                used = used | ODD_USED
            if LONG:
                _prefetch(cache, row_ptr, position - 2 * BLOCK, item, work.first_row, once, ROPE, PAGE_SIZE)
            used = used | EVEN_USED
    if used & EVEN_USED:
        meet(FREE_QUERY, QUERY_THREADS)
        meet(FREE_LEFT_0, RELEASE_THREADS)
    if used & ODD_USED:
        meet(FREE_LEFT_1, RELEASE_THREADS)
    launch_dependents()


@gluon.jit
def _begin_right(
    room, cache, q_desc, item, pages, row_ptr, first_row, once, HEADS: gl.constexpr, ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """The first step of a part, into rooms that nobody has used."""
    q_row = item.query_start * HEADS + first_row
    _load_query(q_desc, q_row, room.query, room.query_right_full, HALF, QUERY_ROWS)
    position, last = even_position(item, 0), item.kv_end - 1
    rows = _first_rows(pages, row_ptr, position, last, cache.page_rows, PAGE_SIZE)
    _load_right_half(cache, rows, room.even, once, ROPE, PAGE_SIZE)
    if loads_odd(item, 0):
        rows = _first_rows(pages, row_ptr, odd_position(item, 0), last, cache.page_rows, PAGE_SIZE)
        mbarrier.wait(room.query_right_full, 0)
        _load_right_half(cache, rows, room.odd, once, ROPE, PAGE_SIZE)
    if LONG:
        _prefetch(cache, row_ptr, position - BLOCK, item, first_row, once, ROPE, PAGE_SIZE)


@gluon.jit
def _load_right_half(cache, rows, block, once, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Columns of a block from 256 on."""
    _load_half(cache, rows, HALF, block.right_full, block.right, once, PAGE_SIZE)
    if ROPE:
        _load_tile(cache.rows, rows, LATENT, block.rope_full, block.rope.index(0), once, PAGE_SIZE)


@gluon.jit
def load_right(
    room, work, cache, q_desc, HEADS: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr,
    QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """Columns 256..511 of Q, and columns from 256 on of all blocks, which warpgroup 1 lets go of."""
    used = 0  # EVEN_USED, and ODD_USED until its room was let go of
    start, stop, pages, item, table_ptr, stride_table, share = open_part(work, HEADS)
    once = True if LONG == 0 else share < LONG
    begun = 0  # steps of the first item
    if (start < stop) & (item.pairs + item.lone > 0):
        row_ptr = table_ptr + item.request.to(gl.int64) * stride_table
        _begin_right(
            room, cache, q_desc, item, pages, row_ptr, work.first_row, once, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG
        )
        used = EVEN_USED + gl.where(loads_odd(item, 0), ODD_USED, 0)
        begun = 1
    for index in range(start, stop):
        item = item_at(work, item, start, index, HEADS)
        row_ptr = table_ptr + item.request.to(gl.int64) * stride_table
        last = item.kv_end - 1
        for step in range(gl.where(index > start, 0, begun), item.pairs + item.lone):
            position = even_position(item, step)
            rows = block_rows(row_ptr, position, last, cache.page_rows, PAGE_SIZE)
            if step == 0:
                if used & EVEN_USED:
                    meet(FREE_QUERY, QUERY_THREADS)
                q_row = item.query_start * HEADS + work.first_row
                _load_query(q_desc, q_row, room.query, room.query_right_full, HALF, QUERY_ROWS)
            if used & EVEN_USED:
                meet(FREE_RIGHT_0, RELEASE_THREADS)
            _load_right_half(cache, rows, room.even, once, ROPE, PAGE_SIZE)
            rows = block_rows(row_ptr, odd_position(item, step), last, cache.page_rows, PAGE_SIZE)
            if loads_odd(item, step):
                if used & ODD_USED:
                    meet(FREE_RIGHT_1, RELEASE_THREADS)
                _load_right_half(cache, rows, room.odd, once, ROPE, PAGE_SIZE)
                used = used | ODD_USED
            if LONG:
                _prefetch(cache, row_ptr, position - BLOCK, item, work.first_row, once, ROPE, PAGE_SIZE)
            used = used | EVEN_USED
    if used & EVEN_USED:
        meet(FREE_QUERY, QUERY_THREADS)
        meet(FREE_RIGHT_0, RELEASE_THREADS)
    if used & ODD_USED:
        meet(FREE_RIGHT_1, RELEASE_THREADS)
