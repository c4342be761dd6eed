"""The two loader warps of the sm90 decode kernel: TMA of each half of Q and of every block of keys.

Each loader walks the same blocks as the warpgroups, a lone one first and then pairs, from the end of the sequence to
its start, and refills a half block when the warpgroup that read it last lets go of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import BLOCK, HALF, LATENT, item_at, open_part
from portable_mla.backends.nvidia.hopper.decode.kernels.tma import (
    block_rows,
    first_rows,
    load_half,
    load_query_left,
    load_query_right,
    load_query_rope,
    load_tile,
    open_table,
    table_row,
)
from portable_mla.backends.nvidia.hopper.kernels.ptx import (
    FREE_LEFT_0,
    FREE_LEFT_1,
    FREE_QUERY,
    FREE_RIGHT_0,
    FREE_RIGHT_1,
    QUERY_THREADS,
    RELEASE_THREADS,
    launch_dependents,
    meet,
    prefetch_bytes,
)
from portable_mla.metadata.split_plan.kernels.program_headers import ROWS_FIELD

EVEN_USED, ODD_USED = gl.constexpr(1), gl.constexpr(2)


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
    """First key of that odd block, some key of the sequence where there is none."""
    beside = gl.where((item.lone > 0) & (step == 0), -BLOCK, BLOCK)
    return gl.maximum(even_position(item, step) + beside, 0)


@gluon.jit
def _policy(part, share, LONG: gl.constexpr, FAR: gl.constexpr):
    """Whether L2 is to drop first what the program loads, and whether the program asks L2 for blocks ahead: a part's
    first one does, for all. In the longest parts none does, where the others would fall so far behind it that L2 had
    dropped their blocks again."""
    if LONG:
        return share < LONG, (share >= LONG) & (share < FAR) & (part.rows < ROWS_FIELD)
    else:
        return True, False


@gluon.jit
def _prefetch(cache, row_ptr, position, item, asks, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Bring a block of the next pair into L2."""
    gl.static_assert(PAGE_SIZE >= BLOCK, "the blocks of small pages are apart")
    if (position >= item.first_block * BLOCK) & asks:
        page, row = block_rows(row_ptr, position, item.kv_end - 1, cache.page_rows, PAGE_SIZE)
        box_ptr = cache.kv_ptr + (page.to(gl.int64) * cache.page_rows + row) * cache.stride_slot
        prefetch_bytes(box_ptr, ((BLOCK - 1) * cache.stride_slot + LATENT + ROPE) * 2)


