"""BatchSnapshot: whether the tensors of a batch are still what they were when it was planned."""

from __future__ import annotations

from torch import Tensor

from portable_mla.metadata import PagedBatch


class BatchSnapshot:
    """What a batch's tensors were, by their count of writes in place. Inference tensors carry none: those in host
    memory are copied and compared, those on a GPU are not looked at."""

    def __init__(self, batch: PagedBatch) -> None:
        given = (batch.block_table, batch.kv_lens, batch.query_lens, batch.positions)
        tensors = [tensor for tensor in given if tensor is not None]
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]
        self._counts = [tensor._version for tensor in self._counted]
        uncounted = [tensor for tensor in tensors if tensor.is_inference() and tensor.device.type == "cpu"]
        self._copies: list[tuple[Tensor, Tensor]] = [(tensor, tensor.clone()) for tensor in uncounted]

    def has_changed(self) -> bool:
        """Whether anything was written since."""
        if [tensor._version for tensor in self._counted] != self._counts:
            return True
        return any(not tensor.equal(copy) for tensor, copy in self._copies)
