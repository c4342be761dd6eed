"""The prefill tests can fail: deliberately broken twins of the CPU backend, each caught by the acceptance rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.support.prefill_cases import PrefillCase, PrefillProblem, Result, build, check, offsets, run, spans
from tests.support.targets import Target

CPU = Target("cpu", "cpu")
CASES = (
    PrefillCase((65, 1, 130), (400, 90, 130), heads=4),
    PrefillCase((65, 9, 130), (400, 90, 130), heads=4, content="needle", garbage="hot", seed=0),
    PrefillCase((65, 9, 130), (400, 90, 130), heads=4, content="needle", garbage="hot", seed=1),
)


def _with_key_lens(problem: PrefillProblem, change: int) -> Result:
    """The longest sequence's last keys dropped (or, where positive, its neighbour's first ones read as its own)."""
    lens = problem.case.kv_lens
    longest = lens.index(max(lens))
    keys = list(range(sum(lens[:longest]), sum(lens[: longest + 1]) + change))
    mine = spans(problem.case.query_lens)[longest]
    changed = replace(problem.case, query_lens=(problem.case.query_lens[longest],), kv_lens=(len(keys),), padding=0)
    inputs = problem.inputs
    alone = replace(problem, case=changed).with_inputs(
        q=inputs.q[mine], k_nope=inputs.k_nope[keys], k_pe=inputs.k_pe[keys], v=inputs.v[keys],
        cu_seqlens_q=offsets(changed.query_lens), cu_seqlens_k=offsets(changed.kv_lens),
    )  # fmt: skip
    out, lse = run(CPU, problem)
    out[mine], lse[mine] = run(CPU, alone)
    return out, lse


def drop_the_last_key(problem: PrefillProblem) -> Result:
    """Off by one at the end of a sequence, which moves its diagonal too."""
    return _with_key_lens(problem, -1)


def read_the_neighbours_key(problem: PrefillProblem) -> Result:
    """Off by one the other way."""
    return _with_key_lens(problem, 1)


def no_causal_mask(problem: PrefillProblem) -> Result:
    """Every query token sees the whole sequence."""
    return run(CPU, problem.with_inputs(causal=False))


def aligned_to_the_start(problem: PrefillProblem) -> Result:
    """Query token i sees the keys up to i."""
    case, inputs = problem.case, problem.inputs
    keys: list[int] = []
    lens: list[int] = []
    for queries, theirs in zip(case.query_lens, spans(case.kv_lens), strict=True):
        lens.append(min(queries, theirs.stop - theirs.start))
        keys += range(theirs.start, theirs.start + lens[-1])
    return run(
        CPU,
        replace(problem, case=replace(case, kv_lens=tuple(lens))).with_inputs(
            k_nope=inputs.k_nope[keys], k_pe=inputs.k_pe[keys], v=inputs.v[keys], cu_seqlens_k=offsets(tuple(lens))
        ),
    )


def rope_ignored(problem: PrefillProblem) -> Result:
    """Scores with the nope part alone."""
    return run(CPU, problem.with_inputs(k_pe=torch.zeros_like(problem.inputs.k_pe)))


def values_of_another_head(problem: PrefillProblem) -> Result:
    """A stride gone wrong."""
    return run(CPU, problem.with_inputs(v=problem.inputs.v.roll(1, dims=1)))


def rope_keys_one_row_off(problem: PrefillProblem) -> Result:
    """The shared keys of the row before."""
    k_pe = problem.inputs.k_pe.clone()
    k_pe[: sum(problem.case.kv_lens)] = k_pe[: sum(problem.case.kv_lens)].roll(1, dims=0)
    return run(CPU, problem.with_inputs(k_pe=k_pe))


def base_2_lse(problem: PrefillProblem) -> Result:
    """Returns log2 where the contract says natural logarithm."""
    out, lse = run(CPU, problem)
    return out, lse / math.log(2)


def default_scale(problem: PrefillProblem) -> Result:
    """Uses 1 / sqrt(nope + rope) in place of the given scale."""
    return run(CPU, replace(problem, softmax_scale=problem.inputs.q.shape[2] ** -0.5))


def last_block_unwritten(problem: PrefillProblem) -> Result:
    """Blocks counted as query_len // 64: the rest keeps what the step before left."""
    out, lse = run(CPU, problem)
    stale, stale_lse = run(CPU, problem.with_inputs(q=problem.inputs.q.roll(1, dims=1)))
    rows = slice(64, 65)
    out[rows], lse[rows] = stale[rows], stale_lse[rows]
    return out, lse


def padding_unwritten(problem: PrefillProblem) -> Result:
    """Rows past the last sequence keep what was there."""
    out, lse = run(CPU, problem)
    out[-1], lse[-1] = 1.0, 1.0
    return out, lse


MUTANTS = {
    drop_the_last_key: 3,
    read_the_neighbours_key: 2,
    no_causal_mask: 3,
    aligned_to_the_start: 3,
    rope_ignored: 3,
    values_of_another_head: 3,
    rope_keys_one_row_off: 3,
    base_2_lse: 3,
    default_scale: 3,
    last_block_unwritten: 3,
    padding_unwritten: 3,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.content}{case.seed}")
def test_the_sound_backend_passes_where_its_twins_are_tried(case: PrefillCase) -> None:
    problem = build(case)
    check(problem, *run(CPU, problem))


@pytest.mark.parametrize(("mutant", "least"), MUTANTS.items(), ids=[mutant.__name__ for mutant in MUTANTS])
def test_a_broken_twin_is_caught(mutant: Callable[[PrefillProblem], Result], least: int) -> None:
    caught = []
    for case in CASES:
        problem = build(case)
        try:
            check(problem, *mutant(problem))
        except AssertionError as failure:
            caught.append(f"{case.content}: {failure}")
    print("\n".join(caught))
    assert len(caught) >= least, f"caught only by {caught}"
