"""Combine: the second launch of a split decode, for few rows or for many; shared by the runners of split plans."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.triton.combine_kernels import combine_kernel
from portable_mla.backends.triton.tile import CombineTile, grouped_combine, spread_combine
from portable_mla.launch import KernelLaunch
from portable_mla.metadata.split_plan import PlanShape
from portable_mla.shape import Request

# Combining fewer columns than this many a unit, one-warp programs hide more latency than wide ones save traffic. H100:
# spread is 2.7x faster at (batch 1, 128 heads, 8192) and 5 % slower at (128, 64, 4096); they meet near 64 x 128.
SPREAD_COLUMNS = 64 * 128

PartialSizes = tuple[tuple[int, int, int], tuple[int, int, int]]


def partial_sizes(request: Request, plan_shape: PlanShape) -> PartialSizes:
    """Partial results [slots, rows, latent], and their maximum and sum [slots, rows, 2], both float32."""
    slots, rows = plan_shape.max_slots, request.shape.heads * plan_shape.block_q
    return (slots, rows, request.shape.latent_dim), (slots, rows, 2)


def allocate_partials(sizes: PartialSizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial results, and their maximum and sum."""
    out, stats = (torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
    return out, stats


def partial_bytes(sizes: PartialSizes) -> int:
    """Bytes that `allocate_partials` takes."""
    return sum(4 * slots * rows * width for slots, rows, width in sizes)


class Combine:
    """Merges partial results, and defines the rows that no decode program wrote.

    dependent: NVIDIA's programmatic dependent launch; the decode kernel says when the combine may begin.
    """

    def __init__(self, request: Request, *, dependent: bool = False) -> None:
        self._request, self._dependent = request, dependent
        wave, latent_dim = request.arch.wave, request.shape.latent_dim
        most_spread = SPREAD_COLUMNS * request.arch.units // (request.shape.heads * latent_dim)
        # One combine for all batch sizes where results must not depend on the batch.
        self.most_spread_tokens = request.capacity.max_query_tokens if request.deterministic else most_spread
        tiles = {"spread": spread_combine(), "grouped": grouped_combine(latent_dim, wave)}
        self._programs = {kind: self._programs_a_token(tile) for kind, tile in tiles.items()}
        self.constants = {kind: self._constants(tile) for kind, tile in tiles.items()}
        self._launches = {
            kind: KernelLaunch(combine_kernel, constants) for kind, constants in self.constants.items()
        }  # fmt: skip

    def ready(self, key: Hashable, tokens: int) -> None:
        """Raises GraphCaptureError where a capture could not take the launch: ask before the decode is launched."""
        self._launches[self._kind(tokens)].ready(key)

    def __call__(
        self, key: Hashable, token_slots: Tensor, partials: tuple[Tensor, Tensor], out: Tensor, lse: Tensor,
        max_rows: int, strides: tuple[int, ...],
    ) -> None:  # fmt: skip
        """Launch for the tokens of `out`. strides: out's outer two and lse's."""
        tokens, kind = out.shape[0], self._kind(out.shape[0])
        self._launches[kind](
            key, (tokens, self._programs[kind]),
            token_slots, *partials, out, lse, self._request.shape.heads, max_rows, *strides,
        )  # fmt: skip

    def _kind(self, tokens: int) -> str:
        return "spread" if tokens <= self.most_spread_tokens else "grouped"

    def _programs_a_token(self, tile: CombineTile) -> int:
        shape = self._request.shape
        return -(-shape.heads // tile.block_r) * (shape.latent_dim // tile.block_d)

    def _constants(self, tile: CombineTile) -> dict[str, Any]:
        """Constants and options of the launch."""
        options = {"launch_pdl": True} if self._dependent else {}
        return {
            "LATENT": self._request.shape.latent_dim, "BLOCK_D": tile.block_d, "BLOCK_R": tile.block_r,
            "BLOCK_S": tile.block_s, "FEW": tile.few, "DEPENDENT": self._dependent, "num_warps": tile.num_warps, **options,
        }  # fmt: skip
