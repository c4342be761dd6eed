"""DecodeBuffers: the metadata of a step at addresses that never change, written in place on the device."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor

from portable_mla.core.shape import Capacity
from portable_mla.metadata.batch import PagedBatch
from portable_mla.metadata.decode_metadata import DecodeMetadata, Needs
from portable_mla.metadata.ragged.forms import RaggedForms, RaggedShape
from portable_mla.metadata.status import Status


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class DecodeBuffers:
    """Metadata of one attention, sized by its capacity, in the forms that are needed."""

    def __init__(
        self, capacity: Capacity, page_size: int, needs: Needs, status: Status, *, debug: bool = False
    ) -> None:
        self._page_size, self._debug, self._status = page_size, debug, status
        device = status.words.device
        self._plan = None
        if needs.split_plan is not None:
            from portable_mla.metadata.split_plan.plan import SplitPlan

            self._plan = SplitPlan.allocate(needs.split_plan, device)
        self._ragged = None
        if needs.query_indptr or needs.index_size or (needs.positions and self._plan is None):
            shape = RaggedShape(
                capacity.max_batch,
                capacity.max_query_tokens,
                capacity.max_context,
                capacity.max_pages,
                page_size,
                needs.index_size,
            )
            self._ragged = RaggedForms.allocate(shape, device)
        self._in_torch = device.type == "cpu" or not _has_triton()

    @property
    def positions(self) -> Tensor:
        """[max_query_tokens] int32, any stride: RoPE position of each query token, the batch's own where it has them,
        else kv_len - query_len + i; 0 for padding."""
        if self._plan is not None:
            return self._plan.positions
        assert self._ragged is not None, "needs no positions"
        return self._ragged.positions

    def update(self, batch: PagedBatch, pages: int) -> DecodeMetadata:
        """Describe one step: one launch a form, no allocation, no sync, capturable. Lengths over the capacity and page
        ids outside [0, pages) set the status words."""
        if self._plan is not None:
            self._plan.update(batch, self._status, page_size=self._page_size, max_pages=pages)
        if self._ragged is not None:
            write = self._ragged.update_with_torch if self._in_torch else self._ragged.update
            write(batch, self._status, max_pages=pages)
        return DecodeMetadata(batch, self._status, self._plan, self._ragged, self._debug, pages)

    def tensors(self) -> dict[str, tuple[Tensor, ...]]:
        """Every buffer, by the part it belongs to."""
        parts: dict[str, tuple[Tensor, ...]] = {}
        if self._plan is not None:
            parts["split plan"] = self._plan.buffers
        if self._ragged is not None:
            ragged = self._ragged
            parts["query rows"] = (ragged.query_indptr, ragged.positions)
            if ragged.kv_indptr is not None:
                assert ragged.kv_indices is not None and ragged.last_page_len is not None
                parts["kv indices"] = (ragged.kv_indptr, ragged.kv_indices, ragged.last_page_len)
        return parts
