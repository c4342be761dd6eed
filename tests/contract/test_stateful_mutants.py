"""The state machine can fail: attentions that are broken in one way each are caught, by the rule that should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from portable_mla import MLAAttention, PagedBatch
from tests.contract.test_stateful import STEPS, machine_of
from tests.support.targets import Target


class PlansOnce(MLAAttention):
    """Its buffers keep what the first plan wrote."""

    def plan(self, batch: PagedBatch) -> None:
        first = self._batch is None
        before = [(t, t.clone()) for own in self._buffers.tensors().values() for t in own]
        super().plan(batch)
        for tensor, old in [] if first else before:
            tensor.copy_(old)


class MovesItsBuffers(MLAAttention):
    """Allocates its metadata anew each step, and says that it does not."""

    def plan(self, batch: PagedBatch) -> None:
        self._buffers = self._new_buffers()
        super().plan(batch)


class LeavesAStaleTail(MLAAttention):
    """A batch that shrinks leaves the positions of the one before."""

    def plan(self, batch: PagedBatch) -> None:
        before, first = self.positions.clone(), self._batch is None
        super().plan(batch)
        tokens = batch.size * batch.max_query_len if batch.query_lens is None else int(batch.query_lens.sum())
        if not first:
            self.positions[tokens:] = before[tokens:]


class Altered(MLAAttention):
    """Alters results after each run."""

    def run(
        self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, kv_scale: Tensor | None,
        *, ours: bool = False,
    ) -> None:  # fmt: skip
        super().run(q, kv_cache, out, lse, softmax_scale, kv_scale, ours=ours)
        assert self._batch is not None, "planned"
        self.alter(self._batch, out, lse)

    def alter(self, batch: PagedBatch, out: Tensor, lse: Tensor) -> None:
        """What is wrong with it."""


class LeavesPadding(Altered):
    """Does not write rows that belong to nobody."""

    def alter(self, batch: PagedBatch, out: Tensor, lse: Tensor) -> None:
        if batch.query_lens is not None:
            out[int(batch.query_lens.sum()) :] = torch.nan


class FeelsItsNeighbours(Altered):
    """A last bit depends on the size of the batch, deterministic or not."""

    def alter(self, batch: PagedBatch, out: Tensor, lse: Tensor) -> None:
        lse.mul_(1 + 1e-6 * batch.size)


class DiffersWhenFresh(Altered):
    """A last bit depends on persistent_metadata."""

    def alter(self, batch: PagedBatch, out: Tensor, lse: Tensor) -> None:
        lse.mul_(1 + 1e-6 * (not self._settings.persistent_metadata))


class TakesBadPages(MLAAttention):
    """Plans a batch whose page table names pages that are not there."""

    def plan(self, batch: PagedBatch) -> None:
        try:
            super().plan(batch)
        except IndexError:
            return


BROKEN = {
    PlansOnce: "positions are",
    MovesItsBuffers: "buffers moved",
    LeavesAStaleTail: "positions are",
    LeavesPadding: "rows of padding",
    FeelsItsNeighbours: "alone, deterministic",
    DiffersWhenFresh: "persistent_metadata=False",
    TakesBadPages: "DID NOT RAISE",
}


@pytest.mark.parametrize(("attention", "why"), BROKEN.items(), ids=[attention.__name__ for attention in BROKEN])
def test_a_broken_attention_is_caught(attention: type[MLAAttention], why: str) -> None:
    budget = settings(
        max_examples=30,
        stateful_step_count=STEPS,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    machine = machine_of(Target("cpu", "cpu"), attention)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=why):
        run_state_machine_as_test(machine, settings=budget)
