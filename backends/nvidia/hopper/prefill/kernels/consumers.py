"""The two warpgroups of the sm90 prefill kernel: scores, softmax and results of 64 query rows each."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from portable_mla.backends.nvidia.hopper.kernels.ptx import arrive, meet, multiply, multiply_unless_one
from portable_mla.backends.nvidia.hopper.kernels.softmax import growth, raise_level, weigh
from portable_mla.backends.nvidia.hopper.prefill.kernels.producers import (
    ALL_THREADS,
    FREE_KEYS_0,
    FREE_KEYS_1,
    FREE_QUERY_0,
    FREE_QUERY_1,
    FREE_VALUES_0,
    FREE_VALUES_1,
    QUERY_THREADS_0,
    QUERY_THREADS_1,
)
from portable_mla.backends.nvidia.hopper.prefill.kernels.repair_rows import mend_rows
from portable_mla.backends.nvidia.hopper.prefill.kernels.scores import (
    accumulator,
    mask,
    partial_sums,
    row_maxima,
    score,
    settle,
    store,
    zero_tail,
)
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import HALF, receive_item
from portable_mla.backends.triton.decode.kernels.decode import START_MAX

TURN_0 = gl.constexpr(13)  # + warpgroup: it may issue its products
TURN_1 = gl.constexpr(14)
TURN_THREADS = gl.constexpr(256)


@gluon.jit
def _take_turn(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        meet(TURN_0, TURN_THREADS)
    else:
        meet(TURN_1, TURN_THREADS)


@gluon.jit
def _give_turn(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        arrive(TURN_1, TURN_THREADS)
    else:
        arrive(TURN_0, TURN_THREADS)


@gluon.jit
def _free_query(WARPGROUP: gl.constexpr):
    if WARPGROUP == 0:
        arrive(FREE_QUERY_0, QUERY_THREADS_0)
    else:
        arrive(FREE_QUERY_1, QUERY_THREADS_1)


@gluon.jit
def _free(stage, FREE_0: gl.constexpr, FREE_1: gl.constexpr):
    """What `_wait_free` of the loaders waits for."""
    if stage == 0:
        arrive(FREE_0, ALL_THREADS)
    else:
        arrive(FREE_1, ALL_THREADS)


@gluon.jit
def _begin(room, item, used, BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr):
    """Scores of the item's first block, left in flight. After the last item they are of what memory holds."""
    stage = used & 1
    if item.head >= 0:
        mbarrier.wait(room.keys_full.index(stage), (used >> 1) & 1)
    return score(room, stage, BLOCK_N, WARPGROUP)


