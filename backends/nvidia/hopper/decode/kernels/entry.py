"""Decode on Hopper: two warpgroups that share every block of keys, two warps that load.

A program holds 64 rows and walks pairs of 64-key blocks from the end of an item to its start, so that the tail is met
first and once. Each warpgroup scores one block of a pair and sums half of the output columns over both; values are read
from the tiles of the keys. The division of labour is FlashMLA's (DeepSeek, 2025); loaders of their own, named barriers
and the order of hand-overs are not.

The two warpgroups' shared vectors and weights are ordered by the named barriers and, for weights0, through the loader
that refills the even block's right half: tests/protocol/test_decode_protocol.py plays it. compute-sanitizer's racecheck
does not follow arrivals without a wait (bar.arrive), and reports them.

Decisions, kept unless said otherwise: idea: prediction; microseconds before -> after at (batch, heads, context), or of
so many requests of a trace; H100 80GB HBM3, bf16, page 64, Triton 3.6.0.

Loads
- evict_first: 2 to 10 %; (32, 16, 4096) 64.2 -> 60.5, (8, 64, 8192) 46.5 -> 41.0. Seen only with caches above 3 GB.
- With it, L2 asked for the next pair of a shared part: (128, 128, 4096) 261 -> 333. Of ordinary loads: config.py.
- Q before the keys, the first odd block after it: 2.3; (8, 16, 8192) 40.5 -> 40.9, (1, 16, 1024) 11.6 -> 10.9.
- Boxes of 2 or 4 tiles, 82 instruction cache misses a pair for 138: 2 %; (128, 128, 4096) 247.7 -> 247.0, Azure 32 x 16
  heads 25.5 -> 24.7.
- Boxes that end with the last key, so that nothing behind it is read or zeroed: 2.6 % of Azure's bytes; 32 x 16 heads
  23.6 -> 22.9, 256 x 128 heads 187 -> 184. Strides must stay known as multiples of 16: two query tokens 432, 419.
- The tail of a small page's odd block zeroed ahead of the loop, by the idle warpgroup; inside, 2 to 3 % slower.
- Dropped: first keys ahead of Q 10.4 -> 10.6 at (1, 128, 1024); descriptors prefetched early, level.

Plans
- Single blocks, the odd one ahead of the pairs: 2 a part; Azure 32 x 16 heads 26.4 -> 25.4, (1, 16, 1024) 9.6 -> 8.4.
- Bounds, first item and its last pages in one line: 1.1; (1, 128, 1024) 10.8 -> 10.4, (8, 16, 8192) 35.2 -> 34.5.
  Dropped: 16 pages there, (1, 16, 8192) 12.7 -> 13.3.
- A part's first step on a way of its own, 65 dependent instructions for 140: 0.5; (1, 128, 1024) 10.1 -> 9.8.
- The table's header waited for behind the first keys: 0.1; (1, 128, 8192) 15.6 -> 15.4.
- Programs of 32 rows where half the parts idle: 0.7; (1, 128, 1024) 9.8 -> 9.1. Dropped: of 16 rows 10.9.
- Dropped: boxes of 32 rows for their Q: 0.2; (1, 128, 1024) 9.1 -> 8.9, (8, 64, 8192) 37.9 -> 39.2; behind a branch
  level and 37.4 -> 37.6; boxes of 64 rows that reach out of q's tile, 8.9 -> 8.9, (1, 64, 1024) 8.3 -> 8.5.
- Dropped: pieces merged by the last program: 5 at Azure 32 x 128 heads; (32, 64, 4096) 70.2 -> 84.8, for its fence.

Scores and softmax
- Even weights relative to their own block's level: 10 %; (128, 128, 4096), two query tokens, 501 -> 467.
- Only warps with a factor other than 1 rescale, levels stay until weights reach 2**8: 1 to 3 %; the same 453 -> 436.
  With levels that follow each block's maximum, 446 -> 454.
- No masks where all is seen: 0.1; (1, 128, 1024) 8.94 -> 8.86.
- Dropped: for 32 rows S^T = K Q^T in a kernel of its own: 10 %; (32, 16, 4096) 60.5 -> 62.3, by its chain of products.

Stores and the end
- The combine launched as a dependent and let in after the last loads: (1, 16, 81920) 48.1 -> 47.5; at the start 52.5.
- The decode launched as a dependent too: 1.6; (32, 64, 4096) 79.2 -> 78.1.
- Float16 partial results: 2.5; (32, 64, 4096) 76.2 -> 71.3. In the accumulator's order, 16 stores and no exchange: 0.8;
  (1, 128, 1024) 10.4 -> 10.1. Dropped: eight rows interleaved, level, for an SM gives out 32 bytes a clock.
- In units of each half row's peak, stored before the sums are known: 0.12; (1, 128, 1024) 8.9 -> 8.5. Dropped: before a
  warpgroup's own sums too, level and (1, 128, 8192) 14.6 -> 14.8.
- Whole results packed in pairs before lanes exchange them, 118 KB of code for 139: (264, 128, 1536) 228 -> 218.
- Dropped: partial results by way of Q's room and TMA: 1.2; (1, 128, 1024) 10.4 -> 10.6. A rehearsal of the stores: 1;
  11.0 -> 13.2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.hopper.decode.kernels.consumers import left_warpgroup, right_warpgroup
from portable_mla.backends.nvidia.hopper.decode.kernels.producers import load_left, load_right
from portable_mla.backends.nvidia.hopper.decode.kernels.shared_memory import Cache, Results, new_room
from portable_mla.backends.nvidia.hopper.kernels.ptx import prefetch_line, publish_barriers, wait_for_previous_kernel
from portable_mla.backends.triton.decode.kernels.decode import LOG2_E
from portable_mla.metadata.split_plan.kernels.program_headers import HEAD_FIELDS


@gluon.jit(
    do_not_specialize=["softmax_scale", "tokens", "page_rows", "max_rows", "stride_lse_token", "stride_lse_head"]
)
def sm90_decode_kernel(
    q_desc,  # descriptor of q as [tokens * HEADS, LATENT + ROPE], block [QUERY_ROWS, 64]
    kv_desc,  # descriptor of the cache, block [1, 64, 64]; of small pages as [rows, columns], block [PAGE_SIZE, 64]
    box_desc,  # of the cache as [(LATENT + ROPE) / 64, pages, PAGE_SIZE, 64], block [4 / BOXES, 1, 64, 64]; or kv_desc
    kv_ptr,  # what kv_desc describes
    table_header_ptr,  # [3] int64: address of the page table, its row stride, _
    heads_ptr,  # [programs, 16] int32: first item, end, its last two pages, rows, tiles, _, _, that item
    items_ptr,  # [items, 8] int32: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, 0
    out_ptr,  # [tokens, HEADS, LATENT]
    lse_ptr,  # [tokens, HEADS] float32, natural log
    partial_out_ptr,  # [slots, max_rows, LATENT] float32, or float16 in units of peaks, columns transposed
    partial_stats_ptr,  # [slots, max_rows, 2 or 4] float32: base-2 level, sum, unit of each half of the columns
    status_ptr,  # [8] int64
    softmax_scale,
    tokens,  # of q, which may have fewer than the plan
    page_rows,  # cache rows from one page to the next
    stride_slot,  # of the cache, in elements
    max_rows,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    HEADS: gl.constexpr,
    ROPE: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_Q: gl.constexpr,  # query tokens of a unit
    QUERY_ROWS: gl.constexpr,
    BOXES: gl.constexpr,  # that half a block of keys is loaded in; 4, of kv_desc, where pages are smaller than blocks
    LONG: gl.constexpr,  # tiles of parts whose keys are asked of L2 ahead, and not dropped first; 0: never
    FAR: gl.constexpr,  # tiles of parts whose keys are kept all the same, but not asked for
    DEPENDENT: gl.constexpr,  # may be launched before the kernel before it has ended
    REGISTERS: gl.constexpr,  # of a thread of the warpgroups
    LOADER_REGISTERS: gl.constexpr,
):
    """Each program runs some rows of one part of the plan; those that share a part are neighbours and share L2."""
    head_ptr = heads_ptr + gl.program_id(0) * HEAD_FIELDS
    cache = Cache(kv_desc, box_desc, kv_ptr, table_header_ptr, page_rows, stride_slot)
    room = new_room(q_desc.dtype, ROPE, BOXES)
    results = Results(
        out_ptr, lse_ptr, partial_out_ptr, partial_stats_ptr, status_ptr, tokens, max_rows, stride_out_token,
        stride_out_head, stride_lse_token, stride_lse_head,
    )  # fmt: skip
    publish_barriers()
    if DEPENDENT:
        wait_for_previous_kernel()
    prefetch_line(head_ptr)
    prefetch_line(table_header_ptr)
    scale = softmax_scale * LOG2_E
    work = (items_ptr, head_ptr)
    # constants stay constants only in tuples that are not named
    gl.warp_specialize(
        [
            (left_warpgroup, (room, work, results, scale, HEADS, ROPE, BLOCK_Q, PAGE_SIZE)),
            (right_warpgroup, (room, work, results, scale, HEADS, ROPE, BLOCK_Q, PAGE_SIZE)),
            (load_left, (room, work, cache, q_desc, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG, FAR)),
            (load_right, (room, work, cache, q_desc, HEADS, ROPE, PAGE_SIZE, QUERY_ROWS, LONG, FAR)),
        ],
        [4, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )
