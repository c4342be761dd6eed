"""Plan, decode and combine in the interpreter, held to the acceptance rule on poisoned inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import Backend, Runner, decode_runner
from portable_mla.metadata import Limits, Status
from tests.interpreter.repair import without
from tests.interpreter.running import (
    DESCRIPTOR,
    MANY_PARTS,
    MIDDLE,
    SMALL,
    TILE,
    WIDE,
    decode,
    request_of,
    solve_as,
    solve_with_tile,
)
from tests.support import targets
from tests.support.acceptance import check
from tests.support.cases import Case, build

# case, tile, units: the plan has as many parts as units hold programs, so that many units split much
CASES = [
    (Case((1,), 16), TILE, 4),
    (Case((100, 7, 33), 16), TILE, 4),
    (Case((100, 7, 33), 16, dtype="fp16"), TILE, 4),
    (Case((700,)), TILE, 20),
    (Case((70, 64), 1), TILE, 5),
    (Case((0, 50, 0, 0, 20), 12), TILE, 4),
    (Case((0, 0, 0), 12), TILE, 4),
    (Case((90,), 96, page_size=32), WIDE, 8),
    (Case((70, 64), 128, page_size=64), WIDE, 8),
    # page sizes
    (Case((65, 130), 5, page_size=1, content="fingerprint"), TILE, 6),
    (Case((65, 130), 12, page_size=2, content="fingerprint"), TILE, 6),
    (Case((65, 130), 20, page_size=48, content="fingerprint"), TILE, 9),
    (Case((90, 31), 40, page_size=544, content="fingerprint"), TILE, 9),
    # geometries
    (Case((100, 64), 16, rope_dim=0), TILE, 4),
    (Case((100, 64), 16, rope_dim=0, dtype="fp16"), DESCRIPTOR, 4),
    (Case((100, 64), 32, latent_dim=256, rope_dim=64), TILE, 4),
    (Case((100, 64), 40, **MIDDLE), TILE, 8),
    (Case((100, 64), 32, **SMALL), TILE, 6),
    (Case((100, 64), 32, **SMALL, dtype="fp16", page_size=1), TILE, 6),
    # descriptor loads, whose last tile slides back
    (Case((100, 7, 33), 16), DESCRIPTOR, 4),
    (Case((100, 7, 33, 16, 32), 16, page_size=32), DESCRIPTOR, 4),
    (Case((100, 7, 33), 16, page_size=48, content="fingerprint"), DESCRIPTOR, 4),
    (Case((100, 7, 33), 16, page_size=544), DESCRIPTOR, 4),
    (Case((1, 15, 17), 20, dtype="fp16", garbage="hot"), DESCRIPTOR, 7),
    (Case((100, 64, 33), 16, **SMALL, content="needle", garbage="hot"), DESCRIPTOR, 5),
    # query tokens
    (Case((90, 3), 5, max_query_len=2), TILE, 5),
    (Case((90, 3), 5, max_query_len=2), DESCRIPTOR, 5),
    (Case((90, 5, 40), 12, query_lens=(3, 1, 2), max_query_len=3), TILE, 8),
    (Case((60, 33), 20, query_lens=(4, 1), max_query_len=4), TILE, 12),
    (Case((64, 9, 70), 5, query_lens=(8, 0, 5), max_query_len=8), TILE, 12),
    (Case((64, 9, 70), 5, query_lens=(8, 0, 5), max_query_len=8, page_size=32), DESCRIPTOR, 12),
    (Case((2, 1, 0), 12, query_lens=(5, 3, 2), max_query_len=5), TILE, 8),
    (Case((2, 1, 0), 12, query_lens=(5, 3, 2), max_query_len=5), DESCRIPTOR, 8),
    (Case((90, 300, 17, 64), 16, **SMALL, query_lens=(6, 7, 1, 2), max_query_len=7), WIDE, 10),
    # an absorbed prefill
    (Case((90, 40), 5, **SMALL, query_lens=(40, 17), max_query_len=40), TILE, 6),
    (Case((70, 41), 12, **SMALL, max_query_len=33), WIDE, 6),
    (Case((70, 41), 20, **SMALL, query_lens=(50, 0), max_query_len=65, padding=2), DESCRIPTOR, 6),
    # padding rows, and requests without work
    (Case((30, 50), 12, query_lens=(0, 0)), TILE, 4),
    (Case((30, 50), 12, query_lens=(0, 1), padding=3), TILE, 4),
    (Case((100, 64), 16, query_lens=(1, 1), padding=5), DESCRIPTOR, 4),
    # plans: many requests, many splits, several programs a unit, AMD's order of programs
    (Case(tuple(range(1, 40)), 16, **SMALL), TILE, 7),
    (Case((400,), 16, **SMALL, page_size=2), replace(TILE, num_xcds=4), 9),
    (Case((400, 3), 40, **MIDDLE), replace(DESCRIPTOR, num_xcds=8), 30),
    (Case((1500,), 8, **SMALL, page_size=64, content="split_skew"), replace(TILE, min_tokens=16), 60),
    (Case((3, 200) * 5, 16, **SMALL), replace(TILE, programs_per_unit=2), 6),
    # combine: more splits than one step takes, for few rows and for many
    (Case((1500, 700), 8, **SMALL, content="split_skew", seed=7), TILE, 90),
    (Case((300, 33, 200), 64, **SMALL, query_lens=(2, 0, 2), max_query_len=2), MANY_PARTS, 2),
    # logits
    (Case((1, 64, 200), **SMALL, content="neg_extreme", max_query_len=2), TILE, 9),
    (Case((1, 64, 200), **SMALL, content="pos_extreme", max_query_len=2), DESCRIPTOR, 9),
    (Case((64, 200), **SMALL, content="ties"), TILE, 9),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tile", "units"), CASES)
def test_decode_is_within_the_acceptance_rule(case: Case, tile: Tile, units: int) -> None:
    print(solve_with_tile(case, tile, units), case.repro())


@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "cpu"])
def test_the_tile_that_an_architecture_chooses_decodes(arch: str, page_size: int) -> None:
    heads, query_len = (16, 1) if page_size == 1 else (20, 2)
    case = Case((100, 0, 65), heads, **SMALL, page_size=page_size, max_query_len=query_len)
    print(solve_as(arch, case, units=6))


@pytest.mark.parametrize("tile", [TILE, DESCRIPTOR], ids=lambda tile: tile.loads)
@pytest.mark.parametrize("step", [8, 1], ids=["aligned", "unaligned"])
def test_a_cache_and_queries_with_gaps_between_their_rows_decode(tile: Tile, step: int) -> None:
    problem = build(Case((100, 64, 0), 5, **SMALL, query_lens=(1, 2, 1), max_query_len=2, padding=1))
    wide_cache = torch.full((*problem.kv_cache.shape[:2], 160 + step), torch.nan, dtype=torch.bfloat16)
    wide_q = torch.full((*problem.q.shape[:2], 160 + step), torch.nan, dtype=torch.bfloat16)
    wide_cache[..., step:], wide_q[..., :160] = problem.kv_cache, problem.q
    strided = problem.with_cache(wide_cache[..., step:]).with_q(wide_q[..., :160])
    check(strided, *decode(strided, TritonRunner(request_of(strided, "sm90", 5), tile)))


def test_one_runner_serves_batch_after_batch() -> None:
    first = build(Case((300, 20, 90), 16, **SMALL))
    runner = TritonRunner(request_of(first, "sm90", 7), TILE)
    decode(first, runner)
    for kv_lens in ((0, 0, 5), (160, 1, 300), (20,)):
        problem = build(Case(kv_lens, 16, **SMALL))
        check(problem, *decode(problem, runner))


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "fixed"])
def test_a_page_that_is_not_there_makes_its_rows_nan_and_changes_no_other_bit(fixed: bool) -> None:
    problem = build(Case((40, 5, 700), 12, **SMALL, query_lens=(1, 2, 3), max_query_len=4, content="fingerprint"))
    request = replace(request_of(problem, "sm90", 8), deterministic=fixed)
    good_out, good_lse = decode(problem, TritonRunner(request, TILE))
    table = problem.batch.block_table.clone()
    table[1, 0] = 2**31 - 1
    status = Status.allocate(torch.device("cpu"))
    out, lse = decode(problem.with_table(table), TritonRunner(request, TILE), status)
    assert bool(out[1:3].isnan().all())
    assert bool(lse[1:3].isnan().all())
    others = [0, 3, 4, 5]
    assert torch.equal(out[others], good_out[others])
    assert torch.equal(lse[others], good_lse[others])
    with pytest.raises(IndexError, match="block_table: request 1: expected a page in"):
        status.check(Limits(problem.kv_cache.shape[0], 10_000, 4, 6))


def test_rows_that_q_does_not_have_are_reported_and_not_written() -> None:
    problem = build(Case((40, 5, 100), 12, **SMALL, query_lens=(1, 2, 3), max_query_len=4))
    runner, status = TritonRunner(request_of(problem, "sm90", 8), TILE), Status.allocate(torch.device("cpu"))
    decode(problem, runner, status)
    out = torch.full((6, 12, 128), 7.0).bfloat16()
    lse = torch.full((6, 12), 7.0)
    inputs = problem.inputs._replace(q=problem.q[:4])
    runner.run(inputs, out[:4], lse[:4], softmax_scale=problem.softmax_scale)
    assert bool((out[4:] == 7).all())
    assert bool((lse[4:] == 7).all())
    with pytest.raises(IndexError, match="query_lens: request 2: its query tokens end at [56], past q"):
        status.check(Limits(problem.kv_cache.shape[0], 10_000, 4, 6))


@pytest.mark.parametrize("tile", [TILE, DESCRIPTOR], ids=lambda tile: tile.loads)
def test_m7_with_fixed_cuts_a_request_alone_has_the_bits_it_has_in_a_batch(tile: Tile) -> None:
    problem = build(Case((1300, 5, 0, 700), 12, **SMALL, query_lens=(2, 1, 1, 3), max_query_len=3))
    request = replace(request_of(problem, "sm90", 8), deterministic=True)
    out, lse = decode(problem, TritonRunner(request, tile))
    check(problem, out, lse)
    for index, start in ((0, 0), (3, 4)):
        alone = problem.only(index)
        small = replace(request_of(alone, "sm90", 3), deterministic=True)
        alone_out, alone_lse = decode(alone, TritonRunner(small, tile))
        assert torch.equal(out[start : start + len(alone_out)], alone_out)
        assert torch.equal(lse[start : start + len(alone_out)], alone_lse)


@pytest.mark.parametrize("repair", ["arithmetic", "rounding"])
def test_without_its_repair_the_interpreter_is_wrong(repair: str) -> None:
    case = Case((100, 700), 16, **SMALL)
    solve_with_tile(case, TILE, 6)
    with without(repair), pytest.raises(AssertionError, match="^(out|lse)"):
        solve_with_tile(case, TILE, 6)


@pytest.mark.parametrize("name", ["sm80", "sm89", "sm120"])
def test_a_target_with_another_architectures_tiles_decodes_with_those(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "arch_of", lambda device: replace(ARCHS["sm90"], units=4))
    bound: list[str] = []

    def bind(backend: Backend, request: Request) -> Runner:
        bound.append(request.arch.name)
        return decode_runner(backend, request)

    monkeypatch.setattr(targets, "decode_runner", bind)
    target, case = targets.Target("cpu", "triton", name), Case((100, 0, 40), 16, **SMALL, page_size=64)
    assert target.accepts(case, deterministic=True)
    target.solve(case)
    assert bound == [name]
