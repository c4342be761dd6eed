"""The two loader warps of the sm90 prefill kernel: one takes items off the queue and brings their Q and K, one V.

A row tile's number is a slot: sequence r owns the slots from cu_seqlens_q[r] // 128 + r on, at least as many as it has
tiles, so that slots are counted without reading lengths on the host; the few that own no tile are skipped. Padding
behind the last sequence counts as one more, without keys. Slots run through a sequence from its last rows, which see
most, to its first. Items are slots x heads; heads come in groups whose keys and values fit L2 together, and those of a
group are adjacent.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from portable_mla.backends.nvidia.hopper.kernels.ptx import arrive, meet, tma_load
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import (
    BOX,
    HALF,
    ROWS,
    PrefillItem,
    publish_item,
    receive_item,
)

FREE_KEYS_0 = gl.constexpr(7)  # + stage: these keys may be overwritten
FREE_KEYS_1 = gl.constexpr(8)
FREE_VALUES_0 = gl.constexpr(9)
FREE_VALUES_1 = gl.constexpr(10)
FREE_QUERY_0 = gl.constexpr(11)  # + warpgroup: its rows of Q may be overwritten
FREE_QUERY_1 = gl.constexpr(12)
ALL_THREADS = gl.constexpr(288)  # both warpgroups and a loader
QUERY_THREADS_0 = gl.constexpr(192)  # a warpgroup and both loaders
QUERY_THREADS_1 = gl.constexpr(160)  # a warpgroup and a loader
SEARCH = gl.constexpr(256)  # sequences that are looked at together


@gluon.jit
def _find_sequence(work, slot):
    """The last sequence whose slots begin at or before `slot`; work.batch for the rows of padding behind them all."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    found = 0
    for first in range(0, work.batch + 1, SEARCH):
        sequence = first + gl.arange(0, SEARCH, layout)
        exists = sequence <= work.batch
        start = gl.load(work.cu_seqlens_q_ptr + sequence, mask=exists, other=0)
        found += gl.sum(((start // ROWS + sequence <= slot) & exists).to(gl.int32), 0)
    return gl.maximum(found - 1, 0)


@gluon.jit
def _find_item(work, index, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """The item at `index` of the queue, without rows where its slot owns no tile."""
    group_items = work.slots * work.head_group
    first_head = index // group_items * work.head_group
    index = index % group_items
    heads = gl.maximum(gl.minimum(work.head_group, work.heads - first_head), 1)
    slot = index // heads
    sequence = _find_sequence(work, slot)
    real = sequence < work.batch
    query_start = gl.load(work.cu_seqlens_q_ptr + sequence)
    query_end = gl.load(work.cu_seqlens_q_ptr + sequence + 1, mask=real, other=work.tokens)
    key_start = gl.maximum(gl.load(work.cu_seqlens_k_ptr + sequence), 0)
    key_end = gl.load(work.cu_seqlens_k_ptr + sequence + 1, mask=real, other=0)
    from_last = slot - query_start // ROWS - sequence
    query_start = gl.maximum(query_start, 0)
    query_len = gl.minimum(query_end, work.tokens) - query_start
    key_len = gl.maximum(gl.minimum(key_end, work.keys) - key_start, 0)
    row = ((query_len + ROWS - 1) // ROWS - 1 - from_last) * ROWS
    rows = gl.where((row < 0) | (from_last < 0), 0, gl.minimum(query_len - row, ROWS))
    sees = key_len
    end = key_len
    if CAUSAL:
        sees = key_len - query_len + row + 1
        end = gl.minimum(key_len, sees + rows - 1)
    blocks = gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)
    return PrefillItem(first_head + index % heads, query_start + row, rows, blocks, key_len, sees, key_start)


@gluon.jit
def _load_boxes(desc, row, column, full, tile):
    """All of a tile's columns, from `column` on."""
    for box in gl.static_range(tile.shape[1] // BOX):
        tma_load(desc, [row, column + box * BOX], full, tile.slice(box * BOX, BOX, 1))


@gluon.jit
def _load_query(room, source, item, HALF_INDEX: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr):
    row = item.first_row + HALF_INDEX * HALF
    column = item.head * source.stride_q_head
    full = room.query_full.index(HALF_INDEX)
    mbarrier.expect(full, HALF * (NOPE + ROPE) * 2)
    for part in gl.static_range(2 if NOPE == 192 else 1):
        _load_boxes(source.q, row, column + part * 128, full, room.query[part].index(HALF_INDEX))
    if ROPE:
        tma_load(source.q_rope, [row, column + NOPE], full, room.query[len(room.query) - 1].index(HALF_INDEX))


@gluon.jit
def _wait_free(stage, FREE_0: gl.constexpr, FREE_1: gl.constexpr):
    if stage == 0:
        meet(FREE_0, ALL_THREADS)
    else:
        meet(FREE_1, ALL_THREADS)


@gluon.jit
def _load_keys(
    room, source, row, head, used, BLOCK_N: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr
):  # fmt: skip
    stage = used & 1
    if used > 1:
        _wait_free(stage, FREE_KEYS_0, FREE_KEYS_1)
    full = room.keys_full.index(stage)
    mbarrier.expect(full, BLOCK_N * (NOPE + ROPE) * 2)
    for part in gl.static_range(2 if NOPE == 192 else 1):
        _load_boxes(source.k_nope, row, head * source.stride_k_head + part * 128, full, room.keys[part].index(stage))
    if ROPE:
        tma_load(source.k_pe, [row, 0], full, room.keys[len(room.keys) - 1].index(stage))


@gluon.jit
def _load_values(room, source, row, head, used, BLOCK_N: gl.constexpr, V_DIM: gl.constexpr):
    stage = used & 1
    if used > 1:
        _wait_free(stage, FREE_VALUES_0, FREE_VALUES_1)
    full = room.values_full.index(stage)
    mbarrier.expect(full, BLOCK_N * V_DIM * 2)
    _load_boxes(source.v, row, head * source.stride_v_head, full, room.values.index(stage))


@gluon.jit
def load_queries_and_keys(
    room, work, source, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Hand out items until the queue is empty, and set the queue back for the next launch."""
    total = work.slots * work.heads
    index = gl.program_id(0)
    item = _find_item(work, index, CAUSAL, BLOCK_N)
    used = 0
    count = 0
    while index < total:
        row = item.first_key + (item.blocks - 1) * BLOCK_N
        if item.rows > 0:
            _load_keys(room, source, row, item.head, used, BLOCK_N, NOPE, ROPE)
            if count > 0:
                meet(FREE_QUERY_0, QUERY_THREADS_0)
            publish_item(room, count, item)
            _load_query(room, source, item, 0, NOPE, ROPE)
            if count > 0:
                meet(FREE_QUERY_1, QUERY_THREADS_1)
            _load_query(room, source, item, 1, NOPE, ROPE)
            used += 1
            count += 1
            for _ in range(item.blocks - 2):
                row -= BLOCK_N
                _load_keys(room, source, row, item.head, used, BLOCK_N, NOPE, ROPE)
                used += 1
        index = gl.num_programs(0) + gl.atomic_add(work.counter_ptr, 1)
        next_item = _find_item(work, index, CAUSAL, BLOCK_N)
        if item.rows > 0 and item.blocks > 1:
            _load_keys(room, source, row - BLOCK_N, item.head, used, BLOCK_N, NOPE, ROPE)
            used += 1
        item = next_item
    if index == total + gl.num_programs(0) - 1:
        gl.store(work.counter_ptr, 0)
    if count > 0:  # nobody waited for the last of these
        meet(FREE_QUERY_0, QUERY_THREADS_0)
        meet(FREE_QUERY_1, QUERY_THREADS_1)
        meet(FREE_KEYS_0, ALL_THREADS)
    if used > 1:
        meet(FREE_KEYS_1, ALL_THREADS)
    publish_item(room, count, PrefillItem(-1 + total * 0, total, total, total, total, total, total))
    mbarrier.expect(room.query_full.index(0), 0)
    mbarrier.expect(room.query_full.index(1), 0)


@gluon.jit
def load_values(room, source, BLOCK_N: gl.constexpr, V_DIM: gl.constexpr):
    """The values of each item, whose receipt Q waits for: a barrier that ran a phase ahead would look closed."""
    used = 0
    count = 0
    mbarrier.wait(room.query_full.index(0), 0)
    item = receive_item(room, count)
    while item.head >= 0:
        arrive(FREE_QUERY_0, QUERY_THREADS_0)
        row = item.first_key + item.blocks * BLOCK_N
        for _ in range(item.blocks):
            row -= BLOCK_N
            _load_values(room, source, row, item.head, used, BLOCK_N, V_DIM)
            used += 1
        count += 1
        mbarrier.wait(room.query_full.index(0), count & 1)
        item = receive_item(room, count)
    if used > 0:
        meet(FREE_VALUES_0, ALL_THREADS)
    if used > 1:
        meet(FREE_VALUES_1, ALL_THREADS)
