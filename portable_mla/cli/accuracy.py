"""Check: one layer of one step, held against the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.backends import reference
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.metadata import PagedBatch

# Relative RMS allowed in a row: about 1.5 times what a kernel with float32 sums and one rounding of its output shows.
ROW_RMS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-18}


@dataclass(frozen=True)
class Check:
    """The worst errors of the compared rows.

    row_rms: relative RMS of one token and head; lse_share: |difference| over its bound 1e-4 + 2e-6 |lse|.
    Errors that are not numbers are infinite.
    """

    step: int
    layer: int
    rows: int
    row_rms: float
    row_rms_bound: float
    lse_share: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds."""
        return self.row_rms <= self.row_rms_bound and self.lse_share <= 1.0

    def __str__(self) -> str:
        return (
            f"step {self.step}, layer {self.layer}: row relative RMS {self.row_rms:.2e} (bound "
            f"{self.row_rms_bound:.2e}), LSE error {self.lse_share:.3f} of its bound"
        )


@dataclass(frozen=True)
class LayerCall:
    """What one layer was given and what it returned, one query token a request."""

    inputs: DecodeInputs
    batch: PagedBatch
    softmax_scale: float
    out: Tensor  # [batch, heads, latent]
    lse: Tensor  # [batch, heads] float32

    def check(self, requests: Sequence[int], *, step: int, layer: int) -> Check:
        """Compare the rows of some requests, given by their place in the batch, with the reference."""
        rows = torch.tensor(list(requests), dtype=torch.int64, device=self.out.device)
        batch = PagedBatch(self.batch.block_table[rows], self.batch.kv_lens[rows])
        inputs = DecodeInputs(self.inputs.q[rows], self.inputs.kv_cache)
        latent_dim = self.out.shape[2]
        right, right_lse = reference.decode(
            inputs, batch, latent_dim=latent_dim, softmax_scale=self.softmax_scale, dtype=torch.float64
        )
        error = (self.out[rows].double() - right).norm(dim=-1) / right.norm(dim=-1)
        lse_error = (self.lse[rows].double() - right_lse).abs() / (1e-4 + 2e-6 * right_lse.abs())
        bound = ROW_RMS[self.out.dtype]
        return Check(step, layer, error.numel(), _worst(error), bound, _worst(lse_error))


def _worst(errors: Tensor) -> float:
    worst = float(errors.max())  # NaN if any is
    return math.inf if math.isnan(worst) else worst
