"""The two warpgroups of the sm90 decode kernel: scores, softmax, and each one's half of the output columns."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from portable_mla.backends.nvidia.hopper.decode.kernels.epilogue import is_wide, store_narrow, store_stats, store_wide
from portable_mla.backends.nvidia.hopper.decode.kernels.scores import (
    ACC,
    SCORES,
    SCORES_ROW,
    WEIGHTS_OPERAND,
    drop_hidden,
    drop_hidden_of_pair,
    mask,
    rescale,
    score_half,
    score_rope,
    wait_query,
    zero_tail,
)
from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import BLOCK, HALF, item_at, open_part
from portable_mla.backends.nvidia.hopper.kernels.ptx import (
    FREE_LEFT_0,
    FREE_LEFT_1,
    FREE_QUERY,
    FREE_RIGHT_0,
    FREE_RIGHT_1,
    PAIR_THREADS,
    QUERY_THREADS,
    RELEASE_THREADS,
    WEIGHTS_0,
    WEIGHTS_1,
    arrive,
    meet,
    multiply,
    opaque,
)
from portable_mla.backends.nvidia.hopper.kernels.softmax import growth, normaliser, raise_level, rounding_gain, weigh
from portable_mla.backends.triton.decode.kernels.decode import START_MAX


@gluon.jit
def _weigh_even(room, zero, scores, level, largest, scale):
    """Softmax of the even block, told to the right warpgroup: weights, the same rounded, the new level, and the largest
    score of all even blocks."""
    block_largest = gl.max(scores, 1)
    even_level = raise_level(level, block_largest, scale)
    weights = weigh(scores, multiply(even_level, scale), scale)
    rounded = weights.to(room.weights0.dtype)
    room.level0.store(even_level)
    room.weights0.index(zero).store(rounded)
    fence_async_shared()
    arrive(WEIGHTS_0, PAIR_THREADS)
    return weights, rounded, even_level, gl.maximum(largest, block_largest)


@gluon.jit
def _fold_left(room, scores, acc, level, largest, row_sum, scale):
    """Softmax of the even block, both blocks' share of columns 0..255; the odd block's product is left in flight."""
    zero = opaque(0)
    weights, rounded, even_level, largest = _weigh_even(room, zero, scores, level, largest, scale)
    factor = growth(level, even_level, scale)
    acc = rescale(acc, factor)
    operand = gl.convert_layout(rounded, WEIGHTS_OPERAND)
    acc = warpgroup_mma(operand, room.even.left.index(zero), acc, is_async=True)
    row_sum = row_sum * factor + gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(FREE_LEFT_0, RELEASE_THREADS)

    meet(WEIGHTS_1, PAIR_THREADS)
    level = room.level1.load(SCORES_ROW)
    factor = growth(even_level, level, scale)
    row_sum = row_sum * factor
    acc = rescale(acc, factor)
    acc = warpgroup_mma(room.weights1.index(zero), room.odd.left.index(zero), acc, is_async=True)
    return acc, level, largest, row_sum


@gluon.jit
def _score_even(room, q_rope, phase, ROPE: gl.constexpr):
    """Scores of the even block, complete."""
    query = room.query.index(opaque(0))
    scores = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    even = room.even.left.index(opaque(0))
    scores = score_half(query.slice(0, HALF, 1), even, room.even.left_full, phase, scores, True)
    even = room.even.right.index(opaque(0))
    scores = score_half(query.slice(HALF, HALF, 1), even, room.even.right_full, phase, scores, False)
    scores = score_rope(q_rope, room.even, phase, scores, ROPE)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _lone_left(room, scores, acc, level, largest, scale):
    """Softmax of a lone block, and its share of columns 0..255."""
    zero = opaque(0)
    weights, rounded, level, largest = _weigh_even(room, zero, scores, level, largest, scale)
    operand = gl.convert_layout(rounded, WEIGHTS_OPERAND)
    acc = warpgroup_mma(operand, room.even.left.index(zero), acc, is_async=True)
    row_sum = gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(FREE_LEFT_0, RELEASE_THREADS)
    meet(WEIGHTS_1, PAIR_THREADS)  # nobody arrives at WEIGHTS_0 twice before the right warpgroup has met it
    return acc, level, largest, row_sum


@gluon.jit
def left_warpgroup(
    room, work, results, scale, HEADS: gl.constexpr, ROPE: gl.constexpr, BLOCK_Q: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Scores of the even blocks, output columns 0..255.

    The next pair's scores are waited for before the loop goes round: an accumulator in flight across the back edge
    makes ptxas wait after every wgmma. Of pairs every row sees all but the end of the last one: of its even block the
    first query tokens may not see some, and the last token sees it all.
    """
    gl.static_assert(BLOCK_Q <= BLOCK)
    phase = 0
    query_phase = 0
    part, item, _pages, _share = open_part(work, HEADS)
    for index in range(part.start, part.stop):
        item = item_at(part, item, index, HEADS)
        level = gl.full([BLOCK], START_MAX, gl.float32, SCORES_ROW)
        largest = level  # score of this warpgroup's blocks
        row_sum = gl.zeros([BLOCK], gl.float32, SCORES_ROW)
        acc = gl.zeros([BLOCK, HALF], gl.float32, ACC)
        if item.pairs + item.lone > 0:
            position = (item.first_block + 2 * item.pairs) * BLOCK
            if item.lone > 0:
                q_rope = wait_query(room, query_phase, ROPE)
                scores = _score_even(room, q_rope, phase, ROPE)
                if item.pairs == 0:
                    arrive(FREE_QUERY, QUERY_THREADS)
                if position + BLOCK > item.all_see:
                    scores = mask(scores, position, item, part, HEADS, BLOCK_Q, PAGE_SIZE)
                    if BLOCK_Q > 1:
                        drop_hidden(room.even.left, position, item, PAGE_SIZE)
                    if PAGE_SIZE < BLOCK and position + BLOCK > item.kv_end:
                        zero_tail(room.even.left, room.even.left_full, phase, item.kv_end - position)
                acc, level, largest, row_sum = _lone_left(room, scores, acc, level, largest, scale)
                phase ^= 1
            if item.pairs > 0:
                q_rope = wait_query(room, query_phase, ROPE)
                position -= 2 * BLOCK
                scores = _score_even(room, q_rope, phase, ROPE)
                if BLOCK_Q > 1 and position + BLOCK > item.all_see:
                    scores = mask(scores, position, item, part, HEADS, BLOCK_Q, PAGE_SIZE)
                    drop_hidden(room.even.left, position, item, PAGE_SIZE)
                for _pair in range(item.pairs - 1):
                    acc, level, largest, row_sum = _fold_left(room, scores, acc, level, largest, row_sum, scale)
                    phase ^= 1
                    position -= 2 * BLOCK
                    query = room.query.index(opaque(0))
                    scores = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
                    even = room.even.left.index(opaque(0))
                    scores = score_half(query.slice(0, HALF, 1), even, room.even.left_full, phase, scores, True)
                    acc = warpgroup_mma_wait(4, deps=(acc,))
                    arrive(FREE_LEFT_1, RELEASE_THREADS)
                    even = room.even.right.index(opaque(0))
                    scores = score_half(query.slice(HALF, HALF, 1), even, room.even.right_full, phase, scores, False)
                    scores = score_rope(q_rope, room.even, phase, scores, ROPE)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                arrive(FREE_QUERY, QUERY_THREADS)
                acc, level, largest, row_sum = _fold_left(room, scores, acc, level, largest, row_sum, scale)
                phase ^= 1
                acc = warpgroup_mma_wait(0, deps=(acc,))
                arrive(FREE_LEFT_1, RELEASE_THREADS)
            query_phase ^= 1
            room.sum0.store(row_sum)
            gain = rounding_gain(largest, level, scale, room.weights0.dtype)
            room.gain0.store(gain)
            arrive(WEIGHTS_0, PAIR_THREADS)
            peak = store_narrow(acc, room.peak1, part, item, results, 0, HEADS)
            meet(WEIGHTS_1, PAIR_THREADS)
            row_sum += room.sum1.load(SCORES_ROW)
            gain += room.gain1.load(SCORES_ROW)
            norm = normaliser(level, row_sum, gain, scale, room.weights0.dtype)
            store_wide(acc, norm, part, item, results, 0, HEADS)
            store_stats(multiply(level, scale), row_sum, norm, peak, room.peak1, part, item, results, HEADS)


