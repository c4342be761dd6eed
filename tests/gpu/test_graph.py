"""CUDA and HIP graphs: what was captured once is right at any lengths, and nothing in a step waits for the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_mla import GraphCaptureError, MLAAttention, PagedBatch, Settings
from portable_mla.decode.arguments import DecodeArguments
from tests.support import acceptance
from tests.support.cases import UNREAD_CELL, Case, Problem, build
from tests.support.targets import Target

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
    if not target.has_kernels or target.backend == "flashinfer":
        pytest.skip(f"{target} reads lengths on the host")
    return target


def problems(query_lens: tuple[int, ...] | None, heads: int = 20, max_query_len: int = 3) -> list[Problem]:
    """The batches over tables of one width."""
    base = Case((), heads, page_size=64, query_lens=query_lens, max_query_len=max_query_len, content="needle")
    cases = [replace(base, kv_lens=kv_lens, seed=seed) for seed, kv_lens in enumerate(BATCHES)]
    widths = [build(case).batch.block_table.shape[1] for case in cases]
    return [
        build(replace(case, spare_columns=case.spare_columns + max(widths) - width), "cuda")
        for case, width in zip(cases, widths, strict=True)
    ]


def attention_for(problem: Problem, target: Target, **options: Any) -> MLAAttention:
    """An attention with the capacity of every batch."""
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale)
    request = arguments.request(deterministic=False)
    return MLAAttention(
        request.shape,
        request.capacity,
        device="cuda",
        uniform_queries=request.uniform_queries,
        backend=target.backend,
        **options,
    )


# Hopper's kernel has one program a part for 60 rows and two for 128, and twice as many where half the parts are idle.
@pytest.mark.parametrize(
    ("query_lens", "heads", "max_query_len"), [(None, 20, 3), ((1, 3, 0, 2), 20, 3), (None, 128, 1)]
)
def test_m20_a_captured_call_is_right_at_any_lengths(
    target: Target, query_lens: tuple[int, ...] | None, heads: int, max_query_len: int
) -> None:
    on_gpu(target)
    batches = problems(query_lens, heads, max_query_len)
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


def smaller(problem: Problem, requests: int, seed: int) -> PagedBatch:
    """The first requests of a problem, over a table of their own: another address, another stride."""
    batch = problem.batch
    wide = torch.full((requests, batch.block_table.shape[1] + seed), UNREAD_CELL, dtype=torch.int32, device="cuda")
    table = wide[:, : batch.block_table.shape[1]]
    table.copy_(batch.block_table[:requests])
    return PagedBatch(table, batch.kv_lens[:requests].clone(), None, batch.max_query_len)


@pytest.mark.parametrize("plan_too", [False, True], ids=["call", "whole step"])
def test_one_captured_graph_serves_every_smaller_batch(target: Target, plan_too: bool) -> None:
    on_gpu(target)
    problem = problems(None)[3]
    attend = attention_for(problem, target)
    q = problem.q.clone()
    out = torch.empty(*q.shape[:2], problem.latent_dim, dtype=q.dtype, device="cuda")
    lse = torch.empty(q.shape[:2], device="cuda")
    batch = smaller(problem, len(problem.kv_lens), 0)

    def step() -> None:
        if plan_too:
            attend.plan(batch)
        attend(q, problem.kv_cache, out, lse, softmax_scale=problem.softmax_scale)

    attend.plan(batch)
    step()
    expected = out.clone(), lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for requests in (4, 3, 1, 0, 2, 4):
        tokens = requests * problem.batch.max_query_len
        if plan_too:
            batch.kv_lens.copy_(problem.batch.kv_lens)
            batch.kv_lens[requests:] = 0
        else:
            attend.plan(smaller(problem, requests, requests))
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        acceptance.check(problem.first(requests), out[:tokens], lse[:tokens])
        assert not bool(out[tokens:].any())
        assert bool((lse[tokens:] == -torch.inf).all())
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    attend.check()


def test_a_cold_capture_is_refused_and_the_stream_goes_on(target: Target) -> None:
    on_gpu(target)
    problem = build(Case((33, 5), heads=7, page_size=64), "cuda")
    attend = attention_for(problem, target)
    with (
        pytest.raises(GraphCaptureError, match=r"Run plan\(batch\) and one call"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attend.plan(problem.batch)
    attend.plan(problem.batch)
    with pytest.raises(GraphCaptureError, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale)
    acceptance.check(problem, *attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))


def test_fresh_metadata_gives_the_same_bits_and_refuses_capture(target: Target) -> None:
    on_gpu(target)
    problem = problems((1, 3, 0, 2))[1]
    persistent = attention_for(problem, target)
    fresh = attention_for(problem, target, settings=Settings(persistent_metadata=False))
    results = []
    for attend in (persistent, fresh, fresh):
        attend.plan(problem.batch)
        results.append(attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
    with pytest.raises(GraphCaptureError, match="PERSISTENT_METADATA=0"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fresh.plan(problem.batch)


def test_nothing_is_compiled_for_another_width_batch_or_length(target: Target) -> None:
    on_gpu(target)
    if target.backend != "triton":
        pytest.skip(f"{target} compiles nothing with Triton")
    from portable_mla.metadata.split_plan.kernels.plan import plan_splits_kernel

    problem = problems(None)[4]
    attend = attention_for(problem, target)
    attend.plan(problem.batch)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in plan_splits_kernel.device_caches.values())

    before = compiled()
    for requests, width in itertools.product((1, 2, 4), (16, 32, 48)):
        table = problem.batch.block_table[:requests, :width].contiguous()
        attend.plan(PagedBatch(table, problem.batch.kv_lens[:requests].clamp(max=64 * width), None, 3))
    assert compiled() == before


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
