"""The interpreter suite can fail: kernels broken in one line each are caught by the acceptance rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest

from portable_mla.backends.triton.combine import runner as combine
from portable_mla.backends.triton.combine.kernels import combine as combine_kernels
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode import runner
from portable_mla.backends.triton.decode.kernels import decode as decode_kernels
from portable_mla.backends.triton.decode.kernels import keys as key_kernels
from portable_mla.backends.triton.decode.kernels import pairs as pair_kernels
from portable_mla.backends.triton.decode.kernels import pairs_decode as pair_decode_kernels
from portable_mla.backends.triton.decode.kernels import tiles as tile_kernels
from portable_mla.metadata.split_plan import plan as split_plan
from portable_mla.metadata.split_plan.kernels import plan as split_kernels
from tests.interpreter.running import DESCRIPTOR, MANY_PARTS, SMALL, TILE, solve_with_tile
from tests.support.cases import Case

LONG = Case((400, 100), 16, **SMALL)
NEEDLE = Case((700, 100), 16, **SMALL, content="needle", garbage="hot", seed=1)
TALL = Case((1500,), 40, **SMALL)  # more splits than one step of the combine of few rows takes
SEVERAL_QUERIES = Case((90, 40), 5, **SMALL, max_query_len=3)
MANY_ROWS = Case((300, 200), 64, **SMALL)  # more than the one token that one unit combines in the way of few rows


@dataclass(frozen=True)
class Mutant:
    """One line of a kernel module, and what it becomes. arch: whose conversion of fp8 it goes through."""

    module: ModuleType
    line: str
    broken: str
    case: Case = LONG
    tile: Tile = TILE
    units: int = 6
    arch: str = "sm90"

    def write(self, folder: Path) -> ModuleType:
        """The broken module, in a file, because the interpreter reads sources."""
        assert self.module.__file__ is not None
        source = Path(self.module.__file__).read_text()
        assert source.count(self.line) == 1, f"{self.module.__name__} has no single {self.line!r}"
        path = folder / Path(self.module.__file__).name
        path.write_text(source.replace(self.line, self.broken))
        spec = importlib.util.spec_from_file_location(f"broken_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


LAUNCHES = {
    decode_kernels: (runner, ("decode_kernel",)),
    key_kernels: (decode_kernels, ("load_latent", "load_rope")),
    pair_decode_kernels: (decode_kernels, ("attend_pairs",)),
    pair_kernels: (pair_decode_kernels, ("join_quarters", "query_units", "split_pairs")),
    tile_kernels: (decode_kernels, ("key_rows", "load_pages")),
    combine_kernels: (combine, ("combine_kernel",)),
    split_kernels: (split_plan, ("plan_splits_kernel",)),
}
NO_RESCALE = (combine_kernels, "acc = acc * rescale[:, None] + tl.sum(", "acc = acc + tl.sum(")
SCALED = Case((100, 40), 16, **SMALL, cache="fp8_e4m3")
GROUPED = Case((100, 40), 16, cache="fp8_656", seed=1)
PAIRS = replace(TILE, conversion="pairs")
MUTANTS = {
    "the last token is dropped": Mutant(
        tile_kernels,
        "return position, position < kv_len, offset",
        "return tl.where(position == kv_len - 1, kv_len, position), position < kv_len - 1, offset",
    ),
    "the causal limit is one too high": Mutant(
        decode_kernels, "(token - query_start) + 1", "(token - query_start) + 2", SEVERAL_QUERIES
    ),
    "the causal limit is one too low": Mutant(
        decode_kernels, "(token - query_start) + 1", "(token - query_start)", SEVERAL_QUERIES
    ),
    "the last tile of a descriptor counts rows twice": Mutant(
        decode_kernels,
        "position = tl.where(position >= tile * BLOCK_N, position, kv_len)",
        "position = tl.where(position >= 0, position, kv_len)",
        tile=DESCRIPTOR,
    ),
    "the page stays the first tile's": Mutant(decode_kernels, "page = next_page", "page = page", NEEDLE),
    "decode does not rescale": Mutant(decode_kernels, "acc = acc * rescale[:, None]", "acc = acc"),
    "combine does not rescale, few rows": Mutant(*NO_RESCALE, TALL, units=180),
    "combine does not rescale, many rows": Mutant(*NO_RESCALE, MANY_ROWS, MANY_PARTS, units=1),
    "combine leaves out the last split": Mutant(combine_kernels, "(slot < slot_hi)", "(slot < slot_hi - 1)"),
    "combine writes the base-2 logarithm": Mutant(combine_kernels, "tl.log2(total)) * LN_2", "tl.log2(total))"),
    "the scale is not in the scores": Mutant(
        decode_kernels,
        "softmax_scale *= load_kv_scale(kv_scale_ptr)",
        "softmax_scale *= 1.0",
        SCALED,
    ),
    "the scale is not in the output": Mutant(decode_kernels, "acc *= tl.load(kv_scale_ptr)", "acc *= 1.0", SCALED),
    "fp8 bits are read with the other bias": Mutant(
        key_kernels, 'FLOAT8 == "e4m3fnuz")', 'FLOAT8 == "e4m3")', SCALED, arch="sm80"
    ),
    "no group has its scale": Mutant(
        key_kernels, "valid, 0, LATENT // GROUP)", "valid, 0, LATENT // GROUP) * 0 + 1.0", GROUPED
    ),
    "rope is read where the scales are": Mutant(
        key_kernels, "(kv_ptr + LATENT + LATENT // GROUP * 4)", "(kv_ptr + LATENT)", GROUPED
    ),
    "even columns are taken for odd ones": Mutant(pair_kernels, "0x3120", "0x2031", SCALED, PAIRS),
    "the power of two is not the queries'": Mutant(
        pair_kernels, "inverse = (254 << 23) - power", "inverse = (253 << 23) - power", SCALED, PAIRS
    ),
    "runs of columns change places": Mutant(
        pair_kernels, "_join_halves(a, b), _join_halves(c, d)", "_join_halves(a, c), _join_halves(b, d)", SCALED, PAIRS
    ),
    "weights do not follow the largest scale": Mutant(
        pair_decode_kernels,
        "rescale *= largest / new_largest",
        "rescale *= 1.0",
        Case((900, 100), 16, content="fingerprint", cache="fp8_656"),
        PAIRS,
    ),
    "a group's scale is not in its scores": Mutant(
        pair_decode_kernels, "q_2, pairs_2) * tl.trans(scale_2)", "q_2, pairs_2) * tl.trans(scale_1)", GROUPED, PAIRS
    ),
    "a group's scale is not in its values": Mutant(
        pair_decode_kernels, "weights * tl.trans(scale_3)", "weights * tl.trans(scale_2)", GROUPED, PAIRS
    ),
    "pairs do not rescale": Mutant(
        pair_decode_kernels,
        "tl.dot(weights, odd, acc_odd * rescale[:, None])",
        "tl.dot(weights, odd, acc_odd)",
        SCALED,
        PAIRS,
    ),
    "the plan drops a tile at each cut": Mutant(
        split_kernels, "(part + 1) * share - origin)", "(part + 1) * share - origin - 1)"
    ),
}


@pytest.fixture
def launches_anew() -> Iterator[None]:
    """No launch outlives the test: the planner remembers its own."""
    split_plan._launch_of.cache_clear()
    yield
    split_plan._launch_of.cache_clear()


@pytest.mark.usefixtures("launches_anew")
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    solve_with_tile(mutant.case, mutant.tile, mutant.units, mutant.arch)
    user, kernels = LAUNCHES[mutant.module]
    split_plan._launch_of.cache_clear()
    broken = mutant.write(tmp_path)
    for kernel in kernels:
        monkeypatch.setattr(user, kernel, getattr(broken, kernel))
    with pytest.raises(AssertionError, match="^(out|lse)") as caught:
        solve_with_tile(mutant.case, mutant.tile, mutant.units, mutant.arch)
    print(caught.value)