@gluon.jit
def _attend(
    room, item, scores, used, scale, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr,
    V_DIM: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """All of an item's blocks, the first of them scored; returns what it summed to. `used` blocks came before.

    No product is in flight across the loop's back edge: it would make ptxas wait after every wgmma.
    """
    stats: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    sums_row: gl.constexpr = gl.SliceLayout(1, accumulator(8))
    acc_row: gl.constexpr = gl.SliceLayout(1, accumulator(V_DIM))
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator(V_DIM), 2)
    acc = gl.zeros([HALF, V_DIM], gl.float32, accumulator(V_DIM))
    largest = gl.full([HALF], START_MAX, gl.float32, stats)
    sees = item.key_len
    if CAUSAL:
        sees = gl.minimum(item.sees + WARPGROUP * HALF, sees)
    position = (item.blocks - 1) * BLOCK_N
    stage = used & 1
    _free(stage, FREE_KEYS_0, FREE_KEYS_1)
    if position + BLOCK_N > item.key_len:
        mbarrier.wait(room.values_full.index(stage), (used >> 1) & 1)
        zero_tail(room.values.index(stage), item.key_len - position, BLOCK_N, V_DIM)
    if position + BLOCK_N > sees:
        scores = mask(scores, position, item, BLOCK_N, WARPGROUP, CAUSAL)
    largest = gl.maximum(largest, row_maxima(scores, BLOCK_N))
    level = largest
    log2_level = multiply(level, scale)
    weights = weigh(scores, log2_level, scale)
    sums = partial_sums(weights, BLOCK_N)
    rounded = gl.convert_layout(weights.to(room.values.dtype), operand)
    factor = gl.full([HALF], 1.0, gl.float32, stats)
    for step in range(item.blocks - 1):
        position -= BLOCK_N
        phase = (used >> 1) & 1
        used += 1
        mbarrier.wait(room.keys_full.index(stage ^ 1), (used >> 1) & 1)
        _take_turn(WARPGROUP)
        scores = score(room, stage ^ 1, BLOCK_N, WARPGROUP)
        if LATE:
            acc = acc * gl.convert_layout(settle(factor, 1), acc_row)[:, None]
        mbarrier.wait(room.values_full.index(stage), phase)
        acc = warpgroup_mma(rounded, room.values.index(stage), acc, is_async=True)
        _give_turn(WARPGROUP)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        _free(stage ^ 1, FREE_KEYS_0, FREE_KEYS_1)
        if step == item.blocks - 2:
            _free_query(WARPGROUP)
        if position + BLOCK_N > sees:
            scores = mask(scores, position, item, BLOCK_N, WARPGROUP, CAUSAL)
        maxima = row_maxima(scores, BLOCK_N)
        largest = gl.maximum(largest, maxima)
        if LATE:
            level = largest
            higher = gl.maximum(log2_level, multiply(maxima, scale))
            factor = gl.exp2(log2_level - higher)
            log2_level = higher
        else:
            raised = raise_level(level, maxima, scale)
            higher = multiply(raised, scale)
            factor = growth(level, raised, scale)
            level = raised
        weights = weigh(scores, higher, scale)
        sums = sums * gl.convert_layout(factor, sums_row)[:, None] + partial_sums(weights, BLOCK_N)
        sums = settle(sums, 4)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _free(stage, FREE_VALUES_0, FREE_VALUES_1)
        rounded = gl.convert_layout(weights.to(room.values.dtype), operand)
        if not LATE:
            acc = multiply_unless_one(acc, gl.convert_layout(factor, acc_row)[:, None], V_DIM // 2)
        stage ^= 1
    if item.blocks == 1:
        _free_query(WARPGROUP)
    if LATE:
        acc = acc * gl.convert_layout(factor, acc_row)[:, None]
    mbarrier.wait(room.values_full.index(stage), (used >> 1) & 1)
    acc = warpgroup_mma(rounded, room.values.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _free(stage, FREE_VALUES_0, FREE_VALUES_1)
    return acc, level, largest, gl.convert_layout(gl.sum(sums, 1), stats)


@gluon.jit
def _store(
    room, acc, level, largest, row_sum, scale, item, count, results, CAUSAL: gl.constexpr, NOPE: gl.constexpr,
    ROPE: gl.constexpr, V_DIM: gl.constexpr, BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Results of the item that came `count` items after the first."""
    suspect = store(
        acc, level, largest, row_sum, scale, item, results, room.values.dtype, CAUSAL, V_DIM, BLOCK_N, WARPGROUP
    )
    if CAUSAL and suspect:
        mend_rows(room, receive_item(room, count), results, scale, NOPE, ROPE, V_DIM, WARPGROUP)


@gluon.jit
def attend_items(
    room, results, scale, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, NOPE: gl.constexpr,
    ROPE: gl.constexpr, V_DIM: gl.constexpr, LATE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of every item that the loader hands over."""
    used = 0
    count = 0
    if WARPGROUP == 1:
        _give_turn(WARPGROUP)
    mbarrier.wait(room.query_full.index(WARPGROUP), 0)
    item = receive_item(room, 0)
    scores = _begin(room, item, 0, BLOCK_N, WARPGROUP)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    while item.head >= 0:
        acc, level, largest, row_sum = _attend(room, item, scores, used, scale, WARPGROUP, CAUSAL, BLOCK_N, V_DIM, LATE)
        if not AHEAD:
            _store(
                room, acc, level, largest, row_sum, scale, item, count, results, CAUSAL, NOPE, ROPE, V_DIM, BLOCK_N,
                WARPGROUP,
            )  # fmt: skip
        used += item.blocks
        count += 1
        mbarrier.wait(room.query_full.index(WARPGROUP), count & 1)
        next_item = receive_item(room, count)
        scores = _begin(room, next_item, used, BLOCK_N, WARPGROUP)
        if AHEAD:
            _store(
                room, acc, level, largest, row_sum, scale, item, count - 1, results, CAUSAL, NOPE, ROPE, V_DIM, BLOCK_N,
                WARPGROUP,
            )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=(scores,))
        item = next_item
    if WARPGROUP == 0:
        _take_turn(WARPGROUP)
