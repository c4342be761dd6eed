"""DecodeMetadata: a decode step in the forms that backends read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from portable_mla.metadata.batch import PagedBatch


class Form(Enum):
    """A form of the batch that a backend may read; only the forms that the bound backend needs are built."""

    block_table = "block_table"
    query_indptr = "query_indptr"


@dataclass(frozen=True)
class DecodeMetadata:
    """One decode step. A form that was not asked for is None."""

    batch: PagedBatch
    query_indptr: Tensor | None = None  # [batch + 1] int32: where each request's query tokens start

    @classmethod
    def build(cls, batch: PagedBatch, forms: frozenset[Form]) -> DecodeMetadata:
        """The asked-for forms of `batch`, computed on its device without a host sync."""
        return cls(batch, _query_indptr(batch) if Form.query_indptr in forms else None)


def _query_indptr(batch: PagedBatch) -> Tensor:
    if batch.query_lens is None:
        steps = torch.arange(batch.size + 1, dtype=torch.int32, device=batch.device)
        return steps * batch.max_query_len
    indptr = torch.zeros(batch.size + 1, dtype=torch.int32, device=batch.device)
    torch.cumsum(batch.query_lens, 0, dtype=torch.int32, out=indptr[1:])
    return indptr
