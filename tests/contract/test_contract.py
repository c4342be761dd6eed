"""Metamorphic properties that every backend must have, whatever its tiles and splits.

Bitwise where the arithmetic must not change, else by the acceptance rule. Numbers M1 .. M24 are the catalogue's.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import assume, event, example, given, note
from hypothesis import strategies as st
from torch import Tensor

from portable_mla import PagedBatch
from tests.support import acceptance
from tests.support.acceptance import ROW_RMS
from tests.support.cases import UNREAD_CELL, Case, Problem
from tests.support.strategies import cases
from tests.support.targets import Target

GARBAGE = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf, "hot": 77.0}


def accepted(target: Target, case: Case) -> Problem:
    """The case's problem, if the backend serves it; leaves a repro line in a failure's report."""
    note(case.repro())
    assume(target.accepts(case))
    event(f"{target} {case.content}")
    return target.build(case)


def valid_slots(problem: Problem) -> Tensor:
    """[pages, page_size] bool: slots that some request may read."""
    pages, page_size = problem.kv_cache.shape[:2]
    valid = torch.zeros(pages * page_size, dtype=torch.bool, device=problem.q.device)
    for request, kv_len in enumerate(problem.kv_lens):
        token = torch.arange(kv_len, device=valid.device)
        page = problem.batch.block_table[request].long()[token // page_size]
        valid[page * page_size + token % page_size] = True
    return valid.view(pages, page_size)


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Bitwise equality of out and lse."""
    assert torch.equal(one[0], other[0]), f"out differs by {(one[0] - other[0]).abs().max()}"
    assert torch.equal(one[1], other[1]), f"lse differs by {(one[1] - other[1]).abs().max()}"


