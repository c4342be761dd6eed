"""Decode on Hopper: two warpgroups that share every block of keys, two warps that load.

A program holds 64 rows and walks pairs of 64-key blocks from the end of an item to its start, so that the tail is met
first and once. Each warpgroup scores one block of a pair and sums half of the output columns over both; values are read
from the tiles of the keys. The division of labour is FlashMLA's (DeepSeek, 2025); loaders of their own, named barriers
and the order of hand-overs are not.

Decisions, in microseconds of an H100 80GB HBM3 at (batch, heads, context), bf16, page 64, Triton 3.6.0:
- The even block's weights are handed over relative to that block's own maximum, not the pair's: predicted to free its
  right half 1500 cycles earlier, 10 % where compute bound. (128, 128, 4096) with two query tokens 501 -> 467. Kept.
- evict_first on all loads, predicted 2 to 10 % at small batches; first seen at (1, 16, 8192) and (128, 128, 4096)
  alone, where it is nothing, and dropped. With caches that do not come back within 3 GB: (32, 16, 4096) 64.2 -> 60.5,
  (8, 64, 8192) 46.5 -> 41.0, (32, 128, 4096) 80.8 -> 75.5, Azure, 32 requests of 16 heads 30.5 -> 26.8. Kept.
- L2 asked for the next pair where two programs share a part: with evict_first on the loads 261 -> 333 at
  (128, 128, 4096), since what the first program read is gone before the second comes. With ordinary loads:
  sm90_tile.py.
- A kernel of its own for at most 32 rows: S^T = K Q^T and O^T = V^T P^T, so that nothing is multiplied in vain, and a
  ring of 24 chunks of keys in the room of Q. Predicted 10 % at 16 heads; (32, 16, 4096) 62.3, this one 60.5;
  (8, 16, 8192) 37.5 and 34.9: its chain of 36 narrow products a block takes 1.8 of the 3.2 us that a block takes to
  arrive, and delays the end. Dropped.
- Units of at most four pieces merged by the last program that is done with one: predicted 5 at Azure, 32 requests of
  128 heads; (32, 16, 4096) 65.6 -> 67.6, (32, 64, 4096) 70.2 -> 84.8: the fence before the counter costs more than a
  dependent launch. Dropped.
- The combine is let in when a program's last load is done. Letting it in at the start packed its programs on the first
  free SMs: (1, 16, 81920) 52.5, without dependent launch 48.1, like this 47.5.
- 16-byte stores after an exchange between lanes (sm90_store_kernels.py) and a start that waits for one load less before
  the warps part: predicted 1.2 and 0.6 at (1, 128, 1024), whose decode took 13.5 before and 13.7 after. Kept, unproved.
- Dependent launch of the decode itself, and the part's first item prefetched: predicted 1.6 together;
  (128, 16, 4096) 219.5 -> 218.5, (32, 64, 4096) 79.2 -> 78.1. Kept.
- Float16 partial results: a program's stores of 64 rows took 5300 cycles, as fast as L2
  takes 17 MB from all. Predicted 2.5 at (32, 64, 4096): 76.2 -> 71.3.
- Q before the keys, in halves by both loaders, and the first odd block after it: Q arrived after 17000 cycles, behind
  the first keys of all programs, now after 8500. Predicted 2.3 at (8, 16, 8192), 40.5 -> 40.9; (1, 16, 1024) 11.6 ->
  10.9. Kept for the small batches.
- Plans in single blocks, a part's odd one by a way of its own ahead of its pairs, the first pair's odd block loaded
  beside it: predicted 2 for each part of a ragged batch. Azure, 32 requests of 16 heads 26.4 -> 25.4, of 128 heads
  36.9 -> 35.1, (1, 16, 1024) 9.6 -> 8.4. Without that way, odd pieces scored an empty block: 30.7 -> 35.1.
- The tail of an odd block zeroed ahead of the loop, in strips of 16 rows, by the warpgroup that is not busy scoring the
  even one: predicted 1 for each request of a ragged batch; part of the line above. Zeroing inside the loop cost 2 to
  3 % at two query tokens. Now of pages smaller than a block alone.
- The way for odd blocks brought the code from 122 to 139 KB, and each item began 1.2 to 1.8 later: (264, 128, 1536),
  four items a part, 219 -> 228. Predicted back with less code: whole and partial results stored one way, packed in
  pairs before lanes exchange them (sm90_store_kernels.py), 118 KB: 218; Azure, 256 requests of 128 heads 195 -> 189.
- Keys in boxes of two or four tiles of 64 columns (sm90_tile.py), since the four roles' loops, 38 KB, missed the
  instruction cache 138 times a pair where FlashMLA misses 15: predicted 2 %. 82 misses; (128, 128, 4096) 247.7 ->
  247.0, Azure, 32 requests of 16 heads 25.5 -> 24.7. Kept.
- Sums rescaled only by warps that have a factor other than 1, where ptxas branches around 128 products in place: 8 KB
  and 256 of 760 instructions a pair less. Predicted 1 to 3 %; with each block's maximum as its level half of all warps
  still rescale, (128, 128, 4096) with two query tokens 446 -> 454. With levels that stay until weights reach 2**8
  (sm90_softmax_kernels.py): 453 -> 436, with boxes of four tiles 426; (128, 128, 4096) 252 -> 244, Azure, 128 requests
  of 128 heads 109.5 -> 106.2, Mooncake, 32 requests 244 -> 232. Kept.
- The timer of the device at (1, 128, 1024), from the first program's start: set up 0.5, first loads known 1.5 and asked
  for 1.9, scores 3.4, their product 4.4, stores begun 4.9 and given 7.0, the last program's 7.5; combine let go 8.2,
  done 9.8. An item of one block that comes second in a part, whose code is there, takes as long: softmax and product
  1.0 and 1.0, stores of 64 rows 2.3 and 2.0. It is their instructions, not the fetching of them.
- A part's bounds, its first item and that item's last two pages in one line that is read at once (head_kernels.py),
  where three reads waited for one another, and an item's slot and rows kept in registers: predicted 0.5 and 0.6.
  (1, 128, 1024) 10.8 -> 10.4, (1, 128, 8192) 17.1 -> 16.5, (8, 16, 8192) 35.2 -> 34.5. With 16 pages, and addresses
  chosen by the bounds, which waited again: (1, 16, 8192) 12.7 -> 13.3. Kept.
- The first step of a part by a way of its own, ahead of the loop, and four reads of 16 bytes that neither compiler puts
  off: the table's header was asked for behind the part's bounds, and 140 dependent instructions led to the first load,
  now 65. From the item known to its loads asked for 0.98 -> 0.66, predicted 0.5; (1, 128, 1024) 10.1 -> 9.8, (1, 16,
  8192) 12.2 -> 11.8, Azure, 32 and 128 requests of 16 heads 24.2 -> 23.5, 76.2 -> 75.4. Kept.
- Float16 partial results where the accumulator has them, pairs of 32 columns transposed, which the combine undoes: 16
  stores of 16 bytes a thread and no exchange. Predicted 0.8 at (1, 128, 1024), 10.4 -> 10.1; Azure, 32 and 128 requests
  of 16 heads 24.5 -> 23.9, 76.4 -> 75.7. Whole results keep their way, so that there are two again.
  Eight rows interleaved, for whole lines: level, dropped: 64 KB leave an SM at 32 bytes a clock, whatever their order.
- A part's last partial result by way of Q's room and TMA, 225 instructions instead of 450: predicted 1.2 at
  (1, 128, 1024), 10.4 -> 10.6, (1, 16, 8192) 12.4 -> 13.1. The first keys asked for ahead of Q: 10.4 -> 10.6, 12.4 ->
  12.3. Descriptors prefetched while the kernel before ends: 10.9 -> 10.9. Dropped.
- Programs of 32 rows, two for each of 64, where half the parts would be idle (head_kernels.py): an SM takes in 64 bytes
  a clock and gives out 32, so that stores of 64 rows are 1.2 of (1, 128, 1024). Predicted 0.7: 9.8 -> 9.1, (1, 128,
  8192) 15.3 -> 14.7, (1, 64, 8192) 13.9 -> 13.4. Programs of 16 rows: 10.9, 19.7 and 14.0, since Q and keys come four
  times. Boxes of 32 rows for their Q: (1, 128, 1024) 8.9, but two of them in place of one elsewhere, (8, 64, 8192) 37.9
  -> 39.2; the page table's header asked for with the head and not behind the first loads: 9.4 and 39.0. Dropped.
- The same boxes behind a branch of the first step: predicted 0.2 at (1, 128, 1024), level; (1, 64, 1024) 8.5 -> 8.2,
  (1, 128, 8192) 15.5 -> 15.1, but (4, 128, 1024) 12.9 -> 13.1, (8, 64, 8192) 37.4 -> 37.6, and the host makes one more
  descriptor a call. Dropped. The table's header waited for behind the first keys, which need none of it, and not ahead
  of them: predicted 0.1 of 128 heads; (1, 128, 8192) 15.6 -> 15.4, (8, 128, 8192) 40.3 -> 40.1. Kept.
- Boxes of a sequence's last keys that end with the last of them, the rest of them of no page, so that TMA reads nothing
  and writes 0: slots behind a sequence are not read, nor zeroed, and 450 instructions are gone. Predicted 2.6 % of the
  bytes of Azure: 32 and 128 requests of 16 heads 23.6 -> 22.9, 75.8 -> 73.6, 256 of 128 heads 187 -> 184, (8, 64, 8192)
  39.0 -> 37.2. With strides whose divisibility the compiler lost on the way, so that whole results were stored in words
  of 4 bytes, 421 -> 432 at (128, 128, 4096) with two query tokens; with it known again 419. Kept.
- Boxes of 64 rows of Q that begin or end outside a tile of q, of which TMA reads but the 32 rows of a program and
  writes 0 for the rest: predicted 0.25 at (1, 128, 1024), 8.9 -> 8.9, (1, 64, 1024) 8.3 -> 8.5; all columns of such a
  box at once 9.0 and 8.7. What an SM takes in is not what it waits for. Dropped.
- Float16 partial results in units of what each half of a row has for a peak, and not divided by the row's sum, which
  the combine makes up for: no warpgroup waits for the other's sums and peaks before it stores. Predicted 0.12 at
  (1, 128, 1024), 8.9 -> 8.5; (1, 64, 1024) 8.4 -> 8.1, (1, 128, 8192) 14.9 -> 14.5, Azure, 32 requests of 128 heads
  32.2 -> 31.8, for 230 instructions more; elsewhere level. Kept.
- The same stores ahead of a warpgroup's own sums and rounding gains as well: predicted 0.05 at (1, 128, 1024), level;
  (1, 64, 1024) 8.1 -> 8.2, (1, 128, 8192) 14.6 -> 14.8. Dropped.
- No mask for the even block of a pair where there is one query token, nor for pairs after the first: all is seen there.
  Predicted 0.1 at (1, 128, 1024), for 130 instructions fewer: 8.94 -> 8.86; elsewhere level. Kept.
- A rehearsal of the stores while the first loads are under way, so that their code is in the instruction cache at the
  end: predicted 1 at (1, 128, 1024), 11.0 -> 13.2, for it takes longer than the loads. Dropped.

The two warpgroups' shared vectors and weights are ordered by the named barriers and, for weights0, through the loader
that refills the even block's right half: tests/test_sm90_protocol.py plays it. compute-sanitizer's racecheck does not
follow arrivals without a wait (bar.arrive), and reports them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.sm90_load_kernels import load_left, load_right
from portable_mla.backends.nvidia.sm90_room_kernels import Cache, Results, new_room
from portable_mla.backends.nvidia.sm90_sync_kernels import prefetch_line, publish_barriers, wait_for_previous_kernel
from portable_mla.backends.nvidia.sm90_warpgroup_kernels import left_warpgroup, right_warpgroup
from portable_mla.backends.triton.decode_kernels import LOG2_E
from portable_mla.metadata.head_kernels import HEAD_FIELDS


@gluon.jit(do_not_specialize=["tokens", "page_rows", "max_rows", "stride_lse_token", "stride_lse_head"])
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
    status_ptr,  # [6] int64
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
