"""The shared memory of the sm90 decode kernel, and the item of work that all of its warps read."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from portable_mla.backends.nvidia.hopper.compat import aggregate
from portable_mla.backends.nvidia.hopper.kernels.ptx import new_barrier, new_barriers, opaque, read_4
from portable_mla.metadata.split_plan.kernels.plan import ITEM_FIELDS
from portable_mla.metadata.split_plan.kernels.program_headers import HEAD_ITEM, HEAD_ROWS, ROWS_FIELD

BLOCK = gl.constexpr(64)  # keys of a block, and rows of a program
LATENT = gl.constexpr(512)
HALF = gl.constexpr(256)  # latent columns that one warpgroup sums


@aggregate
class KeyBlock:
    """64 cache rows [1, 64, columns] and the mbarriers that say they have landed, one for each box."""

    left: gl.shared_memory_descriptor
    right: gl.shared_memory_descriptor
    rope: gl.shared_memory_descriptor
    left_full: gl.tuple
    right_full: gl.tuple
    rope_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, left, right, rope, left_full, right_full, rope_full):
        self.left = left
        self.right = right
        self.rope = rope
        self.left_full = left_full
        self.right_full = right_full
        self.rope_full = rope_full


@aggregate
class Room:
    """Everything in shared memory. weights1 first receives the rope part of Q, which then lives in registers."""

    query: gl.shared_memory_descriptor  # [1, 64, 512]
    query_left_full: gl.shared_memory_descriptor
    query_right_full: gl.shared_memory_descriptor
    query_rope_full: gl.shared_memory_descriptor
    even: KeyBlock
    odd: KeyBlock
    weights0: gl.shared_memory_descriptor  # [1, 64, 64]
    weights1: gl.shared_memory_descriptor
    level0: gl.shared_memory_descriptor  # [64] float32
    level1: gl.shared_memory_descriptor
    sum0: gl.shared_memory_descriptor
    sum1: gl.shared_memory_descriptor
    gain0: gl.shared_memory_descriptor
    gain1: gl.shared_memory_descriptor
    peak1: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, query, query_left_full, query_right_full, query_rope_full, even, odd, weights0, weights1, level0,
        level1, sum0, sum1, gain0, gain1, peak1,
    ):  # fmt: skip
        self.query = query
        self.query_left_full = query_left_full
        self.query_right_full = query_right_full
        self.query_rope_full = query_rope_full
        self.even = even
        self.odd = odd
        self.weights0 = weights0
        self.weights1 = weights1
        self.level0 = level0
        self.level1 = level1
        self.sum0 = sum0
        self.sum1 = sum1
        self.gain0 = gain0
        self.gain1 = gain1
        self.peak1 = peak1


@aggregate
class Cache:
    """The paged cache as the loaders see it."""

    rows: tma.tensor_descriptor
    boxes: tma.tensor_descriptor
    kv_ptr: gl.tensor
    table_header_ptr: gl.tensor
    page_rows: gl.tensor
    stride_slot: gl.tensor

    @gluon.constexpr_function
    def __init__(self, rows, boxes, kv_ptr, table_header_ptr, page_rows, stride_slot):
        self.rows = rows
        self.boxes = boxes
        self.kv_ptr = kv_ptr
        self.table_header_ptr = table_header_ptr
        self.page_rows = page_rows
        self.stride_slot = stride_slot


@aggregate
class Part:
    """This program's share of the work: items from start to stop, and of each of them the rows of `rows_of`."""

    items_ptr: gl.tensor
    start: gl.tensor
    stop: gl.tensor
    rows: gl.tensor

    @gluon.constexpr_function
    def __init__(self, items_ptr, start, stop, rows):
        self.items_ptr = items_ptr
        self.start = start
        self.stop = stop
        self.rows = rows


@aggregate
class Item:
    """One run of KV blocks of one unit: pairs of blocks from first_block on and, where their number is odd, a lone
    one after them, of which keys < kv_end are real and keys < all_see are seen by every row."""

    request: gl.tensor
    first_block: gl.tensor
    pairs: gl.tensor
    lone: gl.tensor
    kv_end: gl.tensor
    kv_len: gl.tensor
    query_start: gl.tensor
    query_len: gl.tensor
    all_see: gl.tensor
    slot: gl.tensor

    @gluon.constexpr_function
    def __init__(self, request, first_block, pairs, lone, kv_end, kv_len, query_start, query_len, all_see, slot):
        self.request = request
        self.first_block = first_block
        self.pairs = pairs
        self.lone = lone
        self.kv_end = kv_end
        self.kv_len = kv_len
        self.query_start = query_start
        self.query_len = query_len
        self.all_see = all_see
        self.slot = slot


