"""A value that is not finite, in a key or value that a query token may not see, never reaches the token's row; in the
interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla.backends.triton.runner import TritonRunner
from portable_mla.backends.triton.tile import Conversion, Tile
from tests.cases import Case, build
from tests.interpreter.running import DESCRIPTOR, SMALL, TILE, WIDE, decode, request_of
from tests.isolation import GROUPED, PER_TENSOR, PLAIN, Spoiled, Spoiler

RAGGED = Case((33, 70, 5), 3, **SMALL, query_lens=(2, 4, 3), max_query_len=4, padding=1)


def solve(
    case: Case, tile: Tile, spoil: Spoiler, *, request: int = 1, back: int = 0, units: int = 6, arch: str = "sm90"
) -> None:
    """Decode with one key spoiled, and hold the rows that do not see it to the rule."""
    spoiled = Spoiled.of(build(case), request, back, spoil)
    spoiled.check(*decode(spoiled.problem, TritonRunner(request_of(spoiled.problem, arch, units), tile)))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("back", [0, 1, 2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_a_later_key_reaches_its_own_rows_alone(page_size: int, back: int, name: str) -> None:
    solve(replace(RAGGED, page_size=page_size), TILE, PLAIN[name], back=back)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_later_key_loaded_by_descriptor_reaches_its_own_rows_alone(name: str, dtype: str) -> None:
    solve(replace(RAGGED, page_size=32, dtype=dtype), DESCRIPTOR, PLAIN[name], back=1)


@pytest.mark.parametrize("back", [0, 2, 39])
@pytest.mark.parametrize("tile", [TILE, WIDE], ids=["16 rows", "64 rows"])
def test_the_blocks_of_an_absorbed_prefill_keep_clear_of_later_keys(back: int, tile: Tile) -> None:
    case = Case((90, 40), 5, **SMALL, query_lens=(40, 17), max_query_len=40)
    solve(case, tile, PLAIN["all is NaN"], request=0, back=back)


@pytest.mark.parametrize("units", [4, 40])
def test_split_parts_of_several_requests_keep_clear_of_a_later_key(units: int) -> None:
    case = Case((700, 33, 70, 200), 12, **SMALL, max_query_len=2, page_size=64)
    for request in range(4):
        solve(case, TILE, PLAIN["all is NaN"], request=request, units=units)


@pytest.mark.parametrize(
    ("arch", "cache"),
    [("sm80", "fp8_e4m3"), ("sm90", "fp8_e4m3"), ("gfx90a", "fp8_e4m3"), ("gfx942", "fp8_e4m3fnuz")],
)
@pytest.mark.parametrize("conversion", ["late", "early", "pairs"])
@pytest.mark.parametrize("name", PER_TENSOR)
def test_a_later_key_of_an_fp8_cache_reaches_its_own_rows_alone(
    arch: str, cache: str, conversion: Conversion, name: str
) -> None:
    solve(replace(RAGGED, cache=cache), replace(TILE, conversion=conversion), PER_TENSOR[name], back=1, arch=arch)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("conversion", ["late", "pairs"])
@pytest.mark.parametrize("name", GROUPED)
def test_a_later_key_with_scales_reaches_its_own_rows_alone(
    arch: str, dtype: str, conversion: Conversion, name: str
) -> None:
    case = Case((33, 40), 3, dtype=dtype, max_query_len=3, cache="fp8_656")
    solve(case, replace(TILE, conversion=conversion), GROUPED[name], back=1, arch=arch)


@pytest.mark.parametrize("cache", ["", "fp8_656", "fp8_e4m3"])
def test_a_key_that_all_see_makes_every_row_of_its_request_nan_and_no_other(cache: str) -> None:
    clean = build(Case((33, 400, 5), 3, max_query_len=1, cache=cache))
    for back in (0, 200, 399):
        spoiled = Spoiled.of(clean, 1, back, (GROUPED if cache == "fp8_656" else PLAIN)["all is NaN"])
        out, lse = decode(spoiled.problem, TritonRunner(request_of(clean, "sm90", 20), TILE))
        spoiled.check(out, lse)
        assert bool(out[1].isnan().all() and lse[1].isnan().all())
        assert torch.equal(spoiled.affected.cpu(), torch.tensor([False, True, False]))