@gluon.jit
def _begin_left(
    room, cache, q_desc, part, item, pages, once, asks, HEADS: gl.constexpr, ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """The first step of a part, into rooms that nobody has used."""
    q_row = item.query_start * HEADS + part.rows // ROWS_FIELD
    load_query_left(q_desc, q_row, room, QUERY_ROWS)
    if ROPE:
        load_query_rope(q_desc, q_row, room, QUERY_ROWS)
    position, last = even_position(item, 0), item.kv_end - 1
    rows = first_rows(pages, cache, item, position, last, PAGE_SIZE)
    load_half(cache, rows, 0, room.even.left_full, room.even.left, once, PAGE_SIZE)
    if loads_odd(item, 0):
        rows = first_rows(pages, cache, item, odd_position(item, 0), last, PAGE_SIZE)
        mbarrier.wait(room.query_left_full, 0)
        load_half(cache, rows, 0, room.odd.left_full, room.odd.left, once, PAGE_SIZE)
    if LONG:
        _prefetch(cache, table_row(open_table(cache), item), position - 2 * BLOCK, item, asks, ROPE, PAGE_SIZE)


@gluon.jit
def load_left(
    room, work, cache, q_desc, HEADS: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr,
    QUERY_ROWS: gl.constexpr, LONG: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    """Columns 0..255 and the rope part of Q, and columns 0..255 of all blocks, which warpgroup 0 lets go of.

    All programs begin at once, and their first loads take as long as a few pairs: those of the first odd block wait
    for Q, so that the scores of the even one begin, and its room is filled again, while the memory is still busy.
    """
    used = 0  # EVEN_USED, and ODD_USED until its room was let go of
    begun = 0  # steps of the first item
    part, item, pages, share = open_part(work, HEADS)
    once, asks = _policy(part, share, LONG, FAR)
    if (part.start < part.stop) & (item.pairs + item.lone > 0):
        _begin_left(room, cache, q_desc, part, item, pages, once, asks, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG)
        used = EVEN_USED + gl.where(loads_odd(item, 0), ODD_USED, 0)
        begun = 1
    table = open_table(cache)
    for index in range(part.start, part.stop):
        item = item_at(part, item, index, HEADS)
        row_ptr = table_row(table, item)
        last = item.kv_end - 1
        for step in range(gl.where(index > part.start, 0, begun), item.pairs + item.lone):
            position = even_position(item, step)
            rows = block_rows(row_ptr, position, last, cache.page_rows, PAGE_SIZE)
            q_row = item.query_start * HEADS + part.rows // ROWS_FIELD
            if step == 0:
                if used & EVEN_USED:
                    meet(FREE_QUERY, QUERY_THREADS)
                load_query_left(q_desc, q_row, room, QUERY_ROWS)
            if used & EVEN_USED:
                meet(FREE_LEFT_0, RELEASE_THREADS)
            load_half(cache, rows, 0, room.even.left_full, room.even.left, once, PAGE_SIZE)
            rows = block_rows(row_ptr, odd_position(item, step), last, cache.page_rows, PAGE_SIZE)
            if (used == EVEN_USED + ODD_USED) & ((step == 0) | loads_odd(item, step)):
                meet(FREE_LEFT_1, RELEASE_THREADS)
                used = EVEN_USED
            if ROPE and step == 0:
                load_query_rope(q_desc, q_row, room, QUERY_ROWS)
            if loads_odd(item, step):
                load_half(cache, rows, 0, room.odd.left_full, room.odd.left, once, PAGE_SIZE)
                used = used | ODD_USED
            if LONG:
                _prefetch(cache, row_ptr, position - 2 * BLOCK, item, asks, ROPE, PAGE_SIZE)
            used = used | EVEN_USED
    if used & EVEN_USED:
        meet(FREE_QUERY, QUERY_THREADS)
        meet(FREE_LEFT_0, RELEASE_THREADS)
    if used & ODD_USED:
        meet(FREE_LEFT_1, RELEASE_THREADS)
    launch_dependents()


@gluon.jit
def _load_right_half(cache, rows, block, once, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Columns of a block from 256 on."""
    load_half(cache, rows, HALF, block.right_full, block.right, once, PAGE_SIZE)
    if ROPE:
        load_tile(cache.rows, rows, LATENT, block.rope_full, block.rope.index(0), once, PAGE_SIZE)


@gluon.jit
def _begin_right(
    room, cache, q_desc, part, item, pages, once, asks, HEADS: gl.constexpr, ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr, QUERY_ROWS: gl.constexpr, LONG: gl.constexpr,
):  # fmt: skip
    """The first step of a part, into rooms that nobody has used."""
    q_row = item.query_start * HEADS + part.rows // ROWS_FIELD
    load_query_right(q_desc, q_row, room, QUERY_ROWS)
    position, last = even_position(item, 0), item.kv_end - 1
    rows = first_rows(pages, cache, item, position, last, PAGE_SIZE)
    _load_right_half(cache, rows, room.even, once, ROPE, PAGE_SIZE)
    if loads_odd(item, 0):
        rows = first_rows(pages, cache, item, odd_position(item, 0), last, PAGE_SIZE)
        mbarrier.wait(room.query_right_full, 0)
        _load_right_half(cache, rows, room.odd, once, ROPE, PAGE_SIZE)
    if LONG:
        _prefetch(cache, table_row(open_table(cache), item), position - BLOCK, item, asks, ROPE, PAGE_SIZE)


@gluon.jit
def load_right(
    room, work, cache, q_desc, HEADS: gl.constexpr, ROPE: gl.constexpr, PAGE_SIZE: gl.constexpr,
    QUERY_ROWS: gl.constexpr, LONG: gl.constexpr, FAR: gl.constexpr,
):  # fmt: skip
    """Columns 256..511 of Q, and columns from 256 on of all blocks, which warpgroup 1 lets go of."""
    used = 0  # EVEN_USED, and ODD_USED until its room was let go of
    begun = 0  # steps of the first item
    part, item, pages, share = open_part(work, HEADS)
    once, asks = _policy(part, share, LONG, FAR)
    if (part.start < part.stop) & (item.pairs + item.lone > 0):
        _begin_right(room, cache, q_desc, part, item, pages, once, asks, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG)
        used = EVEN_USED + gl.where(loads_odd(item, 0), ODD_USED, 0)
        begun = 1
    table = open_table(cache)
    for index in range(part.start, part.stop):
        item = item_at(part, item, index, HEADS)
        row_ptr = table_row(table, item)
        last = item.kv_end - 1
        for step in range(gl.where(index > part.start, 0, begun), item.pairs + item.lone):
            position = even_position(item, step)
            rows = block_rows(row_ptr, position, last, cache.page_rows, PAGE_SIZE)
            if step == 0:
                if used & EVEN_USED:
                    meet(FREE_QUERY, QUERY_THREADS)
                q_row = item.query_start * HEADS + part.rows // ROWS_FIELD
                load_query_right(q_desc, q_row, room, QUERY_ROWS)
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
                _prefetch(cache, row_ptr, position - BLOCK, item, asks, ROPE, PAGE_SIZE)
            used = used | EVEN_USED
    if used & EVEN_USED:
        meet(FREE_QUERY, QUERY_THREADS)
        meet(FREE_RIGHT_0, RELEASE_THREADS)
    if used & ODD_USED:
        meet(FREE_RIGHT_1, RELEASE_THREADS)
