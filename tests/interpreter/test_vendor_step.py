"""The kernels around vendor libraries write what their torch twins write, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portable_mla import CacheFormat, Capacity, MLAShape, Phase, Request, arch_named
from portable_mla.backends.library.batch import Step
from portable_mla.backends.library.kernels.batch import finish_rows_kernel, prepare_step_kernel
from portable_mla.metadata import DecodeBuffers, DecodeMetadata, Needs, PagedBatch, Status

PREPARE: Any = prepare_step_kernel
FINISH: Any = finish_rows_kernel
PAGE_SIZE, MAX_CONTEXT, PAGES, HEADS, LATENT = 16, 200, 40, 5, 128


@dataclass(frozen=True)
class StepCase:
    """A batch in numbers; lengths and pages may be wrong."""

    kv_lens: list[int]
    query_lens: list[int] | None
    max_query_len: int
    room: int  # requests and tokens of the capacity that the batch does not use
    fewer: int  # rows that q lacks
    seed: int

    def batch(self) -> PagedBatch:
        """Random pages, one in sixteen not in the cache."""
        rng = torch.Generator().manual_seed(self.seed)
        table = torch.randint(0, PAGES, (len(self.kv_lens), 11), generator=rng)
        table[torch.randint(0, 16, table.shape, generator=rng) == 0] = 2**31 - 1
        lens = torch.tensor(self.kv_lens, dtype=torch.int32)
        query_lens = None if self.query_lens is None else torch.tensor(self.query_lens, dtype=torch.int32)
        return PagedBatch(table.int(), lens, query_lens, self.max_query_len)

    def request(self) -> Request:
        """A capacity with room."""
        size = len(self.kv_lens)
        tokens = size * self.max_query_len if self.query_lens is None else sum(max(n, 0) for n in self.query_lens)
        shape = MLAShape(HEADS, LATENT, 64, PAGE_SIZE, torch.bfloat16, CacheFormat.bf16)
        capacity = Capacity(size + self.room, tokens + self.room, self.max_query_len, MAX_CONTEXT, PAGES, 0)
        arch, uniform = arch_named("sm90"), self.query_lens is None
        return Request(arch, shape, Phase.decode, self.max_query_len, uniform, False, capacity)


@st.composite
def step_cases(draw: st.DrawFn) -> StepCase:
    """Any batch."""
    most = draw(st.integers(1, 3))
    requests = draw(st.lists(st.tuples(st.integers(-1, 210), st.integers(-1, most + 1)), min_size=1, max_size=6))
    ragged = draw(st.booleans())
    return StepCase(
        [kv_len for kv_len, _ in requests],
        [n for _, n in requests] if ragged else None,
        most,
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)) if ragged else 0,
        draw(st.integers(0, 2**31)),
    )


def launched(step: Step, metadata: DecodeMetadata, tokens: int, ratio: int) -> None:
    """What the launcher passes, on tensors of the CPU, which the interpreter takes."""
    batch, capacity = metadata.batch, step.request.capacity
    assert metadata.ragged is not None
    PREPARE[(capacity.max_batch,)](
        batch.kv_lens, batch.query_lens, batch.block_table, metadata.ragged.query_indptr, step.table,
        step.kv_lens, step.query_indptr, step.states, metadata.status.words,
        batch.size, capacity.max_batch, tokens, capacity.max_query_tokens,
        min(batch.block_table.shape[1] * PAGE_SIZE, MAX_CONTEXT), batch.max_query_len, metadata.max_pages,
        batch.block_table.stride(0), step.width, PAGE_SIZE=PAGE_SIZE, RATIO=ratio, BLOCK=32, BLOCK_T=2,
    )  # fmt: skip


@settings(max_examples=max(settings().max_examples // 3, 10))
@given(step_cases(), st.sampled_from([1, 2, 4]))
def test_the_step_is_that_of_the_torch_twin(case: StepCase, ratio: int) -> None:
    request = case.request()
    if request.capacity.max_query_tokens == 0:
        return
    tokens = max(request.capacity.max_query_tokens - case.fewer, 0)
    steps = [Step(request, table=True, ratio=ratio) for _ in range(2)]
    statuses = [Status.allocate(torch.device("cpu")) for _ in range(2)]
    buffers = [DecodeBuffers(request.capacity, PAGE_SIZE, Needs(query_indptr=True), status) for status in statuses]
    described = [one.update(case.batch(), PAGES) for one in buffers]
    for step, metadata in zip(steps, described, strict=True):
        step.plan(metadata)
    q = torch.empty(tokens, HEADS, LATENT + 64)
    steps[0].fit(q)
    for buffer in steps[1].buffers:
        buffer.fill_(-7)
    launched(steps[1], described[1], tokens, ratio)
    for twin, written in zip(steps[0].buffers, steps[1].buffers, strict=True):
        assert torch.equal(twin, written)
    assert statuses[0].words.tolist() == statuses[1].words.tolist()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
def test_rows_are_finished_as_by_the_torch_twin(copied: bool, query_len: int) -> None:
    case = StepCase([20, 0, 7, 150, 2, 3], None, query_len, 2, 0, 5)
    request = case.request()
    step = Step(request, table=False, query_len=query_len, natural_per_unit=0.5)
    buffers = DecodeBuffers(request.capacity, PAGE_SIZE, Needs(query_indptr=True), Status.allocate(torch.device("cpu")))
    step.plan(buffers.update(case.batch(), PAGES))
    tokens, rng = 6 * query_len, torch.Generator().manual_seed(0)
    assert {0, 1, 2} <= set(step.states.tolist())
    theirs = torch.randn(6, HEADS, query_len, generator=rng)
    given_out = torch.randn(tokens, HEADS, LATENT, generator=rng).half()
    strides = (theirs.stride(0), theirs.stride(2), theirs.stride(1))
    their_out = given_out if copied else None
    results = []
    for kernel in (False, True):
        wide = torch.zeros(tokens, HEADS + 1, LATENT).half()
        out, lse = wide[:, 1:], torch.zeros(tokens, 2 * HEADS)[:, ::2]
        out.copy_(given_out)
        if kernel:
            FINISH[(tokens, 2)](
                step.states, their_out, theirs, out, lse, HEADS, query_len, 0.5,
                *strides, *out.stride()[:2], *lse.stride(), LATENT=LATENT, BLOCK_H=4,
            )  # fmt: skip
        else:
            step.finishing(copied, out, lse)(theirs, strides, their_out, out, lse)
        results.append((wide, lse))
    assert torch.equal(results[0][0].nan_to_num(77), results[1][0].nan_to_num(77))
    assert torch.equal(results[0][1].nan_to_num(77), results[1][1].nan_to_num(77))
