"""A value that is not finite, in a key or value that a query token may not see, never reaches the token's row; in the
interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from portable_mla.backends.triton.config.decode import Conversion, Tile
from portable_mla.backends.triton.config.prefill import PrefillTile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.backends.triton.prefill.runner import TritonPrefill
from tests.interpreter.running import DESCRIPTOR, SMALL, TILE, WIDE, decode, request_of
from tests.interpreter.test_prefill import DESCRIPTOR as PREFILL_DESCRIPTOR
from tests.interpreter.test_prefill import MINI, run
from tests.interpreter.test_prefill import TILE as PREFILL_TILE
from tests.interpreter.test_prefill import request_of as prefill_request_of
from tests.support import prefill_cases
from tests.support.cases import Case, build
from tests.support.isolation import GROUPED, PER_TENSOR, PLAIN, Spoiled, SpoiledPrefill, Spoiler
from tests.support.prefill_cases import GEOMETRIES, PrefillCase

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
    ("arch", "cache", "conversion"),
    [
        ("sm80", "fp8_e4m3", "late"),
        ("sm90", "fp8_e4m3", "early"),
        ("sm90", "fp8_e4m3", "pairs"),
        ("gfx90a", "fp8_e4m3", "early"),
        ("gfx942", "fp8_e4m3fnuz", "late"),
    ],
)
@pytest.mark.parametrize("name", PER_TENSOR)
def test_a_later_key_of_an_fp8_cache_reaches_its_own_rows_alone(
    arch: str, cache: str, conversion: Conversion, name: str
) -> None:
    solve(replace(RAGGED, cache=cache), replace(TILE, conversion=conversion), PER_TENSOR[name], back=1, arch=arch)


@pytest.mark.parametrize(
    ("arch", "conversion", "dtype"),
    [
        ("sm80", "late", "fp16"),
        ("sm90", "late", "bf16"),
        ("sm90", "pairs", "bf16"),
        ("sm90", "pairs", "fp16"),
        ("gfx942", "late", "bf16"),
    ],
)
@pytest.mark.parametrize("name", GROUPED)
def test_a_later_key_with_scales_reaches_its_own_rows_alone(
    arch: str, conversion: Conversion, dtype: str, name: str
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


def solve_prefill(case: PrefillCase, tile: PrefillTile, position: int, name: str, value: float) -> None:
    """Prefill with one value of the first sequence spoiled, and hold what does not see it to the rule."""
    spoiled = SpoiledPrefill.of(prefill_cases.build(case), 0, position, name, value)
    problem = spoiled.problem
    spoiled.check(*run(problem, TritonPrefill(prefill_request_of(problem, "sm90"), tile)))


@pytest.mark.parametrize("position", [24, 25, 26, 31, 32, 48, 63, 64])
@pytest.mark.parametrize(
    ("name", "value"), [("k_nope", torch.nan), ("k_pe", torch.nan), ("v", torch.nan), ("v", torch.inf)]
)
@pytest.mark.parametrize("tile", [PREFILL_TILE, PREFILL_DESCRIPTOR], ids=lambda tile: tile.loads)
def test_a_later_key_or_value_of_a_prefill_reaches_its_own_rows_alone(
    tile: PrefillTile, name: str, value: float, position: int
) -> None:
    solve_prefill(PrefillCase((40, 9, 30), (65, 9, 64), geometry=MINI), tile, position, name, value)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_later_value_of_any_width_reaches_its_own_rows_alone(geometry: tuple[int, int, int]) -> None:
    solve_prefill(PrefillCase((40, 9), (65, 9), 2, geometry, "fp16"), PREFILL_TILE, 50, "v", torch.nan)


def test_a_prefill_row_that_precedes_every_key_keeps_clear_of_them() -> None:
    solve_prefill(PrefillCase((40, 9), (5, 9), 2, MINI), PREFILL_TILE, 2, "v", torch.nan)
