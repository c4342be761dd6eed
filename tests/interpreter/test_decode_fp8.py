"""Decode over fp8 caches in the interpreter, as every architecture reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from portable_mla.backends.triton.runner import TritonRunner
from portable_mla.dispatch import load
from tests.acceptance import check
from tests.cases import Case, build
from tests.interpreter.repair import without
from tests.interpreter.running import SMALL, TILE, WIDE, decode, request_of, solve_with_tile

FORMATS = [
    ("sm80", "fp8_e4m3"),
    ("sm90", "fp8_e4m3"),
    ("gfx90a", "fp8_e4m3"),
    ("gfx942", "fp8_e4m3fnuz"),
]
PER_TENSOR = [
    Case((100, 7, 33, 0), 12, query_lens=(1, 2, 1, 0), max_query_len=2),
    Case((100, 64), 40, **SMALL, dtype="fp16", page_size=1, seed=1),
    Case((700, 90), 16, **SMALL, content="needle", garbage="hot", seed=2),
    Case((100, 64), 16, rope_dim=0, page_size=48),
]


@pytest.mark.parametrize("case", PER_TENSOR, ids=range(4))
@pytest.mark.parametrize(("arch", "cache"), FORMATS)
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_a_cache_with_one_scale_decodes(arch: str, cache: str, case: Case, early: bool) -> None:
    print(solve_with_tile(Case(**{**vars(case), "cache": cache}), replace(TILE, converts_early=early), 6, arch))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
def test_a_cache_with_scales_in_its_rows_decodes(arch: str, dtype: str) -> None:
    case = Case((100, 7, 33, 0), 12, dtype=dtype, query_lens=(1, 2, 1, 0), max_query_len=2, cache="fp8_656")
    print(solve_with_tile(case, TILE, 6, arch))
    print(solve_with_tile(Case((300,), 40, dtype=dtype, cache="fp8_656", seed=1, page_size=1), WIDE, 9, arch))


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120", "gfx942"])
def test_the_tile_that_an_architecture_chooses_decodes(arch: str) -> None:
    problem = build(Case((70, 0, 33), 20, page_size=64, cache="fp8_656"))
    request = request_of(problem, arch, units=6)
    backend = load("triton", request.arch.vendor)
    assert not backend.reasons_unsupported(request)
    runner = backend.bind(request)
    assert isinstance(runner, TritonRunner)
    check(problem, *decode(problem, runner))


@pytest.mark.parametrize(("arch", "cache"), [("sm90", "fp8_e4m3"), ("gfx942", "fp8_e4m3fnuz")])
def test_without_its_repair_the_interpreter_is_wrong(arch: str, cache: str) -> None:
    case = Case((100,), 16, **SMALL, cache=cache)
    problem = build(case)
    problem.kv_cache.view(-1, 160)[:, 0] = float("nan")
    runner = TritonRunner(request_of(problem, arch, 4), TILE)
    assert bool(decode(problem, runner)[0].isnan().any())
    with without("fp8"):
        try:
            out, _ = decode(problem, runner)
        except Exception as error:  # noqa: BLE001 (it wraps its own)
            assert "fp8e4b8" in str(error)
        else:
            assert not bool(out.isnan().any())
