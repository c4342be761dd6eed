"""MLAAttention: plan once a step, call once a layer, and nothing that does not fit the plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from portable_mla import CacheFormat, Capacity, MLAAttention, MLAShape, NoBackend, PagedBatch, PlanMismatch
from tests.support import acceptance
from tests.support.cases import Case, build
from tests.support.targets import Target

SHAPE = MLAShape(4, 512, 64, 16, torch.bfloat16, CacheFormat.bf16)
CAPACITY = Capacity(8, 32, 4, 4096, 4096)


def attention(device: str = "cpu", **options: Any) -> MLAAttention:
    """An attention for ragged batches of `SHAPE`."""
    shape, capacity = options.pop("shape", SHAPE), options.pop("capacity", CAPACITY)
    return MLAAttention(shape, capacity, device=device, **{"uniform_queries": False, **options})


def test_one_plan_serves_every_layer_and_a_new_plan_every_step(target: Target) -> None:
    attend = attention(target.device, backend=target.backend)
    for step, kv_lens in enumerate(((33, 5, 17), (34, 6, 18), (9,), (0, 300, 64, 1))):
        for layer in range(2):
            problem = build(Case(kv_lens, seed=10 * step + layer), target.device)
            if layer == 0:
                attend.plan(problem.batch)
            same_batch = dataclasses.replace(problem, batch=problem.batch)
            attend.plan(same_batch.batch)
            acceptance.check(problem, *attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))


def test_layers_share_a_plan(target: Target) -> None:
    problem = build(Case((33, 5, 17)), target.device)
    attend = attention(target.device, backend=target.backend)
    attend.plan(problem.batch)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        cache = torch.randn(problem.kv_cache.shape, generator=rng).to(problem.kv_cache)
        layer = problem.with_cache(cache)
        acceptance.check(layer, *attend(layer.q, layer.kv_cache, softmax_scale=layer.softmax_scale))


def test_it_says_which_backend_serves_and_why() -> None:
    assert attention().backend == "cpu"
    assert "reference: supported" in str(attention().explanation)
    assert attention(backend="reference").backend == "reference"
    with pytest.raises(NoBackend, match="not registered for cpu"):
        attention(backend="triton")


def test_uniform_attention_refuses_ragged_batches() -> None:
    problem = build(Case((33, 5), query_lens=(1, 2), max_query_len=4))
    with pytest.raises(PlanMismatch, match="query_lens: planned None, got a tensor.*uniform_queries=False"):
        attention(uniform_queries=True).plan(problem.batch)


def test_uniform_attention_refuses_another_query_length() -> None:
    with pytest.raises(PlanMismatch, match="max_query_len: planned 4, got 1"):
        attention(uniform_queries=True).plan(build(Case((33, 5))).batch)


def test_a_call_before_any_plan_is_refused() -> None:
    problem = build(Case((33,)))
    with pytest.raises(PlanMismatch, match=r"Call plan\(batch\) first"):
        attention()(problem.q, problem.kv_cache, softmax_scale=1.0)


@pytest.mark.parametrize("field", ["kv_lens", "block_table"])
def test_a_plan_is_stale_once_its_tensors_change_in_place(field: str) -> None:
    problem = build(Case((33, 5)))
    attend = attention()
    attend.plan(problem.batch)
    attend(problem.q, problem.kv_cache, softmax_scale=1.0)
    getattr(problem.batch, field)[0] -= 1
    with pytest.raises(PlanMismatch, match=r"changed tensors. Call plan\(batch\) after"):
        attend(problem.q, problem.kv_cache, softmax_scale=1.0)


@pytest.mark.parametrize(
    ("case", "field"),
    [(Case((1,) * 9), "max_batch"), (Case((9,), max_query_len=5), "max_query_len"), (Case((5000,)), "max_context")],
)
def test_a_batch_beyond_the_capacity_is_refused(case: Case, field: str) -> None:
    with pytest.raises(PlanMismatch, match=f"{field}: planned .*more capacity"):
        attention().plan(build(case).batch)


def test_more_query_tokens_than_planned_are_refused() -> None:
    problem = build(Case((9, 9), max_query_len=2))
    with pytest.raises(PlanMismatch, match="max_query_tokens: planned 3, got 4"):
        attention(capacity=dataclasses.replace(CAPACITY, max_query_tokens=3)).plan(problem.batch)


@pytest.mark.parametrize(
    ("case", "field"),
    [
        (Case((33,), heads=5), "heads: planned 4, got 5"),
        (Case((33,), rope_dim=32), r"latent \+ rope: planned 576, got 544"),
        (Case((33,), dtype="fp16"), "q dtype: planned torch.bfloat16, got torch.float16"),
        (Case((33,), page_size=64), "page_size: planned 16, got 64"),
        (Case((33, 3)), "query tokens: planned 1, got 2"),
    ],
)
def test_tensors_that_do_not_fit_the_plan_are_refused(case: Case, field: str) -> None:
    attend, other = attention(), build(case)
    attend.plan(build(Case((33,))).batch)
    with pytest.raises(PlanMismatch, match=field):
        attend(other.q, other.kv_cache, softmax_scale=1.0)


def test_other_tensors_at_an_address_that_was_served_are_checked_anew() -> None:
    problem, attend = build(Case((33, 5))), attention()
    attend.plan(problem.batch)
    attend(problem.q, problem.kv_cache, softmax_scale=1.0)
    with pytest.raises(PlanMismatch, match="heads: planned 4, got 8"):
        attend(problem.q.view(1, 8, 576), problem.kv_cache, softmax_scale=1.0)
    with pytest.raises(ValueError, match="kv_cache: expected a last-dimension stride of 1"):
        attend(problem.q, problem.kv_cache.transpose(1, 2), softmax_scale=1.0)
    out, lse = attend(problem.q, problem.kv_cache, softmax_scale=1.0)
    with pytest.raises(ValueError, match="out: shares memory with lse"):
        attend(problem.q, problem.kv_cache, out, out.view(torch.float32).flatten()[:8].view(2, 4), softmax_scale=1.0)
    with pytest.raises(TypeError, match="out: expected torch.bfloat16, got torch.float16"):
        attend(problem.q, problem.kv_cache, out.view(torch.float16), lse, softmax_scale=1.0)


def test_a_scale_is_given_exactly_where_the_cache_has_one() -> None:
    problem, attend = build(Case((33,))), attention()
    attend.plan(problem.batch)
    with pytest.raises(ValueError, match="kv_scale: expected None for a bf16 cache"):
        attend(problem.q, problem.kv_cache, softmax_scale=1.0, kv_scale=1.0)
    scaled = attention(shape=dataclasses.replace(SHAPE, cache_format=CacheFormat.fp8_e4m3))
    scaled.plan(problem.batch)
    with pytest.raises(ValueError, match="kv_scale required for fp8 caches"):
        scaled(problem.q, problem.kv_cache.to(torch.float8_e4m3fn), softmax_scale=1.0)


def test_lengths_in_inference_tensors_serve_without_versions() -> None:
    with torch.inference_mode():
        problem = build(Case((33, 5)))
    attend = attention()
    attend.plan(problem.batch)
    acceptance.check(problem, *attend(problem.q, problem.kv_cache, softmax_scale=problem.softmax_scale))


def test_an_empty_batch_gives_empty_results() -> None:
    attend = attention()
    attend.plan(PagedBatch(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)))
    out, lse = attend(torch.zeros(0, 4, 576).bfloat16(), torch.zeros(1, 16, 576).bfloat16(), softmax_scale=1.0)
    assert (out.shape, lse.shape) == ((0, 4, 512), (0, 4))


def test_lengths_that_change_in_inference_mode_are_noticed_in_host_memory() -> None:
    problem = build(Case((33, 5)))
    with torch.inference_mode():
        lens = problem.batch.kv_lens.clone()
        attend = attention()
        attend.plan(PagedBatch(problem.batch.block_table, lens))
        attend(problem.q, problem.kv_cache, softmax_scale=0.1)
        lens.sub_(1)
        with pytest.raises(PlanMismatch, match="batch: planned the tensors as they were, got changed tensors"):
            attend(problem.q, problem.kv_cache, softmax_scale=0.1)


def test_a_plan_that_fails_keeps_the_step_before() -> None:
    problem = build(Case((33, 5)))
    attend = attention()
    attend.plan(problem.batch)
    expected, _ = attend(problem.q, problem.kv_cache, softmax_scale=0.1)
    bad = dataclasses.replace(problem.batch, block_table=torch.full_like(problem.batch.block_table, 5000))
    with pytest.raises(IndexError, match="block_table: request 0"):
        attend.plan(bad)
    assert torch.equal(attend(problem.q, problem.kv_cache, softmax_scale=0.1)[0], expected)


def test_the_backend_that_is_bound_is_the_one_that_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from portable_mla import select
    from portable_mla.dispatch import select as dispatch

    assert attention().backend == "cpu"
    monkeypatch.setattr(
        dispatch, "_reasons", lambda name, request, chosen: ("gone",) if name == "cpu" else ()
    )  # as a library that disappears
    attend = attention()
    select.cache_clear()
    assert attend.backend == "reference" and type(attend._backend).__module__.endswith("reference")
