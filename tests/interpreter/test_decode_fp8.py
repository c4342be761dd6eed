"""Decode over fp8 caches in the interpreter, as every architecture reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla.backends.triton.config.decode import Conversion
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.dispatch.select import load
from tests.interpreter.repair import without
from tests.interpreter.running import SMALL, TILE, WIDE, decode, request_of, solve_with_tile
from tests.support.acceptance import check
from tests.support.cases import EXTREME, Case, build

PAIRS = replace(TILE, conversion="pairs")
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
@pytest.mark.parametrize("conversion", ["late", "early", "pairs"])
def test_a_cache_with_one_scale_decodes(arch: str, cache: str, case: Case, conversion: Conversion) -> None:
    print(solve_with_tile(Case(**{**vars(case), "cache": cache}), replace(TILE, conversion=conversion), 6, arch))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("conversion", ["late", "pairs"])
def test_a_cache_with_scales_in_its_rows_decodes(arch: str, dtype: str, conversion: Conversion) -> None:
    case = Case((100, 7, 33, 0), 12, dtype=dtype, query_lens=(1, 2, 1, 0), max_query_len=2, cache="fp8_656")
    print(solve_with_tile(case, replace(TILE, conversion=conversion), 6, arch))
    case = Case((300,), 40, dtype=dtype, cache="fp8_656", seed=1, page_size=1)
    print(solve_with_tile(case, replace(WIDE, conversion=conversion), 9, arch))


@pytest.mark.parametrize("content", EXTREME)
@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_656"])
def test_pairs_hold_extreme_logits(cache: str, content: str) -> None:
    case = Case((100, 33), 16, content=content, garbage="hot", cache=cache, seed=3)
    print(solve_with_tile(case, PAIRS, 6))


def test_pairs_hold_queries_of_any_magnitude() -> None:
    problem = build(Case((60, 33), 16, **SMALL, cache="fp8_e4m3", seed=4))
    decoded = [
        decode(other, TritonRunner(request_of(other, "sm90", 6), PAIRS))[0]
        for power in (2.0**-100, 1.0, 2.0**100)
        for other in (replace(problem, q=problem.q * power, softmax_scale=problem.softmax_scale / power),)
    ]
    assert torch.equal(decoded[0], decoded[1])
    assert torch.equal(decoded[2], decoded[1])


def test_a_large_group_costs_the_others_no_digits() -> None:
    problem = build(Case((60, 33), 16, cache="fp8_656", seed=5))
    problem.q[..., :128] = 0.0
    outs = []
    for factor in (1.0, 1e4):
        scales = problem.kv_cache.view(torch.float32)[..., 128]
        scales[scales.isfinite()] *= factor
        outs.append(decode(problem, TritonRunner(request_of(problem, "sm90", 6), PAIRS))[0].float())
    plain, beside = (out[..., 128:] for out in outs)
    assert float((beside - plain).norm()) < 2.0**-9 * float(plain.norm())
    assert float(outs[1][..., :128].norm()) > 1e3 * float(outs[0][..., :128].norm())


def test_rows_at_odd_addresses_are_not_read_in_pairs() -> None:
    problem = build(Case((60, 33), 16, **SMALL, cache="fp8_e4m3", seed=6))
    pages, page_size, width = problem.kv_cache.shape
    moved = torch.empty(problem.kv_cache.numel() + 1, dtype=torch.uint8)[1:].view(pages, page_size, width)
    moved.copy_(problem.kv_cache.view(torch.uint8))
    problem = replace(problem, kv_cache=moved.view(problem.kv_cache.dtype))
    runner = TritonRunner(request_of(problem, "sm90", 6), PAIRS)
    assert problem.kv_cache.data_ptr() % 2 == 1
    with without("assembly"):  # which a load in pairs would go through
        check(problem, *decode(problem, runner))


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
