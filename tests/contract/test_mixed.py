"""Steps of decodes and prefills: split once, in slices, with the bits of separate steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from portable_mla import Capacity, MixedAttention, MixedSplit, MLAShape, PagedBatch, PlanMismatch
from portable_mla.core.cache_format import cache_format_of
from tests.contract.test_chunked_prefill import LATENT, PAGE, ChunkedProblem, chunked
from tests.contract.test_chunked_prefill import run as run_chunked
from tests.contract.test_contract import same
from tests.support import acceptance
from tests.support.cases import Case, Problem
from tests.support.cases import build as build_decode
from tests.support.prefill_cases import PrefillCase, prefill_targets
from tests.support.targets import Target

HEADS, ROPE = 3, 64
GEOMETRY = (128, ROPE, 128)  # and chunked()'s latents: what every backend serves
CAPACITY = Capacity(12, 600, 400, 1024, 400)


@pytest.fixture(scope="session", params=prefill_targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that serves prefill, on every device of this machine."""
    value: Target = request.param
    return value


@dataclass(frozen=True)
class Mixed:
    """A step, and its decodes and prefills as problems of their own."""

    batch: PagedBatch
    query_lens: tuple[int, ...]
    decode: Problem
    chunk: ChunkedProblem


def mixed(decodes: tuple[tuple[int, int], ...], prefills: tuple[tuple[int, int], ...], device: str, seed: int) -> Mixed:
    """Requests as (query_len, kv_len), decodes first. The prefills' pages come behind those of the decodes."""
    longest = max((n for n, _ in decodes), default=1)
    case = Case(
        tuple(n for _, n in decodes), HEADS, LATENT, ROPE, PAGE, query_lens=tuple(n for n, _ in decodes),
        max_query_len=max(longest, 1), seed=seed,
    )  # fmt: skip
    decode = build_decode(case, device)
    chunk = chunked(
        PrefillCase(
            tuple(n for n, _ in prefills), tuple(n for _, n in prefills), HEADS, GEOMETRY, padding=0, seed=seed
        ),
        device,
    )
    own, theirs = decode.batch.block_table, chunk.context.block_table
    width = max(own.shape[1], theirs.shape[1], *(-(-n // PAGE) for _, n in (*decodes, *prefills)))
    table = torch.full((len(decodes) + len(prefills), width), 2**31 - 1, dtype=torch.int32, device=device)
    table[: len(decodes), : own.shape[1]] = own
    moved = torch.where(theirs < 2**31 - 1, theirs + decode.kv_cache.shape[0], theirs)
    table[len(decodes) :, : moved.shape[1]] = moved
    kv_lens = torch.tensor([*(n for _, n in decodes), *(n for _, n in prefills)], dtype=torch.int32, device=device)
    query_lens = tuple(n for n, _ in (*decodes, *prefills))
    for request, (queries, keys) in enumerate(prefills, len(decodes)):  # pages that the new tokens will be written to
        table[request, -(-(keys - queries) // PAGE) : -(-keys // PAGE)] = 0
    batch = PagedBatch(
        table, kv_lens, torch.tensor(query_lens, dtype=torch.int32, device=device), max(query_lens, default=1)
    )
    cache = torch.cat([decode.kv_cache, chunk.context.kv_cache])
    decode = decode.with_cache(cache)
    context = replace(chunk.context, kv_cache=cache, block_table=moved)
    return Mixed(batch, query_lens, decode, replace(chunk, context=context))


def attention(target: Target, threshold: int, **changes: Any) -> MixedAttention:
    """With a capacity for every step of these tests."""
    dtype = torch.bfloat16
    shape = MLAShape(HEADS, LATENT, ROPE, PAGE, dtype, cache_format_of(dtype), GEOMETRY[0], GEOMETRY[2])
    backend = target.backend
    return MixedAttention(
        shape, CAPACITY, device=target.device, decode_threshold=threshold, backend=backend, **changes
    )  # fmt: skip


def attend(mixed_attention: MixedAttention, step: Mixed, *, with_context: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """Both parts of a planned step."""
    decode, new, context = step.decode, step.chunk.new, step.chunk.context
    rows = mixed_attention.split
    q = decode.q[rows.decode_rows]
    i, scale = new.inputs, decode.softmax_scale
    cached = mixed_attention.context(context.kv_cache, context.w_uk, context.w_uv, max_len=context.max_len)
    one = mixed_attention.decode(q, decode.kv_cache, softmax_scale=scale)
    two = mixed_attention.prefill(
        i.q, i.k_nope, i.k_pe, i.v, softmax_scale=new.softmax_scale, context=cached if with_context else None
    )
    return one, two


@given(
    decodes=st.lists(st.tuples(st.integers(0, 3), st.integers(3, 200)), max_size=4),
    prefills=st.lists(st.tuples(st.integers(4, 80), st.integers(0, 90)), max_size=3),
    with_context=st.booleans(),
    seed=st.integers(0, 99),
)
@example(decodes=[(1, 200), (3, 77)], prefills=[(70, 0), (33, 90)], with_context=True, seed=1)
@example(decodes=[], prefills=[(9, 3)], with_context=False, seed=1)
@example(decodes=[(2, 40)], prefills=[], with_context=True, seed=1)
def test_a_mixed_step_has_the_bits_of_separate_steps(
    target: Target, decodes: list[tuple[int, int]], prefills: list[tuple[int, int]], with_context: bool, seed: int
) -> None:
    several = tuple((n, n + context * with_context) for n, context in prefills)
    step = mixed(tuple(decodes), several or ((4, 4),), target.device, seed)
    if not several:
        first = len(decodes)
        b = step.batch
        assert b.query_lens is not None
        batch = PagedBatch(b.block_table[:first], b.kv_lens[:first], b.query_lens[:first], 3)
        step = replace(step, batch=batch, query_lens=step.query_lens[:first])
    mixing = attention(target, 3)
    mixing.plan(step.batch, step.query_lens)
    assert mixing.split == MixedSplit.of(step.query_lens, 3)
    assert mixing.split.decode_tokens == sum(n for n, _ in decodes)
    if decodes:
        one = mixing.decode(step.decode.q, step.decode.kv_cache, softmax_scale=step.decode.softmax_scale)
        acceptance.check(step.decode, *one)
        alone = attention(target, 3)
        d = step.decode
        assert d.batch.query_lens is not None
        alone.decodes.plan(PagedBatch(d.batch.block_table, d.batch.kv_lens, d.batch.query_lens, 3))
        same(one, alone.decodes(d.q, d.kv_cache, softmax_scale=d.softmax_scale))
    if several:
        _, two = attend(mixing, step, with_context=with_context)
        problem = step.chunk if with_context else without_context(step.chunk)
        same(two, run_chunked(target, problem))


def without_context(problem: ChunkedProblem) -> ChunkedProblem:
    """The new tokens alone."""
    nothing = replace(problem.context, lens=torch.zeros_like(problem.context.lens), max_len=0)
    return replace(problem, context=nothing)


def test_parts_are_slices_and_the_split_counts_tokens_not_requests() -> None:
    split = MixedSplit.of((2, 3, 1, 40, 9), 3)
    assert (split.decode_requests, split.decode_tokens, split.prefill_requests, split.prefill_tokens) == (3, 6, 2, 49)
    tokens = torch.arange(55)
    assert tokens[split.decode_rows].tolist() == list(range(6))
    assert tokens[split.prefill_rows].data_ptr() == tokens.data_ptr() + 6 * 8


def test_a_decode_after_a_prefill_is_named() -> None:
    with pytest.raises(ValueError, match="query_lens: request 2 has 1 query tokens and comes after a prefill"):
        MixedSplit.of((1, 40, 1), 1)


@pytest.mark.parametrize(
    ("query_lens", "error", "message"),
    [
        ((1, 40), ValueError, r"query_lens: expected the batch to have 2, one a request, got 3"),
        ((1, 2, 41), ValueError, r"query_lens: expected those of the batch, \[1, 2, 40\], got \[1, 2, 41\]"),
        ((1, 2, 400), PlanMismatch, "max_query_len: planned 300, got 400"),
    ],
)
def test_a_wrong_step_is_named(query_lens: tuple[int, ...], error: type[Exception], message: str) -> None:
    step = mixed(((1, 9), (2, 30)), ((40, 80),), "cpu", 0)
    dtype = torch.bfloat16
    shape = MLAShape(HEADS, LATENT, ROPE, PAGE, dtype, cache_format_of(dtype), GEOMETRY[0], GEOMETRY[2])
    mixing = MixedAttention(shape, replace(CAPACITY, max_query_len=300), device="cpu", decode_threshold=2)
    with pytest.raises(error, match=message):
        mixing.plan(step.batch, query_lens)


def test_a_call_before_a_plan_and_a_wrong_threshold_are_named() -> None:
    mixing = attention(Target("cpu", "cpu"), 2)
    with pytest.raises(PlanMismatch, match="plan: planned nothing, got a call"):
        _ = mixing.split
    with pytest.raises(ValueError, match=r"decode_threshold: expected 1 to 400 \(max_query_len\), got 0"):
        attention(Target("cpu", "cpu"), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_captured_mixed_step_is_right_at_any_lengths_of_as_many_rows(backend: str) -> None:
    target = Target("cuda", backend)
    if target not in prefill_targets():
        pytest.skip(f"{target} serves no prefills here")
    steps = [
        mixed(((1, 300), (3, 77), (2, 40)), ((90, 90), (60, 60)), "cuda", 1),
        mixed(((3, 10), (1, 400), (2, 2)), ((30, 30), (120, 120)), "cuda", 2),
        mixed(((2, 64),), ((150, 150),), "cuda", 3),
    ]
    mixing, first = attention(target, 3), steps[0]
    q = first.decode.q.clone()
    cache = torch.full((400, PAGE, LATENT + ROPE), torch.nan, dtype=q.dtype, device="cuda")
    i = first.chunk.new.inputs
    parts = [tensor.clone() for tensor in (i.q, i.k_nope, i.k_pe, i.v)]
    outs: list[tuple[Tensor, Tensor]] = []

    def step() -> None:
        scale = first.decode.softmax_scale
        outs[:] = [
            mixing.decode(q, cache, softmax_scale=scale),
            mixing.prefill(*parts, softmax_scale=first.chunk.new.softmax_scale),
        ]

    mixing.plan(first.batch, first.query_lens)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for later in steps:
        cache.fill_(torch.nan)
        cache[: later.decode.kv_cache.shape[0]] = later.decode.kv_cache
        q[: later.decode.tokens] = later.decode.q
        new = later.chunk.new.inputs
        for mine, theirs in zip(parts, (new.q, new.k_nope, new.k_pe, new.v), strict=True):
            mine[: len(theirs)] = theirs
        mixing.plan(later.batch, later.query_lens)
        graph.replay()
        (out, lse), two = outs
        tokens = later.decode.tokens
        acceptance.check(later.decode, out[:tokens], lse[:tokens])
        assert not bool(out[tokens:].any())
        rows = later.chunk.new.inputs.q.shape[0]
        same((two[0][:rows], two[1][:rows]), run_chunked(target, without_context(later.chunk)))
        assert not bool(two[0][rows:].any())
