"""torch ops: opcheck, torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import Capacity, MLAAttention, MLAShape, PagedBatch, mla_decode
from portable_mla.core import cache_format
from tests.support.cases import Case, Problem, build

CASE = Case((33, 5, 17), dtype="fp32", garbage="zero")


def arguments(problem: Problem) -> tuple[Any, ...]:
    """Positional arguments of the op `decode`."""
    batch = problem.batch
    return (problem.q, problem.kv_cache, batch.block_table, batch.kv_lens, batch.query_lens, batch.max_query_len)


def planned(problem: Problem) -> MLAAttention:
    """An attention planned for the problem."""
    q, cache = problem.q, problem.kv_cache
    shape = MLAShape(q.shape[1], 512, 64, cache.shape[1], q.dtype, cache_format.cache_format_of(cache.dtype))
    capacity = Capacity(8, 64, problem.batch.max_query_len, 4096, 256)
    uniform = problem.batch.query_lens is None
    attention = MLAAttention(shape, capacity, device="cpu", uniform_queries=uniform)
    attention.plan(problem.batch)
    return attention


@pytest.mark.parametrize("query_lens", [None, (1, 0, 3)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_decode_passes_opcheck(query_lens: tuple[int, ...] | None, backend: str | None) -> None:
    problem = build(Case((33, 5, 17), dtype="fp32", query_lens=query_lens, max_query_len=3))
    args = (*arguments(problem), 0.1, 512, None, False, backend)
    torch.library.opcheck(torch.ops.portable_mla.decode.default, args)


def test_decode_out_passes_opcheck() -> None:
    problem = build(CASE)
    out, lse = torch.zeros(3, 4, 512), torch.zeros(3, 4)
    torch.library.opcheck(torch.ops.portable_mla.decode_out.default, (*arguments(problem), out, lse, 0.1, 512))


def test_decode_planned_passes_opcheck() -> None:
    problem = build(CASE)
    attention = planned(problem)
    args = (problem.q, problem.kv_cache, torch.zeros(3, 4, 512), torch.zeros(3, 4), attention._handle, 0.1)
    torch.library.opcheck(torch.ops.portable_mla.decode_planned.default, args)


def step(q: Tensor, kv_cache: Tensor, block_table: Tensor, kv_lens: Tensor) -> Tensor:
    """A model's use of the op, in both forms."""
    out, lse = mla_decode(q * 2, kv_cache, block_table, kv_lens, softmax_scale=0.1, latent_dim=512)
    into, lse_into = torch.empty_like(out), torch.empty_like(lse)
    mla_decode(q * 2, kv_cache, block_table, kv_lens, softmax_scale=0.1, latent_dim=512, out=into, lse=lse_into)
    return out.sum(-1) + lse + into.sum(-1) + lse_into


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_a_step_compiles_to_one_graph_for_any_batch(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=mode)
    for kv_lens in ((33, 5, 17), (1, 2, 3, 4, 5)):
        problem = build(Case(kv_lens, dtype="fp32"))
        inputs = (problem.q, problem.kv_cache, problem.batch.block_table, problem.batch.kv_lens)
        assert torch.allclose(compiled(*inputs), step(*inputs), rtol=1e-5, atol=1e-5)


def test_a_planned_call_compiles_and_follows_the_latest_plan() -> None:
    torch._dynamo.reset()
    problem, other = build(CASE), build(Case((9, 30, 2), dtype="fp32"))
    attention = planned(problem)
    compiled = torch.compile(lambda q, cache: attention(q + 0, cache, softmax_scale=0.1)[0] * 2, fullgraph=True)
    for one in (problem, other):
        attention.plan(one.batch)
        expected = attention(one.q, one.kv_cache, softmax_scale=0.1)[0] * 2
        assert torch.equal(compiled(one.q, one.kv_cache), expected)


def test_a_step_exports_with_a_dynamic_batch() -> None:
    class Step(torch.nn.Module):
        def forward(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, kv_lens: Tensor) -> Tensor:
            return step(q, kv_cache, block_table, kv_lens)

    problem = build(CASE)
    inputs = (problem.q, problem.kv_cache, problem.batch.block_table, problem.batch.kv_lens)
    batch = torch.export.Dim("batch", min=2, max=64)
    auto = torch.export.Dim.AUTO
    shapes = ({0: batch}, {0: auto}, {0: batch, 1: auto}, {0: batch})
    exported = torch.export.export(Step(), inputs, dynamic_shapes=shapes)
    assert "portable_mla.decode" in str(exported.graph)
    other = build(Case((9, 70, 2, 8, 1), dtype="fp32"))
    inputs = (other.q, other.kv_cache, other.batch.block_table, other.batch.kv_lens)
    assert torch.allclose(exported.module()(*inputs), step(*inputs), rtol=1e-5, atol=1e-5)


def test_a_plan_handle_dies_with_its_attention() -> None:
    problem = build(CASE)
    attention = planned(problem)
    handle = attention._handle
    del attention
    with pytest.raises(ValueError, match=f"handle of a living MLAAttention, got {handle}"):
        torch.ops.portable_mla.decode_planned(problem.q, problem.kv_cache, problem.q, problem.q, handle, 0.1)


def test_positions_ride_along_without_being_read() -> None:
    problem = build(CASE)
    batch = PagedBatch(problem.batch.block_table, problem.batch.kv_lens, positions=torch.arange(3))
    attention = planned(problem)
    attention.plan(batch)
    assert attention(problem.q, problem.kv_cache, softmax_scale=0.1)[0].shape == (3, 4, 512)
