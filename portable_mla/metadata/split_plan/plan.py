"""SplitPlan: how the KV tiles of a ragged batch are cut over a fixed number of programs, on the device.

The units, blocks of query tokens of one request, lie on a line of cost, tiles + overhead each, and part p of P
owns the stretch [p, p + 1) * share. A plan for any lengths up to capacity fits the same launch grid, so a captured
graph stays right. The idea of planning on the device is FlashMLA's (DeepSeek, 2025).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from portable_mla.metadata.batch import PagedBatch
from portable_mla.metadata.split_plan.kernels.plan import ITEM_FIELDS, TOKEN_FIELDS, plan_splits_kernel
from portable_mla.metadata.split_plan.kernels.program_headers import HEAD_FIELDS
from portable_mla.metadata.status import Status
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

OVERHEAD_TILES = 4  # what starting a unit costs, in tiles, where the backend does not say
MIN_PIECE_TILES = 1  # a cut leaves at least this many tiles on both sides; a part has at least twice as many
PIECES_PER_STEP = 32
CELLS_PER_STEP = 128
UNITS_PER_SCAN = 1024  # at most
# H100, us at batch 128 and 1024: programs of one unit and one warp 3.0 and 11.6, of 4 units and 4 warps 4.1 and 6.3, of
# 16 units and 4 warps 5.1 and 6.4. Shuffles beat barriers while the scan is short.
ONE_WARP_UNITS = 256
FIXED_TOKENS = 512  # of a piece whose cuts may not depend on the batch, while these are enough
FIXED_PIECES = 64  # most of them in a unit: longer units get longer pieces


@dataclass(frozen=True)
class PlanShape:
    """What a plan is sized by.

    parts: programs along the KV; block_n: tokens of a tile; min_tiles: of a part; block_q: query tokens of a unit;
    fixed: each unit is cut by its own length alone, so that its result has the same bits in any batch; overhead: what
    starting a unit costs, in tiles; merge_cost: what merging a piece of a unit costs, in 256ths of a tile; row_tiles:
    programs of 64 rows that share a part and begin with a head each, 0 where none do; halves: whether twice as many
    share it where half the parts are idle.
    """

    parts: int
    max_batch: int
    max_tokens: int
    max_query_len: int
    max_context: int
    block_q: int
    block_n: int
    min_tiles: int
    fixed: bool = False
    overhead: int = OVERHEAD_TILES
    merge_cost: int = 0
    row_tiles: int = 0
    halves: bool = False

    @property
    def query_blocks(self) -> int:
        """Units of a request."""
        return -(-self.max_query_len // self.block_q)

    @property
    def max_units(self) -> int:
        """Units of any batch."""
        return self.max_batch * self.query_blocks

    @property
    def units_per_program(self) -> int:
        """Units whose items one program writes; each program scans all."""
        return 1 if self.max_units <= ONE_WARP_UNITS else 8

    @property
    def fixed_tiles(self) -> int:
        """Tiles of the shortest fixed piece; 0 where cuts are free."""
        return max(FIXED_TOKENS // self.block_n, 1) if self.fixed else 0

    @property
    def max_pieces(self) -> int:
        """Pieces of one unit, where cuts are fixed."""
        longest = -(-self.max_context // self.block_n)
        return max(min(FIXED_PIECES, -(-longest // max(self.fixed_tiles, 1))), 1)

    @property
    def max_items(self) -> int:
        """Items of any plan: each unit has one, and each cut adds one."""
        return self.max_units * self.max_pieces if self.fixed else self.parts + self.max_units

    @property
    def max_slots(self) -> int:
        """Partial results of any plan: each of the parts - 1 free cuts adds one piece, and a split unit has a cut."""
        if self.fixed:
            return self.max_items if self.max_pieces > 1 else 1
        return max(min(2 * (self.parts - 1), self.max_items), 1)


@dataclass(frozen=True)
class SplitPlan:
    """Buffers whose addresses never change; the contents describe one step.

    A part is a run of items; an item is a run of KV tiles of one unit. `slot` is where its partial result goes, or -1
    when the item is the whole unit. `token_slots` tells the combine which slots to merge for each query token.
    `table_header` says where the step's page table is, so that a captured graph follows any table, and how long parts
    are. `heads` are there for kernels whose programs begin with them.
    """

    shape: PlanShape
    table_header: Tensor  # [3] int64: address, row stride, tiles of a part, starts of units included
    part_indptr: Tensor  # [parts + 1] int32
    items: Tensor  # [max_items, 8] int32: request, tile_lo, tile_hi, slot, kv_len, query_start, query_len, 0
    token_slots: Tensor  # [max_tokens, 4] int32: slot_lo, slot_hi or -1 (final) or -2 (faulty), index in unit, position
    summary: Tensor  # [4] int32: longest query_len, query tokens, items, slots
    # [parts * row_tiles, 16] int32: first item, end, its last two pages, rows, tiles of a part, 0, 0, that item
    heads: Tensor | None = None
    _launches: dict[int, KernelLaunch] = field(default_factory=dict, repr=False, compare=False)  # by page size

    @classmethod
    def allocate(cls, shape: PlanShape, device: torch.device) -> SplitPlan:
        """Buffers for any batch within `shape`."""

        def ints(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        return cls(
            shape,
            ints(3, dtype=torch.int64),
            ints(shape.parts + 1),
            ints(shape.max_items, ITEM_FIELDS.value),
            ints(shape.max_tokens, TOKEN_FIELDS.value),
            ints(4),
            ints(shape.parts * shape.row_tiles, HEAD_FIELDS.value) if shape.row_tiles else None,
        )

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Every tensor of the plan."""
        own = self.table_header, self.part_indptr, self.items, self.token_slots, self.summary
        return own if self.heads is None else (*own, self.heads)

    @property
    def positions(self) -> Tensor:
        """[max_tokens] int32, strided: where each query token stands in its request; 0 for padding."""
        return self.token_slots[:, 3]

    def _launch(self, page_size: int) -> KernelLaunch:
        """The plan's own reference to its launch: what other plans need cannot drop a kernel that this one compiled."""
        launch = self._launches.get(page_size)
        if launch is None:
            launch = self._launches[page_size] = _launch_of(tuple(plan_constants(self.shape, page_size).items()))
        return launch

    def update(self, batch: PagedBatch, status: Status, *, page_size: int, max_pages: int) -> None:
        """Plan one step in one launch; no value is read on the host. Lengths and pages out of range set `status`."""
        shape = self.shape
        table, kv_lens, query_lens, positions = batch.block_table, batch.kv_lens, batch.query_lens, batch.positions
        requests = batch.size
        assert requests <= shape.max_batch, "the caller checks capacity"
        programs = max(-(-requests * shape.query_blocks // shape.units_per_program), 1)
        dtype = None if positions is None else positions.dtype
        key = (table.device.index, dtype, alignment(kv_lens, query_lens, positions, table))
        self._launch(page_size)(
            key, (programs,),
            kv_lens, query_lens, positions, table, self.table_header, self.part_indptr, self.heads, self.items,
            self.token_slots, self.summary, status.words,
            requests, 0 if positions is None else positions.shape[0], shape.parts, shape.max_tokens, shape.min_tiles,
            min(table.shape[1] * page_size, shape.max_context), batch.max_query_len,
            (2**31 - 1) // max(requests, 1), max_pages, table.stride(0),
        )  # fmt: skip


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.lru_cache(maxsize=256)
def _launch_of(constants: tuple[tuple[str, int], ...]) -> KernelLaunch:
    """One launch for all shapes with these constants: plans of single calls come and go."""
    return KernelLaunch(plan_splits_kernel, dict(constants))


def plan_constants(shape: PlanShape, page_size: int) -> dict[str, int]:
    """Constants and options of the plan kernel's launch. They follow the capacity in powers of two, never a batch."""
    scan = min(max(_power_of_2(shape.max_units), 64), UNITS_PER_SCAN)
    return {
        "BLOCK_Q": shape.block_q, "BLOCK_T": _power_of_2(shape.block_q), "QUERY_BLOCKS": shape.query_blocks,
        "PAGE_SIZE": page_size, "BLOCK_N": shape.block_n, "OVERHEAD": shape.overhead, "MIN_PIECE": MIN_PIECE_TILES,
        "MERGE_COST": shape.merge_cost,
        "FIXED_TILES": shape.fixed_tiles, "MAX_PIECES": FIXED_PIECES, "BLOCK_U": shape.units_per_program,
        "BLOCK_P": PIECES_PER_STEP, "BLOCK_C": CELLS_PER_STEP, "SCAN": scan, "ROW_TILES": shape.row_tiles,
        "HALVES": shape.halves,
        "num_warps": 1 if scan <= ONE_WARP_UNITS else 4,
    }  # fmt: skip
