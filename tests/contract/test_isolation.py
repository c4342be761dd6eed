"""A value that is not finite, in a key or value that a query token may not see, never reaches the token's row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla import CachedContext
from tests.contract import test_chunked_prefill
from tests.support import prefill_cases
from tests.support.cases import Case
from tests.support.isolation import GROUPED, PLAIN, SPOILED, SPOILERS, Spoiled, SpoiledPrefill
from tests.support.prefill_cases import PrefillCase
from tests.support.targets import Target

RAGGED = Case((33, 70, 5), heads=3, query_lens=(2, 4, 3), max_query_len=4, padding=1)


def solve(target: Target, case: Case, request: int, back: int, cache: str, name: str) -> None:
    """Decode with one key spoiled, and hold the rows that do not see it to the rule."""
    if target.of_a_library:
        pytest.skip(f"{target} has a rule of its own for keys that are not finite")
    case = replace(case, cache=cache)
    if not target.accepts(case):
        pytest.skip(f"{target} refuses {case}")
    spoiled = Spoiled.of(target.build(case), request, back, SPOILERS[cache][name])
    spoiled.check(*target.run(spoiled.problem))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("back", [0, 1, 2])
@pytest.mark.parametrize(("cache", "name"), SPOILED)
def test_a_later_key_that_is_not_finite_reaches_its_own_rows_alone(
    target: Target, page_size: int, back: int, cache: str, name: str
) -> None:
    solve(target, replace(RAGGED, page_size=page_size), 1, back, cache, name)


@pytest.mark.parametrize(("cache", "name"), SPOILED)
def test_a_key_that_every_query_token_sees_spoils_every_row_of_its_request_alone(
    target: Target, cache: str, name: str
) -> None:
    solve(target, replace(RAGGED, page_size=64), 1, 3, cache, name)
    solve(target, replace(RAGGED, page_size=64), 1, 60, cache, name)


@pytest.mark.parametrize("back", [0, 1, 2, 4])
def test_a_query_that_precedes_the_context_keeps_clear_of_it(target: Target, back: int) -> None:
    solve(target, Case((5, 5), heads=4, max_query_len=8), 1, back, "", "all is NaN")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_long_context_that_is_split_keeps_clear_of_a_later_key(target: Target, dtype: str, name: str) -> None:
    solve(target, Case((5000, 64), heads=20, page_size=64, max_query_len=2, dtype=dtype), 0, 0, "", name)


@pytest.mark.parametrize("name", GROUPED)
def test_a_split_context_of_rows_with_scales_keeps_clear_of_a_later_key(target: Target, name: str) -> None:
    solve(target, Case((3000, 64), heads=20, page_size=64, max_query_len=2), 0, 0, "fp8_656", name)


@pytest.mark.parametrize("back", [0, 1, 20, 39])
def test_an_absorbed_prefill_keeps_clear_of_later_keys(target: Target, back: int) -> None:
    case = Case((300, 40), heads=5, query_lens=(40, 17), max_query_len=40, page_size=64)
    solve(target, case, 0, back, "", "all is NaN")


@pytest.mark.parametrize("position", [24, 25, 26, 31, 32, 33, 47, 48, 63, 64])
@pytest.mark.parametrize(
    ("name", "value"), [("k_nope", torch.nan), ("k_pe", torch.nan), ("v", torch.nan), ("v", torch.inf)]
)
def test_a_later_key_or_value_of_a_prefill_reaches_its_own_rows_alone(
    prefill_target: Target, position: int, name: str, value: float
) -> None:
    _solve_prefill(prefill_target, PrefillCase((9, 40, 30), (9, 65, 64)), 1, position, name, value)


@pytest.mark.parametrize("position", [0, 130, 256, 300, 399])
@pytest.mark.parametrize("name", ["k_nope", "v"])
def test_a_long_prefill_keeps_clear_of_later_keys(prefill_target: Target, position: int, name: str) -> None:
    _solve_prefill(prefill_target, PrefillCase((300, 7), (400, 3), dtype="fp16"), 0, position, name, torch.nan)


def test_values_of_two_columns_spoil_each_their_own_rows(prefill_target: Target) -> None:
    case = PrefillCase((40, 9), (65, 9))
    first = SpoiledPrefill.of(prefill_cases.build(case, prefill_target.device), 0, 40, "v", torch.nan)
    inputs = first.problem.inputs
    inputs.v[60, 1, 7] = torch.nan
    if not prefill_cases.accepts(prefill_target, first.problem) or prefill_target.of_a_library:
        pytest.skip(f"{prefill_target} refuses {case}")
    affected = first.affected.clone()
    affected[35:40, 1, 7] = True
    replace(first, affected=affected).check(*prefill_cases.run(prefill_target, first.problem))


def _solve_prefill(target: Target, case: PrefillCase, sequence: int, position: int, name: str, value: float) -> None:
    if target.of_a_library:
        pytest.skip(f"{target} has a rule of its own for keys that are not finite")
    clean = prefill_cases.build(case, target.device)
    if not prefill_cases.accepts(target, clean):
        pytest.skip(f"{target} refuses {case}")
    spoiled = SpoiledPrefill.of(clean, sequence, position, name, value)
    spoiled.check(*prefill_cases.run(target, spoiled.problem))


@pytest.mark.parametrize("rows", [8, None])
def test_a_chunked_prefill_keeps_clear_of_later_keys_and_of_other_contexts(
    prefill_target: Target, rows: int | None
) -> None:
    if prefill_target.of_a_library:
        pytest.skip(f"{prefill_target} has a rule of its own for keys that are not finite")
    problem = test_chunked_prefill.chunked(PrefillCase((9, 20, 4), (40, 50, 4), 2), prefill_target.device)
    clean, _ = test_chunked_prefill.run(prefill_target, problem, rows)
    context: CachedContext = problem.context
    context.kv_cache[int(context.block_table[0, 0]), 3] = torch.nan  # the first sequence's context
    problem.new.inputs.v[9 + 12] = torch.nan  # of the second sequence, the key of query token 12
    out, lse = test_chunked_prefill.run(prefill_target, problem, rows)
    seen = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    seen[:9] = seen[9 + 12 : 29] = True
    assert not bool(out[seen].isfinite().any())
    assert not bool(lse[:9].isfinite().any())
    torch.testing.assert_close(out[~seen], clean[~seen], rtol=2e-2, atol=1e-2)  # computed again: rounded otherwise
