"""CUDA and HIP graphs: what was captured once is right at any lengths, and nothing in a step waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from portable_mla import MLAAttention
from portable_mla.arguments import DecodeArguments
from tests import acceptance
from tests.cases import Case, Problem, build
from tests.targets import Target

pytestmark = pytest.mark.gpu

# One shape, table width and token count; other lengths, so other splits. The first is what gets captured.
BATCHES = ((1, 1, 1, 1), (300, 65, 1, 0), (0, 0, 0, 0), (5, 4000, 64, 63), (4000, 4000, 4000, 4000), (9, 8, 7, 6))


@contextmanager
def no_sync() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(target: Target) -> Target:
    """The target, if it promises to run in graphs."""
    if target.device == "cpu" or target.backend == "reference":
        pytest.skip(f"{target} reads lengths on the host")
    return target


def problems(query_lens: tuple[int, ...] | None) -> list[Problem]:
    """The batches over tables of one width."""
    widest = Case((4000,) * 4, heads=20, page_size=64, query_lens=query_lens, max_query_len=3, content="needle")
    width = build(widest).batch.block_table.shape[1]
    found = []
    for seed, kv_lens in enumerate(BATCHES):
        case = Case(kv_lens, 20, page_size=64, query_lens=query_lens, max_query_len=3, content="needle", seed=seed)
        spare = width - build(case).batch.block_table.shape[1] + case.spare_columns
        found.append(build(Case(**{**vars(case), "spare_columns": spare}), "cuda"))
    return found


def attention_for(problem: Problem, target: Target) -> MLAAttention:
    """An attention with the capacity of every batch."""
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale)
    request = arguments.request(deterministic=False)
    return MLAAttention(
        request.shape,
        request.capacity,
        device="cuda",
        uniform_queries=request.uniform_queries,
        backend=target.backend,
    )


@pytest.mark.parametrize("query_lens", [None, (1, 3, 0, 2)])
def test_m20_a_captured_call_is_right_at_any_lengths(target: Target, query_lens: tuple[int, ...] | None) -> None:
    on_gpu(target)
    batches = problems(query_lens)
    largest = max(batches, key=lambda problem: problem.kv_cache.shape[0])
    attend, first = attention_for(largest, target), batches[0]
    q, batch = first.q.clone(), first.batch
    cache = torch.full_like(largest.kv_cache, torch.nan)
    out = torch.empty(*q.shape[:2], first.latent_dim, dtype=q.dtype, device="cuda")
    lse = torch.empty(q.shape[:2], device="cuda")
    attend.plan(batch)
    attend(q, cache, out, lse, softmax_scale=first.softmax_scale)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(q, cache, out, lse, softmax_scale=first.softmax_scale)
    for problem in batches:
        q.copy_(problem.q)
        cache.fill_(torch.nan)
        cache[: problem.kv_cache.shape[0]] = problem.kv_cache
        batch.block_table.copy_(problem.batch.block_table)
        batch.kv_lens.copy_(problem.batch.kv_lens)
        attend.plan(batch)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        acceptance.check(problem, out, lse)
        replayed = out.clone(), lse.clone()
        attend(q, cache, out, lse, softmax_scale=problem.softmax_scale)
        assert torch.equal(out, replayed[0])
        assert torch.equal(lse, replayed[1])


def test_neither_plan_nor_call_waits_for_the_device(target: Target) -> None:
    on_gpu(target)
    problem = problems((1, 3, 0, 2))[1]
    attend = attention_for(problem, target)
    out = torch.empty(*problem.q.shape[:2], problem.latent_dim, dtype=problem.q.dtype, device="cuda")
    lse = torch.empty(problem.q.shape[:2], device="cuda")
    attend.plan(problem.batch)
    attend(problem.q, problem.kv_cache, out, lse, softmax_scale=problem.softmax_scale)
    with no_sync():
        attend.plan(problem.batch)
        before = torch.cuda.memory_allocated()
        attend(problem.q, problem.kv_cache, out, lse, softmax_scale=problem.softmax_scale)
        assert torch.cuda.memory_allocated() == before
    acceptance.check(problem, out, lse)


def test_two_attentions_on_two_streams_do_not_meet(target: Target) -> None:
    on_gpu(target)
    batches = problems(None)[3:5]
    streams = [torch.cuda.Stream() for _ in batches]
    attentions = [attention_for(problem, target) for problem in batches]
    torch.cuda.synchronize()
    results = []
    for _ in range(5):
        for problem, stream, attend in zip(batches, streams, attentions, strict=True):
            with torch.cuda.stream(stream):
                attend.plan(problem.batch)
                results.append((problem, attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale)))
    torch.cuda.synchronize()
    for problem, (out, lse) in results:
        acceptance.check(problem, out, lse)
