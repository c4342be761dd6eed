"""Scores of one block of keys on Hopper: layouts, Q K^T as the columns land, masks, and the tail behind the keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import BLOCK, HALF, rows_of
from portable_mla.backends.nvidia.hopper.kernels.ptx import multiply_unless_one, opaque, reinterpret, synchronize

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SCORES_ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
ACC_ROW = gl.constexpr(gl.SliceLayout(1, ACC.value))
SCORES_KEY = gl.constexpr(gl.SliceLayout(0, SCORES.value))
QUERY_OPERAND = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
WEIGHTS_OPERAND = gl.constexpr(gl.DotOperandLayout(0, ACC.value, 2))
ACC_VALUES = gl.constexpr(128)  # of a thread
STRIP = gl.constexpr(16)  # rows
STRIPS = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit
def zero_tail(half, full, phase, valid):
    """Zero the rows of half a block from `valid` on, once it has landed: slots past the end may hold NaN, and 0 times
    NaN is NaN. For pages smaller than a block; of larger ones those slots are not read."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    strips = reinterpret(half.index(0), [BLOCK * HALF // (STRIP * BLOCK), STRIP, BLOCK], STRIPS)
    for box in gl.static_range(len(full)):
        mbarrier.wait(full[box], phase)
    for strip in range(gl.maximum(valid, 0) // STRIP, BLOCK // STRIP):
        for tile in gl.static_range(HALF // BLOCK):
            part = strips.index(tile * (BLOCK // STRIP) + strip)
            value = part.load(layout)
            part.store(gl.where((strip * STRIP + row < valid)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    synchronize()


@gluon.jit
def _finite(value, hidden):
    """The values, 0 where they are hidden and not finite."""
    EXPONENT: gl.constexpr = 0x7F80 if value.dtype == gl.bfloat16 else 0x7C00
    infinite = (value.to(gl.int16, bitcast=True) & EXPONENT) == EXPONENT
    return gl.where(hidden & infinite, gl.zeros_like(value), value)


@gluon.jit
def _drop_hidden(half, position, item, PAGE_SIZE: gl.constexpr):
    """Zero what is not finite in the keys of half a block that some query token does not see: its weight of 0 times NaN
    would be NaN. A row that sees such a key has it in its scores, which come before, and is NaN by its weights.

    There are at most seven such keys. A box of a whole block ends with the last key, so they are in its last strip; of
    smaller pages they are in two.
    """
    TILES: gl.constexpr = HALF // BLOCK
    if PAGE_SIZE >= BLOCK:
        layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [1, 4, 1], [2, 1, 0])
        rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
        tiles = reinterpret(half.index(0), [TILES, BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, rank=3))
        strip = tiles.slice(BLOCK - STRIP, STRIP, 1)
        first = item.all_see - position - gl.minimum(item.kv_end - position - BLOCK, 0)
        hidden = BLOCK - STRIP + gl.arange(0, STRIP, rows) >= first
        strip.store(_finite(strip.load(layout), hidden[None, :, None]))
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        strips = reinterpret(half.index(0), [TILES * (BLOCK // STRIP), STRIP, BLOCK], STRIPS)
        first = gl.maximum(item.all_see - position, 0)
        for index in range(first // STRIP, gl.minimum(first // STRIP + 2, BLOCK // STRIP)):
            hidden = index * STRIP + gl.arange(0, STRIP, gl.SliceLayout(1, layout)) >= first
            for tile in gl.static_range(TILES):
                strip = strips.index(tile * (BLOCK // STRIP) + index)
                strip.store(_finite(strip.load(layout), hidden[:, None]))


@gluon.jit
def drop_hidden(half, position, item, PAGE_SIZE: gl.constexpr):
    """`_drop_hidden` of half a block, where products can read it."""
    _drop_hidden(half, position, item, PAGE_SIZE)
    fence_async_shared()
    synchronize()


@gluon.jit
def drop_hidden_of_pair(room, position, item, PAGE_SIZE: gl.constexpr):
    """The same for what the right warpgroup prepares: both halves of the odd block, of which the other warpgroup
    multiplies the left one later, and the right half of the even block."""
    _drop_hidden(room.odd.left, position + BLOCK, item, PAGE_SIZE)
    _drop_hidden(room.odd.right, position + BLOCK, item, PAGE_SIZE)
    if position + BLOCK > item.all_see:
        _drop_hidden(room.even.right, position, item, PAGE_SIZE)
    fence_async_shared()
    synchronize()


@gluon.jit
def mask(scores, position, item, part, HEADS: gl.constexpr, BLOCK_Q: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """-inf where a row's query token does not see the key. A box of a whole block ends no later than the last key: what
    it has ahead of the block's first gets positions that wrap to far behind any end. A score of -inf is one of an
    infinite key, whose values `drop_hidden` may make 0: NaN, for the rows that see the key to say so."""
    key = gl.arange(0, BLOCK, SCORES_KEY)
    if BLOCK_Q == 1:
        end = item.kv_end + gl.zeros([BLOCK], gl.int32, SCORES_ROW)
    else:
        first_row, _ = rows_of(part)
        token = (first_row + gl.arange(0, BLOCK, SCORES_ROW)) // HEADS
        end = gl.minimum(item.kv_len - item.query_len + 1 + token, item.kv_end)
        scores = gl.where(scores == float("-inf"), gl.full_like(scores, float("nan")), scores)
    if PAGE_SIZE >= BLOCK:
        key = (key + gl.minimum(item.kv_end - position - BLOCK, 0)).to(gl.uint32)
        end = gl.maximum(end - position, 0).to(gl.uint32)
    else:
        key += position
    return gl.where(key[None, :] < end[:, None], scores, gl.full_like(scores, float("-inf")))


@gluon.jit
def score_half(query, keys, full, phase, scores, FIRST: gl.constexpr):
    """Adds Q K^T over 256 columns, each box of them as soon as it has landed. Left in flight."""
    TILES: gl.constexpr = HALF // BLOCK
    for tile in gl.static_range(TILES):
        if tile % (TILES // len(full)) == 0:
            mbarrier.wait(full[tile // (TILES // len(full))], phase)
        columns = keys.slice(tile * BLOCK, BLOCK, 1).permute((1, 0))
        scores = warpgroup_mma(
            query.slice(tile * BLOCK, BLOCK, 1), columns, scores, use_acc=not (FIRST and tile == 0), is_async=True
        )
    return scores


@gluon.jit
def score_rope(q_rope, block, phase, scores, ROPE: gl.constexpr):
    """Adds the rope columns' share, if there are any. Left in flight."""
    if ROPE:
        mbarrier.wait(block.rope_full, phase)
        scores = warpgroup_mma(q_rope, block.rope.index(opaque(0)).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def wait_query(room, query_phase, ROPE: gl.constexpr):
    """Wait for Q; its rope part is kept in registers from here on, for weights1 is needed."""
    q_rope = room.weights1.index(opaque(0))
    if ROPE:
        mbarrier.wait(room.query_rope_full, query_phase)
        q_rope = room.weights1.index(opaque(0)).load(QUERY_OPERAND)
    mbarrier.wait(room.query_left_full, query_phase)
    mbarrier.wait(room.query_right_full, query_phase)
    return q_rope


@gluon.jit
def rescale(acc, factor):
    """Multiply each row, where a warp has one whose factor is not 1."""
    return multiply_unless_one(acc, gl.convert_layout(factor, ACC_ROW)[:, None], ACC_VALUES)