@given(case=cases())
@example(case=Case((0,)))
@example(case=Case((0, 17, 0, 300), content="needle"))
@example(case=Case((5, 0), query_lens=(2, 0), max_query_len=2, padding=1))
@example(case=Case((9, 64, 33), query_lens=(1, 8, 1), max_query_len=8, padding=3))
@example(case=Case((3, 1), max_query_len=8))
@example(case=Case((1000, 130, 777), page_size=64, content="split_skew"))
@example(case=Case((257,), page_size=544, content="neg_extreme"))
@example(case=Case((128, 129), content="needle", garbage="hot", dtype="fp16"))
def test_every_result_obeys_the_acceptance_rule(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    acceptance.check(problem, *target.run(problem))


@given(case=cases())
def test_m1_relocating_pages_changes_no_bit(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    pages = problem.kv_cache.shape[0]
    where = torch.randperm(pages, generator=torch.Generator().manual_seed(case.seed + 1)).to(problem.q.device)
    moved = torch.empty_like(problem.kv_cache)
    moved[where] = problem.kv_cache
    table = problem.batch.block_table.clone()
    table[table != UNREAD_CELL] = where[table[table != UNREAD_CELL].long()].int()
    same(target.run(problem), target.run(problem.with_cache(moved).with_table(table)))


@given(case=cases(), garbage=st.sampled_from(sorted(GARBAGE)))
@example(case=Case((17, 1, 0)), garbage="nan")
def test_m2_unread_slots_never_reach_an_output(target: Target, case: Case, garbage: str) -> None:
    problem = accepted(target, case)
    unread = ~valid_slots(problem)[..., None]
    same(target.run(problem), target.run(problem.with_cache(problem.kv_cache.masked_fill(unread, GARBAGE[garbage]))))


@given(case=cases(), cell=st.sampled_from((0, -1, 5, -(2**31), UNREAD_CELL)))
def test_m3_unread_table_cells_are_never_read(target: Target, case: Case, cell: int) -> None:
    problem = accepted(target, case)
    table = problem.batch.block_table
    same(target.run(problem), target.run(problem.with_table(table.masked_fill(table == UNREAD_CELL, cell))))


@given(case=cases(contents=("iid", "needle"), max_query_len=1))
def test_m4_order_of_tokens_within_a_request_does_not_matter(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    moved, page_size = problem.kv_cache.clone(), case.page_size
    for request, kv_len in enumerate(case.kv_lens):
        token = torch.arange(kv_len, device=moved.device)
        page = problem.batch.block_table[request].long()[token // page_size]
        moved[page, token % page_size] = moved[page, token % page_size].flip(0)
    golden = target.golden(problem)
    acceptance.compare(problem, *target.run(problem.with_cache(moved)), *golden)


@given(case=cases(contents=("iid", "needle", "split_skew"), max_query_len=1, min_kv_len=2), cut=st.floats(0.01, 0.99))
def test_m6_chunks_merged_by_lse_are_the_whole(target: Target, case: Case, cut: float) -> None:
    problem, chunks = chunked(target, case, cut)
    parts = [target.run(chunk) for chunk in chunks]
    out, lse = merge(*parts)
    golden, golden_lse = target.golden(problem)
    assert ((lse - golden_lse).abs() <= 2 * (1e-4 + 2e-6 * golden_lse.abs())).all()
    error = (out - golden).square().mean(-1).sqrt()
    scale = golden.square().mean(-1).sqrt().clamp_min(2**-8 * acceptance.value_rms(problem))
    weight = sum((torch.exp(part[1].double() - golden_lse) * rms(part[0]) for part in parts), torch.zeros_like(lse))
    # Each partial was rounded to q's dtype before the merge, in proportion to its own size.
    assert (error <= ROW_RMS[problem.q.dtype] * torch.maximum(scale, weight)).all()


@given(case=cases(max_query_len=4))
def test_m8_permuting_requests_permutes_results(target: Target, case: Case) -> None:
    problem = accepted(target, replace(case, query_lens=None, padding=0))
    n = case.max_query_len
    order = torch.randperm(len(case.kv_lens), generator=torch.Generator().manual_seed(case.seed))
    tokens = (order[:, None] * n + torch.arange(n)).flatten().to(problem.q.device)
    where = order.to(problem.q.device)
    table, lens = problem.batch.block_table[where], problem.batch.kv_lens[where]
    permuted = replace(
        problem,
        q=problem.q[tokens],
        batch=PagedBatch(table, lens, None, n),
        kv_lens=tuple(case.kv_lens[i] for i in order.tolist()),
    )
    golden, golden_lse = target.golden(problem)
    acceptance.compare(permuted, *target.run(permuted), golden[tokens], golden_lse[tokens])


# Not in fp16, where doubling a result below the smallest normal number is not exact.
@given(case=cases(dtypes=("bf16", "fp32"), contents=("iid", "exact_grid"), rope=True))
def test_m9_output_is_linear_in_the_latent(target: Target, case: Case) -> None:
    problem = without_latent_query(accepted(target, case))
    doubled = problem.kv_cache.clone()
    doubled[..., : case.latent_dim] *= 2
    out, lse = target.run(problem)
    twice, same_lse = target.run(problem.with_cache(doubled))
    assert torch.equal(out * 2, twice)
    assert torch.equal(lse, same_lse)


@given(case=cases(contents=("exact_grid",), rope=True))
def test_m9_outputs_of_two_latents_add(target: Target, case: Case) -> None:
    problem = without_latent_query(accepted(target, replace(case, garbage="zero")))
    latent = torch.zeros_like(problem.kv_cache)
    latent[..., : case.latent_dim] = problem.kv_cache[..., : case.latent_dim].roll(1, dims=2)
    other = problem.kv_cache.clone()
    other[..., : case.latent_dim] = latent[..., : case.latent_dim]
    one, two, both = (
        target.run(problem.with_cache(c))[0] for c in (problem.kv_cache, other, problem.kv_cache + latent)
    )
    error = rms(one.double() + two.double() - both.double())
    assert (error <= ROW_RMS[problem.q.dtype] * (rms(one) + rms(two) + rms(both) + 2**-8)).all()


@given(case=cases(contents=("exact_grid",), rope=True, max_query_len=3))
def test_m10_shifting_every_rope_key_shifts_lse_alone(target: Target, case: Case) -> None:
    problem = accepted(target, replace(case, garbage="zero"))
    shift = torch.randint(-4, 5, (case.rope_dim,), generator=torch.Generator().manual_seed(case.seed)) / 8
    shifted = problem.kv_cache.clone()
    shifted[..., case.latent_dim :] += shift.to(shifted)
    out, lse = target.run(problem)
    moved_out, moved_lse = target.run(problem.with_cache(shifted))
    by = (problem.q[..., case.latent_dim :].double() @ shift.to(problem.q.device).double()) * problem.softmax_scale
    seen = lse != -torch.inf
    assert torch.equal(seen, moved_lse != -torch.inf)
    assert ((moved_lse - lse - by)[seen].abs() <= 2e-4 + 4e-6 * (lse.abs() + by.abs())[seen]).all()
    assert (rms(out - moved_out) <= 2 * ROW_RMS[problem.q.dtype] * (rms(out) + 2**-8)).all()


@given(case=cases(contents=("iid", "fingerprint")))
def test_m11_a_zero_query_averages_what_it_sees(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    problem = problem.with_q(torch.zeros_like(problem.q))
    _, lse = target.run(problem)
    token = 0
    for kv_len, query_len in zip(problem.kv_lens, problem.query_lens, strict=True):
        for index in range(query_len):
            visible = max(0, kv_len - query_len + index + 1)
            expected = torch.tensor(float(visible), device=lse.device).log()
            assert ((lse[token] - expected).abs() <= 1e-4).all() or visible == 0
            token += 1
    acceptance.check(problem, *target.run(problem))


@given(case=cases())
def test_m12_outputs_lie_between_the_values_seen(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    out, _ = target.run(problem)
    token = 0
    for request, (kv_len, query_len) in enumerate(zip(problem.kv_lens, problem.query_lens, strict=True)):
        rows = acceptance.logical_rows(problem, problem.batch.block_table[request], kv_len)
        mine = out[token : token + query_len]
        token += query_len
        for index in range(query_len):
            value = rows[: max(0, kv_len - query_len + index + 1), : problem.latent_dim].float()
            if len(value):
                # One rounding of the result; in fp32 the sums' own roundings show too.
                roundings = 32 if out.dtype == torch.float32 else 2
                ulp = roundings * torch.finfo(out.dtype).eps * value.abs().amax(0)
                assert (mine[index] <= value.amax(0) + ulp).all()
                assert (mine[index] >= value.amin(0) - ulp).all()


@given(case=cases(contents=("iid",), max_query_len=1))
def test_m13_a_single_token_is_returned_bit_for_bit(target: Target, case: Case) -> None:
    problem = accepted(target, replace(case, kv_lens=(1,) * len(case.kv_lens)))
    out, lse = target.run(problem)
    rows = torch.stack([acceptance.logical_rows(problem, row, 1)[0] for row in problem.batch.block_table])
    assert torch.equal(out, rows[:, None, : problem.latent_dim].expand_as(out))
    logit = torch.einsum("bhd,bd->bh", problem.q.double(), rows.double()) * problem.softmax_scale
    assert ((lse - logit).abs() <= 1e-4 + 2e-6 * logit.abs()).all()


@given(case=cases(contents=("iid",), max_query_len=1, min_kv_len=1), share=st.floats(0, 1))
def test_m14_a_dominant_token_is_the_output(target: Target, case: Case, share: float) -> None:
    problem = accepted(target, replace(case, dtype=case.dtype))
    cache, q = problem.kv_cache.clone(), problem.q[:, :1].expand_as(problem.q).contiguous()
    expected = []
    for request, kv_len in enumerate(case.kv_lens):
        token = min(kv_len - 1, int(share * kv_len))
        slot = (problem.batch.block_table[request, token // case.page_size].long(), token % case.page_size)
        cache[slot] = q[request, 0] * 8  # a logit hundreds above the rest
        expected.append(cache[slot][: problem.latent_dim])
    out, _ = target.run(problem.with_cache(cache).with_q(q))
    expected_out = torch.stack(expected)[:, None].expand_as(out)
    assert (rms(out - expected_out) <= ROW_RMS[q.dtype] * rms(expected_out)).all()


@given(case=cases(contents=("ties",), max_query_len=1, min_kv_len=1))
def test_m15_copies_of_a_token_weigh_by_their_count(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    out, lse = target.run(problem)
    one, one_lse = target.run(replace(problem, batch=replace(problem.batch, kv_lens=problem.batch.kv_lens * 0 + 1)))
    counts = problem.batch.kv_lens.double().log()[:, None]
    assert ((lse - one_lse - counts).abs() <= 2e-4 + 4e-6 * lse.abs()).all()
    assert (rms(out - one) <= ROW_RMS[out.dtype] * rms(one)).all()


@given(case=cases(), seed=st.integers(0, 99))
def test_m16_permuting_heads_permutes_results(target: Target, case: Case, seed: int) -> None:
    problem = accepted(target, case)
    order = torch.randperm(case.heads, generator=torch.Generator().manual_seed(seed)).to(problem.q.device)
    permuted = problem.with_q(problem.q[:, order])
    if target.backend == "cpu":  # a BLAS sums the rows at a tile's edge in another order
        golden, golden_lse = target.golden(problem)
        acceptance.compare(permuted, *target.run(permuted), golden[:, order], golden_lse[:, order])
    else:
        out, lse = target.run(problem)
        same(target.run(permuted), (out[:, order], lse[:, order]))


@given(case=cases())
def test_m16_equal_heads_have_equal_results(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    problem = problem.with_q(problem.q[:, :1].expand_as(problem.q).contiguous())
    out, lse = target.run(problem)
    if target.backend == "cpu":  # as above
        acceptance.check(problem, out, lse)
    else:
        same((out, lse), (out[:, :1].expand_as(out), lse[:, :1].expand_as(lse)))


@given(case=cases(contents=("iid", "needle"), min_kv_len=8))
def test_m17_each_query_token_is_a_decode_of_its_own(target: Target, case: Case) -> None:
    problem = accepted(target, replace(case, query_lens=None, padding=0))
    n = case.max_query_len
    golden = target.golden(problem)
    for index in range(n):
        lens = problem.batch.kv_lens - n + index + 1
        alone = replace(problem, q=problem.q[index::n], batch=PagedBatch(problem.batch.block_table, lens))
        alone = replace(alone, kv_lens=tuple(lens.tolist()), query_lens=(1,) * len(case.kv_lens))
        acceptance.compare(alone, *target.run(alone), golden[0][index::n], golden[1][index::n])


@given(case=cases())
def test_m18_strides_change_no_bit(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    q, cache, table = problem.q, problem.kv_cache, problem.batch.block_table
    wide_q = torch.full((q.shape[0], q.shape[1] + 2, q.shape[2] + 8), torch.nan, dtype=q.dtype, device=q.device)
    wide_q[:, 1:-1, :-8] = q
    wide = torch.full((cache.shape[0], 2, cache.shape[1], cache.shape[2] + 8), torch.nan).to(cache)
    wide[:, 1, :, 8:] = cache
    wide_table = torch.full((table.shape[0], table.shape[1] + 3), UNREAD_CELL, dtype=table.dtype, device=table.device)
    wide_table[:, : table.shape[1]] = table
    strided = problem.with_q(wide_q[:, 1:-1, :-8]).with_cache(wide[:, 1, :, 8:])
    strided = strided.with_table(wide_table[:, : table.shape[1]])
    out = torch.full((q.shape[0], q.shape[1] + 1, problem.latent_dim), torch.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[0], 2 * q.shape[1]), torch.nan, device=q.device)
    same(target.run(problem), target.run_into(strided, out[:, 1:], lse[:, : q.shape[1]]))
    assert bool(out[:, 0].isnan().all())
    assert bool(lse[:, q.shape[1] :].isnan().all())


@given(case=cases())
def test_m22_doubling_q_and_halving_the_scale_changes_no_bit(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    other = replace(problem, q=problem.q * 2, softmax_scale=problem.softmax_scale / 2)
    same(target.run(problem), target.run(other))


@given(case=cases())
def test_m23_a_second_run_after_other_allocations_is_identical(target: Target, case: Case) -> None:
    problem = accepted(target, case)
    first = target.run(problem)
    noise = [torch.randn(n, device=problem.q.device) for n in (10, 10_000, 1_000_000)]
    del noise
    same(first, target.run(problem))


@given(case=cases(max_query_len=1, min_kv_len=2), cut=st.floats(0.01, 0.99))
def test_m24_lse_is_additive_over_disjoint_chunks(target: Target, case: Case, cut: float) -> None:
    problem, chunks = chunked(target, case, cut)
    _, whole = target.run(problem)
    (_, one), (_, two) = (target.run(chunk) for chunk in chunks)
    assert ((torch.logaddexp(one.double(), two.double()) - whole).abs() <= 2e-4 + 4e-6 * whole.abs()).all()


def chunked(target: Target, case: Case, cut: float) -> tuple[Problem, tuple[Problem, Problem]]:
    """A problem, and two with the contexts' first and other pages: of one token where the backend takes such pages."""
    by_token = replace(case, page_size=1)
    problem = accepted(target, by_token if target.accepts(by_token) else case)
    page_size = problem.kv_cache.shape[1]
    table, lens = problem.batch.block_table, problem.batch.kv_lens
    pages = (lens * cut / page_size).int()
    rest = torch.stack([row.roll(-int(n)) for row, n in zip(table, pages, strict=True)])
    one, two = ((table, pages * page_size), (rest, lens - pages * page_size))
    return problem, (replace(problem, batch=PagedBatch(*one)), replace(problem, batch=PagedBatch(*two)))


def rms(rows: Tensor) -> Tensor:
    """Root mean square of each row, float64."""
    return rows.double().square().mean(-1).sqrt()


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint chunks of one context, from their results, in float64."""
    lses = torch.stack([lse.double() for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total.masked_fill(total == -torch.inf, 0.0))
    return sum((w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)), torch.zeros(())), total


def without_latent_query(problem: Problem) -> Problem:
    """The problem with logits that depend on the rope part alone."""
    q = problem.q.clone()
    q[..., : problem.latent_dim] = 0
    return problem.with_q(q)
