"""Lengths and page ids out of range: NaN rows and a status word on a GPU; an error at once on a CPU and under debug."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla import Capacity, GraphCaptureError, MLAAttention, PagedBatch, Settings
from portable_mla.decode.arguments import DecodeArguments
from tests.support import acceptance
from tests.support.cases import UNREAD_CELL, Case, Problem, build
from tests.support.targets import Target

CASE = Case((33, 5, 70), heads=5, page_size=16, query_lens=(1, 2, 3), max_query_len=4)


def attention_for(problem: Problem, target: Target, settings: Settings | None = None) -> MLAAttention:
    """An attention for ragged batches with the problem's capacity."""
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale)
    request = arguments.request(deterministic=False)
    return MLAAttention(
        request.shape, request.capacity, device=target.device, uniform_queries=False, backend=target.backend,
        settings=settings or Settings(),
    )  # fmt: skip


def with_page(problem: Problem, request: int, page: int) -> Problem:
    """The problem with another first page of one request."""
    table = problem.batch.block_table.clone()
    table[request, 0] = page
    return problem.with_table(table)


def on_gpu(target: Target) -> Target:
    """Targets whose kernels look at the values themselves."""
    if not target.has_kernels:
        pytest.skip(f"{target} reads values on the host")
    return target


@pytest.mark.parametrize("page", [-1, UNREAD_CELL, 10_000])
@pytest.mark.parametrize("deterministic", [False, True], ids=["free", "fixed"])
def test_a_page_that_is_not_there_makes_its_rows_nan_and_no_other(
    target: Target, page: int, deterministic: bool
) -> None:
    on_gpu(target)
    if not target.accepts(CASE, deterministic=deterministic):
        pytest.skip(f"{target} refuses deterministic={deterministic}")
    problem = build(CASE, target.device)
    attend = attention_for(problem, target, Settings(deterministic=deterministic))
    bad = with_page(problem, 1, page)
    attend.plan(bad.batch)
    out, lse = attend(bad.q, bad.kv_cache, softmax_scale=bad.softmax_scale)
    rows = slice(1, 3)
    assert bool(out[rows].isnan().all())
    assert bool(lse[rows].isnan().all())
    golden, golden_lse = target.golden(with_page(problem, 1, 0))
    for mine in (slice(0, 1), slice(3, 6)):
        assert bool(torch.isfinite(out[mine]).all())
        assert torch.allclose(lse[mine].double(), golden_lse[mine], atol=1e-3, rtol=0)
        error = (out[mine].double() - golden[mine]).norm() / golden[mine].norm()
        assert error <= acceptance.ROW_RMS[out.dtype]
    with pytest.raises(IndexError, match=f"block_table: request 1: expected a page in .*, got {page}. Rows that need"):
        attend.check()
    attend.check()


def test_faults_outlive_the_steps_until_somebody_asks(target: Target) -> None:
    on_gpu(target)
    problem = build(CASE, target.device)
    attend = attention_for(problem, target)
    for page in (UNREAD_CELL, 0, -1):
        attend.plan(with_page(problem, 2, page).batch)
    attend.plan(problem.batch)
    acceptance.check(problem, *attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))
    with pytest.raises(IndexError, match="request 2"):
        attend.check()


def test_queries_that_q_does_not_have_are_reported_and_touch_nothing(target: Target) -> None:
    on_gpu(target)
    problem = build(CASE, target.device)
    attend = attention_for(problem, target)
    attend.plan(problem.batch)
    out = torch.full((6, *problem.q.shape[1:2], problem.latent_dim), 7.0, device=target.device).bfloat16()
    lse = torch.full((6, 5), 7.0, device=target.device)
    attend(problem.q[:4], problem.kv_cache, out[:4], lse[:4], softmax_scale=problem.softmax_scale)
    assert bool((out[4:] == 7).all())
    assert bool((lse[4:] == 7).all())
    with pytest.raises(
        IndexError, match="query_lens: request 2: its query tokens end at [56], past q or past max_query_tokens 6"
    ):
        attend.check()


