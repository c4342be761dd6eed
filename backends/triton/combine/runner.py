"""Combine: the second launch of a split decode; shared by the runners of split plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.triton.combine.kernels.combine import NARROW_STATS, WIDE_STATS, combine_kernel
from portable_mla.backends.triton.config.combine import CombineTile, combine_tiles
from portable_mla.core.shape import Request
from portable_mla.metadata.split_plan.plan import PlanShape
from portable_mla.runtime.kernel_launch import KernelLaunch

MANY_PIECES = 10  # a unit, on average
FEW_ROWS = 32  # of a step: programs of more columns would be too few
GROUPED_COLUMNS = 15_888  # an SM or CU: beyond 4096 rows of 512 columns on 132, programs of one row are too many


@dataclass(frozen=True)
class Partials:
    """Sizes of the partial results of a plan. Each row has its maximum and sum beside it, and where it is float16 what
    each half of its columns is in units of."""

    slots: int
    rows: int
    latent_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, request: Request, plan_shape: PlanShape, dtype: torch.dtype = torch.float32) -> Partials:
        """What any plan of this shape needs."""
        rows = request.shape.heads * plan_shape.block_q
        return cls(plan_shape.max_slots, rows, request.shape.latent_dim, dtype)

    @property
    def _stats(self) -> int:
        return int((WIDE_STATS if self.dtype == torch.float32 else NARROW_STATS).value)

    @property
    def nbytes(self) -> int:
        """Bytes that `allocate` takes."""
        return self.slots * self.rows * (self.latent_dim * self.dtype.itemsize + self._stats * 4)

    def allocate(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Partial results [slots, rows, latent], and float32 [slots, rows, 2 or 4]."""
        out = torch.empty(self.slots, self.rows, self.latent_dim, dtype=self.dtype, device=device)
        return out, torch.empty(self.slots, self.rows, self._stats, dtype=torch.float32, device=device)


class Combine:
    """Merges partial results, and defines the rows that no decode program wrote.

    parts: of the split plan. narrow: partial results are float16. dependent: NVIDIA's programmatic dependent launch;
    the decode kernel says when the combine may begin.
    """

    def __init__(self, request: Request, parts: int, *, narrow: bool = False, dependent: bool = False) -> None:
        self._request, self._parts, self._dependent = request, parts, dependent
        tiles = combine_tiles(request.shape.latent_dim, request.arch.wave, narrow=narrow)
        self._programs = {kind: self._programs_a_token(tile) for kind, tile in tiles.items()}
        self.constants = {kind: self._constants(tile) for kind, tile in tiles.items()}
        self._launches = {
            kind: KernelLaunch(combine_kernel, constants) for kind, constants in self.constants.items()
        }  # fmt: skip

    def at(self, key: Hashable, tokens: int) -> Callable[..., None]:
        """A launch for so many tokens, to be given the arguments before the constants.

        Raises GraphCaptureError where a capture could not take it: ask before the decode is launched.
        """
        kind = self._kind(tokens)
        return self._launches[kind].at(key, (tokens, self._programs[kind]))

    def _kind(self, tokens: int) -> str:
        shape = self._request.shape
        if self._request.deterministic:  # nothing may depend on the batch
            return "spread"
        if tokens * MANY_PIECES < self._parts:
            return "thin" if tokens * shape.heads <= FEW_ROWS else "spread"
        grouped = tokens * shape.heads * shape.latent_dim > GROUPED_COLUMNS * self._request.arch.units
        return "grouped" if grouped else "rows"

    def _programs_a_token(self, tile: CombineTile) -> int:
        shape = self._request.shape
        return -(-shape.heads // tile.block_r) * (shape.latent_dim // tile.block_d)

    def _constants(self, tile: CombineTile) -> dict[str, Any]:
        """Constants and options of the launch."""
        options = {"launch_pdl": True} if self._dependent else {}
        return {
            "LATENT": self._request.shape.latent_dim, "BLOCK_D": tile.block_d, "BLOCK_R": tile.block_r,
            "BLOCK_S": tile.block_s, "FEW": tile.few, "REHEARSED": tile.rehearsed and self._dependent,
            "DEPENDENT": self._dependent, "num_warps": tile.num_warps, **options,
        }  # fmt: skip
