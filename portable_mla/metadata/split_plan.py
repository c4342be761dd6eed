"""SplitPlan: how the KV tiles of a ragged batch are cut over a fixed number of programs, on the device.

The requests lie on a line of cost, tiles + OVERHEAD_TILES each, and part p of P owns the stretch [p, p + 1) * share. A
plan for any lengths up to capacity fits the same launch grid, so a captured graph stays right. The idea of planning on
the device is FlashMLA's (DeepSeek, 2025).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from portable_mla.metadata.split_kernels import ITEM_FIELDS, plan_splits_kernel

OVERHEAD_TILES = 4  # what starting a request costs, in tiles
MIN_PIECE_TILES = 1  # a cut leaves at least this many tiles on both sides; a part has at least twice as many
REQUESTS_PER_PROGRAM = 16
PIECES_PER_STEP = 32
REQUESTS_PER_SCAN = 1024


@dataclass(frozen=True)
class PlanShape:
    """What a plan is sized by. parts: programs along the KV; block_n: tokens of a tile; min_tiles: of a part."""

    parts: int
    max_batch: int
    max_tokens: int
    max_query_len: int
    block_n: int
    min_tiles: int

    @property
    def max_items(self) -> int:
        """Items of any plan: each request has one, and each cut adds one."""
        return self.parts + self.max_batch

    @property
    def max_slots(self) -> int:
        """Partial results of any plan: each of the parts - 1 cuts adds one piece, and a split request has a cut."""
        return max(min(2 * (self.parts - 1), self.max_items), 1)


@dataclass(frozen=True)
class SplitPlan:
    """Buffers whose addresses never change; the contents describe one step.

    A part is a run of items; an item is a run of KV tiles of one request. `slot` is where its partial result goes, or
    -1 when the item is the whole request. `token_slots` tells the combine which slots to merge for each query token.
    """

    shape: PlanShape
    part_indptr: Tensor  # [parts + 1] int32
    items: Tensor  # [max_items, 8] int32: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, unused
    token_slots: Tensor  # [max_tokens, 4] int32: slot_lo, slot_hi or -1, index in the request, unused

    @classmethod
    def allocate(cls, shape: PlanShape, device: torch.device) -> SplitPlan:
        """Buffers for any batch within `shape`."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(shape, zeros(shape.parts + 1), zeros(shape.max_items, ITEM_FIELDS.value), zeros(shape.max_tokens, 4))

    def update(self, kv_lens: Tensor, query_indptr: Tensor) -> None:
        """Plan one step. kv_lens: [batch] int32; query_indptr: [batch + 1] int32. No value is read on the host."""
        batch = kv_lens.shape[0]
        shape = self.shape
        assert batch <= shape.max_batch, "the caller checks capacity"
        plan_splits_kernel[(max(-(-batch // REQUESTS_PER_PROGRAM), 1),)](
            kv_lens, query_indptr, self.part_indptr, self.items, self.token_slots,
            batch, shape.parts, shape.max_tokens, shape.min_tiles,
            MAX_QUERY_LEN=shape.max_query_len, BLOCK_Q=triton.next_power_of_2(shape.max_query_len),
            BLOCK_N=shape.block_n,
            OVERHEAD=OVERHEAD_TILES, MIN_PIECE=MIN_PIECE_TILES, BLOCK_B=REQUESTS_PER_PROGRAM, BLOCK_P=PIECES_PER_STEP,
            SCAN=REQUESTS_PER_SCAN, num_warps=4,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def plan_splits_reference(
    kv_lens: list[int], query_indptr: list[int], shape: PlanShape
) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, int, int]]]:
    """part_indptr, items and token_slots as `plan_splits_kernel` writes them: the definition of the plan."""
    query_lens = [stop - start for start, stop in itertools.pairwise(query_indptr)]
    tiles = [-(-max(length, 0) // shape.block_n) if n > 0 else 0 for length, n in zip(kv_lens, query_lens, strict=True)]
    overhead = OVERHEAD_TILES
    share = -(-sum(count + overhead for count in tiles if count) // shape.parts)
    if share < shape.min_tiles + overhead:
        overhead, share = 0, max(-(-sum(tiles) // shape.parts), shape.min_tiles)
    parts: list[list[tuple[int, ...]]] = [[] for _ in range(shape.parts)]
    tokens = [(0, 0, 0)] * shape.max_tokens
    start, slot = 0, 0
    for request, count in enumerate(tiles):
        slots = (0, 0)
        if count:
            origin = start + overhead
            first = min((origin + MIN_PIECE_TILES - 1) // share, shape.parts - 1)
            last = min(max((origin + count - MIN_PIECE_TILES) // share, first), shape.parts - 1)
            for part in range(first, last + 1):
                low = 0 if part == first else part * share - origin
                high = count if part == last else (part + 1) * share - origin
                place = slot + part - first if last > first else -1
                rest = (kv_lens[request], query_indptr[request], query_lens[request], 0)
                parts[part].append((request, low, high, place, *rest))
            slots = (slot, slot + last - first + 1) if last > first else (0, -1)
            slot += last - first + 1 if last > first else 0
            start += count + overhead
        for index in range(min(query_lens[request], shape.max_query_len)):
            tokens[query_indptr[request] + index] = (slots[0], slots[1], index)
    part_indptr = [0]
    for part_items in parts:
        part_indptr.append(part_indptr[-1] + len(part_items))
    return part_indptr, [item for part_items in parts for item in part_items], tokens