@aggregate
class Results:
    """Where results go; the field names are the kernel's arguments."""

    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    partial_out_ptr: gl.tensor
    partial_stats_ptr: gl.tensor
    status_ptr: gl.tensor
    tokens: gl.tensor
    max_rows: gl.tensor
    stride_out_token: gl.tensor
    stride_out_head: gl.tensor
    stride_lse_token: gl.tensor
    stride_lse_head: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self, out_ptr, lse_ptr, partial_out_ptr, partial_stats_ptr, status_ptr, tokens, max_rows, stride_out_token,
        stride_out_head, stride_lse_token, stride_lse_head,
    ):  # fmt: skip
        self.out_ptr = out_ptr
        self.lse_ptr = lse_ptr
        self.partial_out_ptr = partial_out_ptr
        self.partial_stats_ptr = partial_stats_ptr
        self.status_ptr = status_ptr
        self.tokens = tokens
        self.max_rows = max_rows
        self.stride_out_token = stride_out_token
        self.stride_out_head = stride_out_head
        self.stride_lse_token = stride_lse_token
        self.stride_lse_head = stride_lse_head


@gluon.jit
def new_tile(DTYPE: gl.constexpr, COLUMNS: gl.constexpr):
    """64 rows in the swizzle that TMA writes and wgmma reads."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    return gl.allocate_shared_memory(DTYPE, [1, BLOCK, COLUMNS], layout)


@gluon.jit
def new_vector():
    """One float32 for each row."""
    return gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def new_block(DTYPE: gl.constexpr, ROPE: gl.constexpr, BOXES: gl.constexpr):
    """Room for one block of keys."""
    left, right = new_tile(DTYPE, HALF), new_tile(DTYPE, HALF)
    left_full, right_full = new_barriers(BOXES), new_barriers(BOXES)
    if ROPE:
        return KeyBlock(left, right, new_tile(DTYPE, BLOCK), left_full, right_full, new_barrier())
    else:
        return KeyBlock(left, right, right, left_full, right_full, right_full[0])


@gluon.jit
def new_room(DTYPE: gl.constexpr, ROPE: gl.constexpr, BOXES: gl.constexpr):
    """In tiles of 8 KB: Q 8, two blocks of keys 18, weights 2. 225 KB with the vectors, of the 227 there are.

    Without rope columns others stand in for their tiles and mbarriers: one that nobody waits for would be dead once it
    is initialised, and Triton would place it within a tile.
    """
    query, query_left_full, query_right_full = new_tile(DTYPE, LATENT), new_barrier(), new_barrier()
    query_rope_full = query_right_full
    if ROPE:
        query_rope_full = new_barrier()
    return Room(
        query, query_left_full, query_right_full, query_rope_full, new_block(DTYPE, ROPE, BOXES),
        new_block(DTYPE, ROPE, BOXES), new_tile(DTYPE, BLOCK), new_tile(DTYPE, BLOCK), new_vector(), new_vector(),
        new_vector(), new_vector(), new_vector(), new_vector(), new_vector(),
    )  # fmt: skip


@gluon.jit
def open_part(work, HEADS: gl.constexpr):
    """The program's part, its first item, the pages that this ends with, and the tiles of a part. All reads are under
    way before the first is waited for. work: the plan's items, the program's head."""
    items_ptr, head_ptr = work
    start, stop, last_page, page_before = read_4(head_ptr)
    rows, share, _, _ = read_4(head_ptr + HEAD_ROWS)
    part = Part(items_ptr, start, stop, rows)
    return part, _read_item(part, head_ptr + HEAD_ITEM, HEADS), (last_page, page_before), share


@gluon.jit
def rows_of(part):
    """The first row of a program and the end of its rows, made from one register where they are needed."""
    rows = opaque(part.rows)
    first_row = rows // ROWS_FIELD
    return first_row, first_row + rows % ROWS_FIELD


@gluon.jit
def item_at(part, item, index, HEADS: gl.constexpr):
    """The item of a number, given the one before; the part's first is there already."""
    if index > part.start:
        item = _read_item(part, part.items_ptr + index * ITEM_FIELDS, HEADS)
    return item


@gluon.jit
def _read_item(part, item_ptr, HEADS: gl.constexpr):
    """The item as this program sees it: without work where the unit has no such rows, or is faulty."""
    request, first_block, last_block, slot = read_4(item_ptr)  # a tile of the plan is a block
    kv_len, query_start, query_len, _ = read_4(item_ptr + 4)
    kv_end = gl.minimum(kv_len, last_block * BLOCK)
    kv_end = gl.where(part.rows // ROWS_FIELD < query_len * HEADS, kv_end, 0)
    blocks = gl.maximum(kv_end - first_block * BLOCK + BLOCK - 1, 0) // BLOCK
    all_see = gl.minimum(kv_end, kv_len - query_len + 1)
    return Item(request, first_block, blocks // 2, blocks % 2, kv_end, kv_len, query_start, query_len, all_see, slot)
