"""The tests can fail: deliberately broken twins of the CPU backend, each caught by the acceptance rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import acceptance
from tests.support.cases import Case, Problem, build
from tests.support.targets import Target

CPU = Target("cpu", "cpu")
Result = tuple[Tensor, Tensor]

# Adversarial contents, where plain random data and loose tolerances see nothing.
CASES = (
    Case((4100, 900), heads=16, content="iid"),
    Case((129, 65), content="needle", garbage="hot", seed=1),
    Case((700, 64), content="split_skew", garbage="hot", page_size=64, seed=3),
    Case((33, 300), content="fingerprint", garbage="hot"),
)


def _with_lens(problem: Problem, kv_lens: Tensor) -> Problem:
    return replace(problem, batch=replace(problem.batch, kv_lens=kv_lens))


def drop_last_token(problem: Problem) -> Result:
    """Off by one at the end of the context."""
    return CPU.run(_with_lens(problem, problem.batch.kv_lens - 1))


def one_token_too_many(problem: Problem) -> Result:
    """Off by one the other way: reads a slot past the end (a page of garbage where the end is a page's end)."""
    return CPU.run(_with_lens(_with_next_page(problem), problem.batch.kv_lens + 1))


def one_page_too_many(problem: Problem) -> Result:
    """Reads to the end of the page after the last."""
    return CPU.run(_with_lens(_with_next_page(problem), problem.batch.kv_lens + problem.kv_cache.shape[1]))


def base_2_lse(problem: Problem) -> Result:
    """Returns log2 where the contract says natural logarithm."""
    out, lse = CPU.run(problem)
    return out, lse / math.log(2)


def stale_row(problem: Problem) -> Result:
    """Leaves the last row as the step before wrote it."""
    stale, stale_lse = CPU.run(problem.with_q(problem.q.roll(1, dims=1)))
    out, lse = CPU.run(problem)
    out[-1], lse[-1] = stale[-1], stale_lse[-1]
    return out, lse


def wrong_page(problem: Problem) -> Result:
    """Reads one page twice and another never."""
    table = problem.batch.block_table.clone()
    table[0, 0] = table[0, 1]
    return CPU.run(problem.with_table(table))


def scale_of_the_latent(problem: Problem) -> Result:
    """Uses 1 / sqrt(latent + rope) in place of the given scale."""
    return CPU.run(replace(problem, softmax_scale=problem.q.shape[2] ** -0.5))


def rope_ignored(problem: Problem) -> Result:
    """Scores with the latent part alone."""
    q = problem.q.clone()
    q[..., problem.latent_dim :] = 0
    return CPU.run(problem.with_q(q))


def last_head_copied(problem: Problem) -> Result:
    """Head padding gone wrong: the last head answers with its neighbour's result."""
    out, lse = CPU.run(problem)
    out[:, -1], lse[:, -1] = out[:, -2], lse[:, -2]
    return out, lse


def bfloat16_accumulator(problem: Problem) -> Result:
    """Sums the values in bfloat16, chunk by chunk."""
    out, lse = torch.zeros_like(CPU.run(problem)[0]), CPU.run(problem)[1]
    for request, kv_len in enumerate(problem.kv_lens):
        rows = acceptance.logical_rows(problem, problem.batch.block_table[request], kv_len)
        scores = torch.einsum("hd,kd->hk", problem.q[request].float(), rows.float()) * problem.softmax_scale
        weights = torch.exp(scores - lse[request][:, None]).to(out.dtype)
        for lo in range(0, kv_len, 64):
            out[request] += weights[:, lo : lo + 64] @ rows[lo : lo + 64, : problem.latent_dim]
    return out, lse


def _with_next_page(problem: Problem) -> Problem:
    """The table with a readable page id after each request's last page."""
    table = problem.batch.block_table
    return problem.with_table(torch.cat([table.clamp_max(problem.kv_cache.shape[0] - 1), table[:, :1]], dim=1))


# Each twin, and how many of the cases must catch it: the data decides what can show (a page of a context whose mass is
# one needle elsewhere may be lost without a trace).
MUTANTS = {
    drop_last_token: 3,
    one_token_too_many: 4,
    one_page_too_many: 4,
    base_2_lse: 4,
    stale_row: 4,
    wrong_page: 2,
    scale_of_the_latent: 4,
    rope_ignored: 4,
    last_head_copied: 4,
    bfloat16_accumulator: 1,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.content)
def test_the_sound_backend_passes_where_its_twins_are_tried(case: Case) -> None:
    CPU.solve(case)


@pytest.mark.parametrize(("mutant", "least"), MUTANTS.items(), ids=[mutant.__name__ for mutant in MUTANTS])
def test_a_broken_twin_is_caught(mutant: Callable[[Problem], Result], least: int) -> None:
    caught = []
    for case in CASES:
        problem = build(case)
        try:
            acceptance.check(problem, *mutant(problem))
        except AssertionError as failure:
            caught.append(f"{case.content}: {failure}")
    print("\n".join(caught))
    assert len(caught) >= least, f"caught only by {caught}"
