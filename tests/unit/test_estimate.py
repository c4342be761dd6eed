"""The model of a decode's time is within 1.5 of what an H100 took, and says what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ci.compile.table import PATH, rendered
from portable_mla.backends.triton.backend import GEOMETRIES, TritonBackend
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.cli.estimate import IN_TURN, Compiled, compiled_kernel, estimate, kernel_name, portable_work
from portable_mla.cli.explain import Question
from portable_mla.cli.hardware import PARTS
from portable_mla.dispatch.select import load
from tests.support.invoking import invoke, invoke_json

pytestmark = pytest.mark.usefixtures("plain_environment")

# batch, heads, context: us a call on one H100 80GB HBM3, bf16, page 64, cold L2, combine included.
GLUON = {
    (1, 128, 1024): 9, (1, 128, 8192): 15.3, (1, 128, 81920): 48, (8, 128, 8192): 40.6, (32, 128, 4096): 70,
    (128, 128, 4096): 237.6, (64, 128, 16384): 452.5, (1, 64, 1024): 8.4, (1, 64, 8192): 13.7, (1, 64, 81920): 45.5,
    (8, 64, 8192): 37.2, (32, 64, 4096): 62.5, (128, 64, 4096): 214.7, (64, 64, 16384): 425.8, (1, 16, 1024): 7.3,
    (1, 16, 8192): 11.9, (1, 16, 81920): 42.5, (8, 16, 8192): 34.3, (32, 16, 4096): 58.9, (128, 16, 4096): 212.5,
    (64, 16, 16384): 414.8,
}  # fmt: skip
TRITON = {
    (1, 128, 1024): 17.6, (1, 128, 8192): 25.8, (1, 128, 81920): 101, (8, 128, 8192): 87.0, (32, 128, 4096): 157,
    (128, 128, 4096): 530, (64, 128, 16384): 1075, (1, 64, 8192): 23.0, (128, 64, 4096): 302, (64, 64, 16384): 554,
    (1, 16, 8192): 13.9, (1, 16, 81920): 48.7, (8, 16, 8192): 39.5, (128, 16, 4096): 229, (64, 16, 16384): 423,
}  # fmt: skip
MEASURED = [(name, *key, us) for name, table in (("gluon", GLUON), ("triton", TRITON)) for key, us in table.items()]


@pytest.mark.parametrize(("backend", "batch", "heads", "context", "measured"), MEASURED)
def test_it_is_within_one_and_a_half_of_a_measurement(
    backend: str, batch: int, heads: int, context: int, measured: float
) -> None:
    found = estimate(Question("sm90", heads=heads, batch=batch, context=context).request(), backend)
    print(f"{found.total * 1e6:.1f} us, {found.total * 1e6 / measured:.2f} of the measured, bound by {found.bound}")
    assert 1 / 1.5 <= found.total * 1e6 / measured <= 1.5


@pytest.mark.parametrize("arch", PARTS)
@pytest.mark.parametrize("heads", [5, 16, 32, 64, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_every_tile_of_a_known_part_has_a_compiled_kernel_whose_products_the_model_explains(
    arch: str, heads: int, page_size: int
) -> None:
    for latent_dim, rope_dim in GEOMETRIES:
        asked = Question(arch, heads=heads, page_size=page_size).request()
        shape = replace(asked.shape, latent_dim=latent_dim, rope_dim=rope_dim)
        request = replace(asked, shape=shape)
        backend = load("triton", request.arch.vendor)
        assert isinstance(backend, TritonBackend)
        tile = backend.tile(request)
        compiled = compiled_kernel(arch, kernel_name(request, tile))
        assert portable_work(request, PARTS[arch], tile, compiled).cycles() > 0


# Tiles that an H100 was made to use at (128, 128, 4096): keys of a tile, rows, warps, us; all of mma.sync.
FORCED = [(32, 16, 4, 1314), (32, 32, 4, 1210), (64, 16, 4, 957), (64, 32, 8, 784)]


@pytest.mark.parametrize(("block_n", "block_h", "warps", "measured"), FORCED)
def test_tiles_of_other_parts_on_an_h100_are_within_one_and_a_half(
    block_n: int, block_h: int, warps: int, measured: float
) -> None:
    request = Question("sm90", heads=128).request()
    issued = 2 * block_h * block_n * 1088 // 4096 // warps
    work = portable_work(
        request, PARTS["sm90"], Tile(block_h, block_n, warps, 2), Compiled(255, 0, 0, {"HMMA": issued})
    )
    tiles = 128 * (128 // block_h) * (4096 // block_n) / request.arch.units
    found = tiles * work.cycles() / PARTS["sm90"].clock * 1e6
    print(f"{found:.0f} us, {found / measured:.2f} of the measured")
    assert 1 / 1.5 <= found / measured <= 1.5


def test_two_warps_leave_half_of_the_matrix_units_idle_but_where_two_programs_share_them() -> None:
    request, part = Question("gfx942", heads=16).request(), PARTS["gfx942"]
    two, four = (
        portable_work(request, part, Tile(16, 32, warps, 1), Compiled(256, 0, 0, {"16x16x16_bf16": issued}))
        for warps, issued in ((2, 104), (4, 88))
    )
    assert two.cycles() - two.cycles(2) == pytest.approx(two.matrix * IN_TURN)
    assert two.cycles(2) == two.cycles(3)
    assert four.cycles() == four.cycles(2)


def test_the_table_is_what_the_budgets_say() -> None:
    assert PATH.read_text() == rendered(), "run python -m ci.compile.table"


@pytest.mark.parametrize("arch", PARTS)
def test_explain_shows_an_estimate_and_calls_it_a_model(arch: str) -> None:
    options = ("explain", "--arch", arch, "--heads", "16", "--batch", "32", "--estimate")
    text = invoke(*options).stdout
    assert f"us on {PARTS[arch].name} (" in text
    assert "model, not a measurement: about" in text
    assert "bound: " in text
    assert ("never run here" in text) == (arch != "sm90")
    found = invoke_json(*options)["estimate"]
    assert found["measured"] is False
    assert found["microseconds"] > found["launch_microseconds"] > 0
    assert found["bound"] == "launches" or found["bound"] in found["overlapping_microseconds"]


def test_without_being_asked_explain_estimates_nothing() -> None:
    assert "estimate" not in invoke_json("explain", "--arch", "sm90")


@pytest.mark.parametrize("options", [("--arch", "sm80"), ("--arch", "cpu")])
def test_what_has_no_figures_is_refused_with_what_has(options: tuple[str, ...]) -> None:
    result = invoke("explain", *options, "--estimate")
    assert result.exit_code != 0
    assert "expected a decode of a bf16 or fp16 cache with one of triton, gluon on one of sm90, sm120" in result.stderr


def test_more_work_takes_more_time() -> None:
    def microseconds(batch: int = 32, context: int = 4096, heads: int = 16) -> float:
        return estimate(Question("gfx942", heads=heads, batch=batch, context=context).request(), "triton").total

    base = microseconds()
    assert microseconds(batch=64) > base
    assert microseconds(context=16384) > base
    assert microseconds(heads=128) > base