def test_debug_raises_at_the_plan_even_on_a_gpu(target: Target) -> None:
    problem = build(CASE, target.device)
    attend = attention_for(problem, target, Settings(debug=True))
    with pytest.raises(IndexError, match=r"block_table: request 1 column 0: expected a page in \[0, .*got -5"):
        attend.plan(with_page(problem, 1, -5).batch)
    with pytest.raises(ValueError, match="kv_lens: request 0: expected 0 to"):
        attend.plan(replace(problem.batch, kv_lens=problem.batch.kv_lens + 10_000))
    attend.plan(problem.batch)
    acceptance.check(problem, *attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))


def test_a_cache_smaller_than_the_capacity_limits_the_pages(target: Target) -> None:
    problem = build(CASE, target.device)
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale)
    request = arguments.request(deterministic=False)
    capacity = replace(request.capacity, max_pages=20_000)
    attend = MLAAttention(
        request.shape, capacity, device=target.device, uniform_queries=False, backend=target.backend
    )  # fmt: skip
    bad = with_page(problem, 1, problem.kv_cache.shape[0])
    attend.plan(bad.batch)
    expected = f"got {problem.kv_cache.shape[0]}"
    if target.device == "cpu":
        with pytest.raises(IndexError, match=expected):
            attend(bad.q, bad.kv_cache, softmax_scale=bad.softmax_scale)
        return
    on_gpu(target)
    out, _ = attend(bad.q, bad.kv_cache, softmax_scale=bad.softmax_scale)
    assert bool(out[1:3].isnan().all())
    with pytest.raises(IndexError, match=expected):
        attend.check()


@pytest.mark.parametrize(
    ("batch", "heads", "context"), [(256, 16, 1 << 17), (256, 16, 1 << 20), (8, 128, 4096)], ids=str
)
def test_memory_is_bounded_whatever_the_context(batch: int, heads: int, context: int) -> None:
    pytest.importorskip("triton", reason="needs the package triton")
    from portable_mla import arch_named
    from portable_mla.dispatch.select import load
    from portable_mla.metadata import DecodeBuffers, Status

    problem = build(Case((1,), heads=heads, page_size=64))
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale)
    capacity = Capacity(batch, batch, 1, context, 1 << 20)
    request = replace(arguments.request(False), arch=arch_named("sm90"), capacity=capacity)
    backend = load("triton", "nvidia")
    assert backend.bind(request).memory()["split partials"] <= 64 << 20
    fixed = replace(request, deterministic=True)
    pieces = min(64, context // 512)
    expected = batch * pieces * heads * 514 * 4 if heads == 16 else 8 * 8 * 128 * 514 * 4
    assert backend.bind(fixed).memory()["split partials"] == expected
    buffers = DecodeBuffers(capacity, 64, backend.needs(request), Status.allocate(torch.device("cpu")))
    assert list(buffers.tensors()) == ["split plan"]
    assert sum(tensor.nbytes for tensor in buffers.tensors()["split plan"]) <= 64 << 10


def test_a_backend_that_reads_the_host_is_refused_in_a_capture(target: Target) -> None:
    if target.device == "cpu" or target.backend != "reference":
        pytest.skip(f"{target} is not a host reader on a GPU")
    problem = build(CASE, target.device)
    attend = attention_for(problem, target)
    attend.plan(problem.batch)
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(GraphCaptureError, match="the backend reference reads lengths on the host"),
        torch.cuda.graph(graph),
    ):
        attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale)


def test_an_empty_batch_is_planned_too(target: Target) -> None:
    problem = build(CASE, target.device)
    attend = attention_for(problem, target)
    attend.plan(problem.batch)
    none = problem.batch.kv_lens[:0]
    attend.plan(PagedBatch(problem.batch.block_table[:0], none, none, 4))
    out, lse = attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale)
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())
