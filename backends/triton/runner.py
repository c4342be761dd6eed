"""TritonRunner: plans once a step, then launches decode and combine once a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from portable_mla.backend import DecodeInputs
from portable_mla.backends.triton.combine_kernels import combine_kernel
from portable_mla.backends.triton.decode_kernels import decode_kernel
from portable_mla.backends.triton.tile import (
    CombineTile,
    Tile,
    amd_options,
    count_parts,
    grouped_combine,
    row_tiles,
    spread_combine,
)
from portable_mla.metadata import DecodeMetadata
from portable_mla.metadata.split_plan import PlanShape, SplitPlan
from portable_mla.shape import Request

# Combining fewer columns than this many a unit, one-warp programs hide more latency than wide ones save traffic. H100:
# spread is 2.7x faster at (batch 1, 128 heads, 8192) and 5 % slower at (128, 64, 4096); they meet near 64 x 128.
SPREAD_COLUMNS = 64 * 128


class TritonRunner:
    """Decode with a plan and partial results at stable addresses; `run` allocates no device memory and never syncs.

    A captured graph stays right when `plan` runs again, outside it or captured, on the same page table tensor.
    """

    def __init__(self, request: Request, tile: Tile) -> None:
        self._shape, self._tile, self._amd = request.shape, tile, request.arch.vendor == "amd"
        self._rows = request.shape.heads * request.max_query_len
        parts = count_parts(self._rows, tile, request.arch.units)
        capacity = request.capacity
        self._plan_shape = PlanShape(
            parts, capacity.max_batch, capacity.max_query_tokens, request.max_query_len, tile.block_n, tile.min_tiles
        )
        self._grid = (parts * row_tiles(self._rows, tile),)
        self._launches = {
            loads: self._decode_constants(replace(tile, loads=loads)) for loads in ("descriptor", "pointer")
        }
        wave, latent_dim = request.arch.wave, request.shape.latent_dim
        self._most_spread_tokens = SPREAD_COLUMNS * request.arch.units // (request.shape.heads * latent_dim)
        self._spread = self._combine_constants(spread_combine())
        self._grouped = self._combine_constants(grouped_combine(latent_dim, wave))
        self._buffers: tuple[SplitPlan, Tensor, Tensor] | None = None
        self._block_table: Tensor | None = None

    def plan(self, metadata: DecodeMetadata) -> None:
        """Cut the step's KV tiles over the launch grid, on the device."""
        assert metadata.query_indptr is not None, "asked for in needs()"
        batch = metadata.batch
        plan, _, _ = self._allocated(batch.device)
        self._block_table = batch.block_table
        plan.update(batch.kv_lens, metadata.query_indptr)

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """Two launches: split decode, and the combine that also defines rows without work."""
        assert self._buffers is not None and self._block_table is not None, "run before plan"
        assert kv_scale is None, "refused by dispatch"
        q, cache, table = inputs.q, inputs.kv_cache, self._block_table
        plan, partial_out, partial_stats = self._buffers
        latent_desc, rope_desc = self._descriptors(cache)
        results = (*out.stride()[:2], *lse.stride())
        decode_kernel[self._grid](
            q, cache, latent_desc, rope_desc, table, plan.part_indptr, plan.items, out, lse, partial_out, partial_stats,
            softmax_scale, self._rows, *q.stride()[:2], *cache.stride()[:2], table.stride(0), *results,
            **self._launches["pointer" if latent_desc is None else "descriptor"],
        )  # fmt: skip
        tokens = q.shape[0]
        programs, constants = self._spread if tokens <= self._most_spread_tokens else self._grouped
        combine_kernel[(tokens, programs)](
            plan.token_slots, partial_out, partial_stats, out, lse, self._shape.heads, self._rows, *results, **constants
        )

    def _allocated(self, device: torch.device) -> tuple[SplitPlan, Tensor, Tensor]:
        """Plan, partial results [slots, rows, latent] and their maximum and sum [slots, rows, 2], all float32."""
        if self._buffers is None:
            slots, latent_dim = self._plan_shape.max_slots, self._shape.latent_dim
            self._buffers = (
                SplitPlan.allocate(self._plan_shape, device),
                torch.empty(slots, self._rows, latent_dim, dtype=torch.float32, device=device),
                torch.empty(slots, self._rows, 2, dtype=torch.float32, device=device),
            )
        return self._buffers

    def _descriptors(self, cache: Tensor) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Descriptors of the latent and the rope columns, made anew for each call: a kept one would outlive the cache.

        None where the tile gathers, or where the cache's address or strides are not multiples of 16 bytes.
        """
        size, strides = cache.shape, cache.stride()
        bytes_ = cache.element_size()
        if self._tile.loads != "descriptor" or cache.data_ptr() % 16 or any(s * bytes_ % 16 for s in strides[:2]):
            return None, None
        block_n, rope_dim = self._tile.block_n, self._shape.rope_dim
        latent = TensorDescriptor(cache, size, strides, [1, block_n, self._shape.latent_dim])
        return latent, TensorDescriptor(cache, size, strides, [1, block_n, rope_dim]) if rope_dim else None

    def _decode_constants(self, tile: Tile) -> dict[str, Any]:
        shape = self._shape
        return {
            "HEADS": shape.heads, "LATENT": shape.latent_dim, "ROPE": shape.rope_dim, "PAGE_SIZE": shape.page_size,
            "ROW_TILES": row_tiles(self._rows, tile), "BLOCK_H": tile.block_h, "BLOCK_N": tile.block_n,
            "NUM_STAGES": tile.num_stages, "DESCRIPTORS": tile.loads == "descriptor", "NUM_XCDS": tile.num_xcds,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages, **(amd_options(tile) if self._amd else {}),
        }  # fmt: skip

    def _combine_constants(self, tile: CombineTile) -> tuple[int, dict[str, Any]]:
        """Programs a token, and the launch constants."""
        shape = self._shape
        programs = -(-shape.heads // tile.block_r) * (shape.latent_dim // tile.block_d)
        constants = {
            "LATENT": shape.latent_dim, "BLOCK_D": tile.block_d, "BLOCK_R": tile.block_r, "BLOCK_S": tile.block_s,
            "num_warps": tile.num_warps,
        }  # fmt: skip
        return programs, constants
