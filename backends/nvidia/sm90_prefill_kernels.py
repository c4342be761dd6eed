"""Prefill on Hopper: ragged attention in the expanded form, two warpgroups of 64 query rows and two warps that load.

A program takes items, 128 query rows of one head, off a queue, and walks their blocks of keys from the last to the
first, so that the end of the keys and the diagonal are met first. Within a warpgroup the next block's Q K^T is issued
before this block's P V, and both run under this block's softmax; the two warpgroups take turns at issuing, so that one
computes its softmax while the other's products run. The schedule is FlashAttention-3's (Shah et al., 2024).

Decisions, in TFLOP/s of an H100 80GB HBM3 at (sequences x tokens x heads), causal, 128 + 64 and 128, bf16, Triton
3.6.0. Bursts of 8 ms after 0.1 s of rest: at full load the chip throttles, and figures of one kernel vary by 10 %.
- A queue instead of a fixed share of the items: predicted to even out items of unequal length. In single runs, under
  throttling: 1x16384x16 558 -> 676, 1x8192x128 460 -> 670. Kept.
- Turns: predicted 3 to 5 %. 4x2048x128 636 -> 651, 1x16384x128 805 -> 808. Kept.
- Where P V is waited for (settle): ptxas puts the wait before the softmax, 1x16384x16 789; behind the row maxima 809;
  in the middle of the exponentials 810; behind all of them, before the changes below, 759 where the maxima gave 794.
- A warp for values alone, so that keys do not wait until values may be overwritten; not measured by itself. Kept.
- The rope part of Q in registers: predicted 1 % of shared memory's time. 1x16384x16 794 -> 797, and after the changes
  below 784 -> 781, 1x4096x128 731 -> 726. Dropped.
- Rescaling acc behind the next Q K^T (LATE): predicted 3 %. Lost 1 % alone, 1x16384x16 800 -> 794, and is part of
  the best measured set; instead of it, levels as in the decode (sm90_softmax_kernels.py): 1x8192x128 760 -> 748.
- Levels where V is 256 wide: predicted 2 to 3 %. 192+64 and 256+0, 1x8192x64 729 -> 781 and 737 -> 785. Kept there.
- Maxima and sums in four chains, sums across lanes once an item: predicted 2 %. 1x16384x16 800 -> 799. Kept with LATE:
  both, and the wait in the middle, 805.
- The first scores of an item run while the one before is stored (AHEAD): predicted 1 %. 1x16384x16 805 -> 810. Kept.
- The next item is looked up before the last block's keys are asked for: 4x2048x128 643 -> 651. Kept.
- Heads whose keys and values are 20 MiB together, not 32: 1x4096x128 732 -> 738, 4x2048x128 651 -> 657; 14 MiB 718.
- Scores scaled before the maximum is subtracted, so that equal logits weigh the same however large they are: predicted
  to cost up to 1 %, cost 6 to 10 %. Dropped for one fused operation a score, and a factor a row: see
  sm90_softmax_kernels.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from portable_mla.backends.nvidia.sm90_prefill_load_kernels import (
    ALL_THREADS,
    FREE_KEYS_0,
    FREE_KEYS_1,
    FREE_QUERY_0,
    FREE_QUERY_1,
    FREE_VALUES_0,
    FREE_VALUES_1,
    QUERY_THREADS_0,
    QUERY_THREADS_1,
    load_queries_and_keys,
    load_values,
)
from portable_mla.backends.nvidia.sm90_prefill_room_kernels import (
    HALF,
    PrefillResults,
    PrefillSource,
    PrefillWork,
    new_prefill_room,
    receive_item,
)
from portable_mla.backends.nvidia.sm90_prefill_score_kernels import (
    accumulator,
    mask,
    partial_sums,
    row_maxima,
    score,
    settle,
    store,
    zero_tail,
)
from portable_mla.backends.nvidia.sm90_softmax_kernels import growth, raise_level, weigh
from portable_mla.backends.nvidia.sm90_sync_kernels import arrive, meet, multiply, multiply_unless_one, publish_barriers
from portable_mla.backends.triton.decode_kernels import LOG2_E, START_MAX

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
def _free_keys(stage):
    if stage == 0:
        arrive(FREE_KEYS_0, ALL_THREADS)
    else:
        arrive(FREE_KEYS_1, ALL_THREADS)


@gluon.jit
def _free_values(stage):
    if stage == 0:
        arrive(FREE_VALUES_0, ALL_THREADS)
    else:
        arrive(FREE_VALUES_1, ALL_THREADS)


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
    _free_keys(stage)
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
        _free_keys(stage ^ 1)
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
        _free_values(stage)
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
    _free_values(stage)
    return acc, level, largest, gl.convert_layout(gl.sum(sums, 1), stats)


@gluon.jit
def _attend_items(
    room, results, scale, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, V_DIM: gl.constexpr,
    LATE: gl.constexpr, AHEAD: gl.constexpr,
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
            store(acc, level, largest, row_sum, scale, item, results, room.values.dtype, V_DIM, BLOCK_N, WARPGROUP)
        used += item.blocks
        count += 1
        mbarrier.wait(room.query_full.index(WARPGROUP), count & 1)
        next_item = receive_item(room, count)
        scores = _begin(room, next_item, used, BLOCK_N, WARPGROUP)
        if AHEAD:
            store(acc, level, largest, row_sum, scale, item, results, room.values.dtype, V_DIM, BLOCK_N, WARPGROUP)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        item = next_item
    if WARPGROUP == 0:
        _take_turn(WARPGROUP)


@gluon.jit(
    do_not_specialize=[
        "softmax_scale", "batch", "tokens", "keys", "slots", "heads", "head_group", "stride_q_head", "stride_k_head",
        "stride_v_head", "stride_lse_token", "stride_lse_head",
    ]
)  # fmt: skip
def sm90_prefill_kernel(
    q_desc,  # of q as [tokens, heads * (NOPE + ROPE)], box [64, 64]; here and below a head's columns may be wider apart
    q_rope_desc,  # the same, box [64, ROPE]
    k_nope_desc,  # of k_nope as [keys, heads * NOPE], box [BLOCK_N, 64]
    k_pe_desc,  # of k_pe [keys, ROPE], box [BLOCK_N, ROPE]; anything where ROPE is 0
    v_desc,  # of v as [keys, heads * V_DIM], box [BLOCK_N, 64]
    cu_seqlens_q_ptr,  # [batch + 1] int32
    cu_seqlens_k_ptr,  # [batch + 1] int32
    counter_ptr,  # one int32, 0 before and after each launch
    out_ptr,  # [tokens, heads, V_DIM]
    lse_ptr,  # [tokens, heads] float32, natural log
    softmax_scale,  # positive
    batch,
    tokens,
    keys,
    slots,  # tokens // 128 + batch + 1
    heads,
    head_group,  # heads whose keys and values fit L2
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    NOPE: gl.constexpr,
    ROPE: gl.constexpr,
    V_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LATE: gl.constexpr,  # acc is rescaled behind the next block's Q K^T
    AHEAD: gl.constexpr,  # an item's first scores are computed while the one before is stored
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Attention of every sequence's queries over its keys, and 0 and -inf for rows behind the last sequence.

    grid: at most slots * heads programs.
    """
    room = new_prefill_room(q_desc.dtype, BLOCK_N, NOPE, ROPE, V_DIM)
    publish_barriers()
    work = PrefillWork(cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, batch, tokens, keys, slots, heads, head_group)
    source = PrefillSource(
        q_desc, q_rope_desc, k_nope_desc, k_pe_desc, v_desc, stride_q_head, stride_k_head, stride_v_head
    )
    results = PrefillResults(out_ptr, lse_ptr, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head)
    scale = softmax_scale * LOG2_E
    gl.warp_specialize(
        [
            (_attend_items, (room, results, scale, gl.constexpr(0), CAUSAL, BLOCK_N, V_DIM, LATE, AHEAD)),
            (_attend_items, (room, results, scale, gl.constexpr(1), CAUSAL, BLOCK_N, V_DIM, LATE, AHEAD)),
            (load_queries_and_keys, (room, work, source, CAUSAL, BLOCK_N, NOPE, ROPE)),
            (load_values, (room, source, BLOCK_N, V_DIM)),
        ],
        [4, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )
