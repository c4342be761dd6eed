"""A prefill over cached context is the prefill over all keys, whatever the windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from portable_mla import CachedContext, mla_chunked_prefill
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.prefill import chunked as chunked_prefill
from portable_mla.prefill.cached_context import Window
from portable_mla.prefill.chunked import head_groups, token_bytes
from tests.contract.test_contract import same
from tests.support import prefill_cases
from tests.support.prefill_cases import PrefillCase, PrefillProblem, Result, build, offsets, prefill_targets, spans
from tests.support.targets import Target

CPU = Target("cpu", "cpu")
LATENT, PAGE = 512, 16
UNREAD_CELL = 2**31 - 1


@pytest.fixture(scope="session", params=prefill_targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that serves prefill, on every device of this machine."""
    value: Target = request.param
    return value


@dataclass(frozen=True)
class ChunkedProblem:
    """The new tokens of a prefill, its context in a cache, and the same with all keys expanded."""

    new: PrefillProblem
    context: CachedContext
    whole: PrefillProblem


def chunked(case: PrefillCase, device: str) -> ChunkedProblem:
    """kv_lens of the case are context and new tokens. Pages are shuffled, unread slots NaN, unread cells no page."""
    kv_lens = tuple(max(keys, queries) for queries, keys in zip(case.query_lens, case.kv_lens, strict=True))
    whole = build(replace(case, kv_lens=kv_lens, causal=True), device)
    rng = torch.Generator().manual_seed(case.seed)
    nope, rope, v_dim = case.geometry
    dtype, inputs = whole.inputs.q.dtype, whole.inputs
    w_uk = torch.randn(case.heads, nope, LATENT, generator=rng).mul(LATENT**-0.5).to(device, dtype)
    w_uv = torch.randn(case.heads, v_dim, LATENT, generator=rng).mul(LATENT**-0.5).to(device, dtype)
    lens = [keys - queries for queries, keys in zip(case.query_lens, kv_lens, strict=True)]
    pages = sum(-(-n // PAGE) for n in lens) + 1
    free = torch.randperm(pages, generator=rng).tolist()
    cache = torch.full((pages, PAGE, LATENT + rope), torch.nan, dtype=dtype, device=device)
    table = torch.full((len(lens), max(-(-n // PAGE) for n in lens) + 1), UNREAD_CELL, dtype=torch.int32)
    k_nope, k_pe, v = inputs.k_nope.clone(), inputs.k_pe.clone(), inputs.v.clone()
    fresh = []
    for index, (keys, n) in enumerate(zip(spans(kv_lens), lens, strict=True)):
        rows = torch.randn(n, LATENT + rope, generator=rng).to(device, dtype)
        old = slice(keys.start, keys.start + n)
        k_nope[old] = torch.einsum("kl,hnl->khn", rows[:, :LATENT], w_uk)
        v[old] = torch.einsum("kl,hvl->khv", rows[:, :LATENT], w_uv)
        k_pe[old] = rows[:, LATENT:]
        fresh += list(range(old.stop, keys.stop))
        for first in range(0, n, PAGE):
            page = free.pop()
            table[index, first // PAGE] = page
            cache[page, : min(PAGE, n - first)] = rows[first : first + PAGE]
    context = CachedContext(
        cache, table.to(device), torch.tensor(lens, dtype=torch.int32, device=device), max(lens), w_uk, w_uv
    )
    new = replace(whole, case=replace(whole.case, kv_lens=case.query_lens)).with_inputs(
        k_nope=k_nope[fresh], k_pe=k_pe[fresh], v=v[fresh], cu_seqlens_k=offsets(case.query_lens, device)
    )
    return ChunkedProblem(new, context, whole.with_inputs(k_nope=k_nope, k_pe=k_pe, v=v))


def run(target: Target, problem: ChunkedProblem, rows: int | None = None, **changes: Any) -> Result:
    """Chunked prefill in windows of so many context tokens."""
    inputs, bounds = problem.new.inputs, problem.new.arguments
    room = None if rows is None else token_bytes(inputs, problem.context) * rows
    return mla_chunked_prefill(
        inputs.q, inputs.k_nope, inputs.k_pe, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        changes.pop("context", problem.context),
        max_seqlen_q=bounds.max_seqlen_q, max_seqlen_k=bounds.max_seqlen_k, softmax_scale=problem.new.softmax_scale,
        workspace=None if room is None else torch.empty(room, dtype=torch.uint8, device=target.device),
        backend=target.backend, **changes,
    )  # fmt: skip


@st.composite
def chunks(draw: st.DrawFn) -> PrefillCase:
    """A prefill with context; on a GPU of few shapes."""
    length = st.one_of(st.sampled_from((0, 1, 15, 16, 17, 64, 129)), st.integers(0, 150))
    sequences = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    query_lens = tuple(queries for queries, _ in sequences)
    kv_lens = tuple(queries + context for queries, context in sequences)
    geometry = draw(st.sampled_from((prefill_cases.GEOMETRIES[0], prefill_cases.GEOMETRIES[-1])))
    dtype = draw(st.sampled_from(("bf16", "fp16")))
    return PrefillCase(
        query_lens, kv_lens, 2, geometry, dtype, padding=draw(st.integers(0, 2)), seed=draw(st.integers(0, 2**16))
    )


@given(case=chunks(), rows=st.one_of(st.none(), st.sampled_from((8, 24, 40, 64, 1000))), deterministic=st.booleans())
@example(case=PrefillCase((3, 70), (3, 70)), rows=8, deterministic=False)
@example(case=PrefillCase((1, 2, 3), (130, 2, 40)), rows=16, deterministic=False)
@example(case=PrefillCase((0, 5), (100, 90)), rows=1, deterministic=True)
def test_windows_of_any_size_give_the_prefill_over_all_keys(
    target: Target, case: PrefillCase, rows: int | None, deterministic: bool
) -> None:
    problem = chunked(case, target.device)
    out, lse = run(target, problem, rows, deterministic=deterministic)
    prefill_cases.check(problem.whole, out, lse)


@given(case=chunks(), seed=st.integers(0, 9))
def test_in_the_deterministic_mode_a_sequence_alone_has_the_bits_it_has_among_others(
    target: Target, case: PrefillCase, seed: int
) -> None:
    index = seed % len(case.kv_lens)
    problem = chunked(replace(case, padding=0), target.device)
    mine, context, inputs = spans(case.query_lens)[index], problem.context, problem.new.inputs
    one = slice(index, index + 1)
    lens = (case.query_lens[index],)
    alone = replace(problem.new, case=replace(case, query_lens=lens, kv_lens=lens)).with_inputs(
        q=inputs.q[mine], k_nope=inputs.k_nope[mine], k_pe=inputs.k_pe[mine], v=inputs.v[mine],
        cu_seqlens_q=offsets(lens, target.device), cu_seqlens_k=offsets(lens, target.device),
    )  # fmt: skip
    own = replace(
        context, block_table=context.block_table[one], lens=context.lens[one],
        max_len=case.kv_lens[index] - case.query_lens[index],
    )  # fmt: skip
    out, lse = run(target, problem, 32, deterministic=True)
    same((out[mine], lse[mine]), run(target, replace(problem, new=alone, context=own), 32, deterministic=True))


def test_heads_taken_in_groups_give_the_prefill_over_all_keys(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = chunked(PrefillCase((30, 70, 0), (130, 200, 40), heads=6), target.device)
    inputs, rows = problem.new.inputs, 16
    workspace = token_bytes(inputs, problem.context) * rows
    assert head_groups(inputs, problem.context, workspace, units=132) == 1
    monkeypatch.setattr(chunked_prefill, "_LEAST_WAVES", 0)  # as where a launch of one head fills the device
    monkeypatch.setattr(chunked_prefill, "_MOST_IDLE", 1.0)
    assert head_groups(inputs, problem.context, workspace, units=132) == 6
    prefill_cases.check(problem.whole, *run(target, problem, rows))


@pytest.mark.parametrize(
    ("tokens", "heads", "workspace", "groups"),
    [
        (4096, 128, 256, 8),  # 16 heads, 512 tiles: 3.9 waves
        (4096, 128, 1024, 4),  # no more than there were windows
        (4096, 128, 8192, 1),  # one window
        (4096, 16, 256, 1),
        (2816, 72, 256, 4),  # 18 heads, 396 tiles: 3 waves
        (2816, 56, 256, 1),  # 28 heads would be 4.7 waves
        (128, 128, 256, 1),
    ],
)
def test_heads_are_taken_in_as_many_groups_as_fill_the_device(
    tokens: int, heads: int, workspace: int, groups: int
) -> None:
    q = torch.empty(tokens, heads, 192, dtype=torch.bfloat16, device="meta")
    keys = torch.empty(tokens, heads, 128, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(heads, 128, LATENT, dtype=torch.bfloat16, device="meta")
    one = torch.empty(1, dtype=torch.int32, device="meta")
    context = CachedContext(q, one[None], one, 61440, weights, weights)
    inputs = PrefillInputs(q, keys, keys[:, 0, :64], keys, one, one)
    assert head_groups(inputs, context, workspace << 20, units=132) == groups


def test_the_callers_bound_of_all_tokens_changes_no_bit(target: Target) -> None:
    problem = chunked(PrefillCase((3, 9, 4), (100, 40, 20)), target.device)
    same(run(target, problem, 64), run(target, problem, 64, context=replace(problem.context, max_tokens=144)))


def test_without_a_workspace_the_environment_says_how_much_is_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = chunked(PrefillCase((3, 9), (100, 9000), geometry=prefill_cases.GEOMETRIES[0]), "cpu")
    windows: list[int] = []
    cut = CachedContext.windows

    def counted(self: CachedContext, rows: int, *, fixed: bool) -> Iterator[Window]:
        windows.append(rows)
        return cut(self, rows, fixed=fixed)

    monkeypatch.setattr(CachedContext, "windows", counted)
    for megabytes in ("16", "8192"):
        monkeypatch.setenv("PORTABLE_MLA_PREFILL_WORKSPACE", megabytes)
        run(CPU, problem)
    one_token = token_bytes(problem.new.inputs, problem.context)
    assert windows == [(16 << 20) // one_token // 8 * 8, 2 * 8992]  # a window never has more than the context


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_a_page_that_is_not_there_makes_its_sequence_nan_or_an_error(target: Target, bad: int) -> None:
    problem = chunked(PrefillCase((3, 9, 4), (100, 40, 20)), target.device)
    table = problem.context.block_table.clone()
    table[1, 0] = bad
    context = replace(problem.context, block_table=table)
    if target.device == "cpu":
        with pytest.raises(IndexError, match="block_table: request 1 column 0"):
            run(target, problem, 64, context=context)
        return
    out, lse = run(target, problem, 64, context=context)
    good, good_lse = run(target, problem, 64)
    assert bool(out[3:12].isnan().all() and lse[3:12].isnan().all())
    others = [*range(3), *range(12, 17)]
    same((out[others], lse[others]), (good[others], good_lse[others]))


@pytest.mark.gpu
def test_a_chunked_prefill_reads_no_length_on_the_host() -> None:
    target = Target("cuda", "triton")
    problem = chunked(PrefillCase((3, 9, 4), (100, 40, 20)), "cuda")
    first = run(target, problem, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(target, problem, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(first, again)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("w_uk", torch.zeros(3, 128, 100).bfloat16(), ValueError, r"w_uv: expected \(3, 128, 100\) of torch.bfloat16"),
        (
            "w_uv",
            torch.zeros(3, 64, LATENT).bfloat16(),
            ValueError,
            r"w_uv: expected \(3, 128, 512\) of torch.bfloat16",
        ),
        ("kv_cache", torch.zeros(9, PAGE, 200).bfloat16(), ValueError, "kv_cache: expected rows of 576"),
        ("kv_cache", torch.zeros(9, PAGE, 576), TypeError, "kv_cache: expected torch.bfloat16 like q, or an fp8"),
        ("lens", torch.zeros(3).int(), ValueError, r"kv_lens: expected \[2\] as block_table has rows, got 3"),
        ("max_len", 30, ValueError, r"lens: expected at most 30 \(max_len\), got 31"),
    ],
)
def test_a_wrong_part_of_a_context_is_named(field: str, value: Any, error: type[Exception], message: str) -> None:
    problem = chunked(PrefillCase((3, 9), (20, 40)), "cpu")
    changes: dict[str, Any] = {field: value}
    with pytest.raises(error, match=message):
        run(CPU, problem, context=replace(problem.context, **changes))


def workspace(size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """A workspace."""
    return torch.empty(size, dtype=dtype)


@pytest.mark.parametrize(
    ("given_workspace", "message"),
    [
        (workspace(100), "workspace: expected at least 2688 bytes, one context token, got 100"),
        (workspace(4000, torch.int8), "workspace: expected a dense uint8 vector, got shape"),
        (workspace(8000)[::2], "workspace: expected a dense uint8 vector, got shape"),
    ],
)
def test_a_wrong_workspace_is_named(given_workspace: Tensor, message: str) -> None:
    problem = chunked(PrefillCase((3, 9), (20, 40)), "cpu")
    i = problem.new.inputs
    with pytest.raises(ValueError, match=message):
        mla_chunked_prefill(
            i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k, problem.context,
            max_seqlen_q=9, max_seqlen_k=9, softmax_scale=0.1, workspace=given_workspace,
        )  # fmt: skip