@gluon.jit
def _fold_right(
    room, q_rope, item, part, position, last, acc, level, largest, row_sum, scale, phase,
    HEADS: gl.constexpr, ROPE: gl.constexpr, BLOCK_Q: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of the odd block, both blocks' share of columns 256..511.

    The even block's weights come as they are, relative to that block's own level, so that their product runs behind
    the odd block's scores instead of after their softmax, and the even block is let go of that much earlier.
    """
    zero = opaque(0)
    query = room.query.index(zero)
    scores = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    odd = room.odd
    scores = score_half(query.slice(HALF, HALF, 1), odd.right.index(zero), odd.right_full, phase, scores, True)
    scores = score_rope(q_rope, odd, phase, scores, ROPE)
    scores = score_half(query.slice(0, HALF, 1), odd.left.index(zero), odd.left_full, phase, scores, False)

    meet(WEIGHTS_0, PAIR_THREADS)
    even_level = room.level0.load(SCORES_ROW)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if last:
        arrive(FREE_QUERY, QUERY_THREADS)
    if position + 2 * BLOCK > item.all_see:
        scores = mask(scores, position + BLOCK, item, part, HEADS, BLOCK_Q, PAGE_SIZE)
        if BLOCK_Q > 1:
            drop_hidden_of_pair(room, position, item, PAGE_SIZE)
            even_level = room.level0.load(SCORES_ROW)  # again: it would be spilled
    acc = rescale(acc, growth(level, even_level, scale))
    acc = warpgroup_mma(room.weights0.index(zero), room.even.right.index(zero), acc, is_async=True)
    block_largest = gl.max(scores, 1)
    largest = gl.maximum(largest, block_largest)
    odd_level = raise_level(even_level, block_largest, scale)
    weights = weigh(scores, multiply(odd_level, scale), scale)
    rounded = weights.to(room.weights0.dtype)
    room.level1.store(odd_level)
    room.weights1.index(zero).store(rounded)
    fence_async_shared()
    arrive(WEIGHTS_1, PAIR_THREADS)
    row_sum = row_sum * growth(level, odd_level, scale) + gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(FREE_RIGHT_0, RELEASE_THREADS)
    acc = rescale(acc, growth(even_level, odd_level, scale))
    operand = gl.convert_layout(rounded, WEIGHTS_OPERAND)
    acc = warpgroup_mma(operand, room.odd.right.index(zero), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(FREE_RIGHT_1, RELEASE_THREADS)
    return acc, odd_level, largest, row_sum


@gluon.jit
def _lone_right(room, acc, item, position, BLOCK_Q: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The lone block's share of columns 256..511."""
    zero = opaque(0)
    meet(WEIGHTS_0, PAIR_THREADS)
    if BLOCK_Q > 1 and position + BLOCK > item.all_see:
        drop_hidden(room.even.right, position, item, PAGE_SIZE)
    level = room.level0.load(SCORES_ROW)
    acc = warpgroup_mma(room.weights0.index(zero), room.even.right.index(zero), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    arrive(FREE_RIGHT_0, RELEASE_THREADS)
    arrive(WEIGHTS_1, PAIR_THREADS)
    return acc, level


@gluon.jit
def right_warpgroup(
    room, work, results, scale, HEADS: gl.constexpr, ROPE: gl.constexpr, BLOCK_Q: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Scores of the odd blocks, output columns 256..511."""
    phase = 0
    even_phase = 0
    query_phase = 0
    part, item, _pages, _share = open_part(work, HEADS)
    for index in range(part.start, part.stop):
        item = item_at(part, item, index, HEADS)
        level = gl.full([BLOCK], START_MAX, gl.float32, SCORES_ROW)
        largest = level  # score of this warpgroup's blocks
        row_sum = gl.zeros([BLOCK], gl.float32, SCORES_ROW)
        acc = gl.zeros([BLOCK, HALF], gl.float32, ACC)
        if item.pairs + item.lone > 0:
            position = (item.first_block + 2 * item.pairs) * BLOCK
            if item.lone > 0:
                if PAGE_SIZE < BLOCK and position + BLOCK > item.kv_end:
                    zero_tail(room.even.right, room.even.right_full, even_phase, item.kv_end - position)
                acc, level = _lone_right(room, acc, item, position, BLOCK_Q, PAGE_SIZE)
                if item.pairs == 0:
                    arrive(FREE_QUERY, QUERY_THREADS)  # Q has landed: the loaders have met this barrier's last opening
                even_phase ^= 1
            elif PAGE_SIZE < BLOCK and position > item.kv_end:
                valid = item.kv_end - position + BLOCK  # of both halves: the left one is multiplied later
                zero_tail(room.odd.left, room.odd.left_full, phase, valid)
                zero_tail(room.odd.right, room.odd.right_full, phase, valid)
            if item.pairs > 0:
                q_rope = wait_query(room, query_phase, ROPE)
                for step in range(item.pairs):
                    position -= 2 * BLOCK
                    last = step == item.pairs - 1
                    acc, level, largest, row_sum = _fold_right(
                        room, q_rope, item, part, position, last, acc, level, largest, row_sum, scale,
                        phase, HEADS, ROPE, BLOCK_Q, PAGE_SIZE,
                    )  # fmt: skip
                    phase ^= 1
                    even_phase ^= 1
            query_phase ^= 1
            room.sum1.store(row_sum)
            gain = rounding_gain(largest, level, scale, room.weights0.dtype)
            room.gain1.store(gain)
            store_narrow(acc, room.peak1, part, item, results, HALF, HEADS)
            meet(WEIGHTS_0, PAIR_THREADS)  # first: the left warpgroup may still have to meet the last WEIGHTS_1
            arrive(WEIGHTS_1, PAIR_THREADS)
            if is_wide(item, results):
                row_sum += room.sum0.load(SCORES_ROW)
                gain += room.gain0.load(SCORES_ROW)
                norm = normaliser(level, row_sum, gain, scale, room.weights0.dtype)
                store_wide(acc, norm, part, item, results, HALF, HEADS)
