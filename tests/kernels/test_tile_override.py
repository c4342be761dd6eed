"""Kernels of other NVIDIA architectures, made for the GPU at hand: what a compiler without a GPU can say of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from ci.tile_override import arch_with_tiles_of
from portable_mla.backends.triton.config.decode import choose_tile
from portable_mla.backends.triton.config.nvidia import PREFILL_RULES
from portable_mla.backends.triton.config.prefill import PrefillTile, PrefillTileRequest
from portable_mla.backends.triton.prefill import runner as prefill_runner
from portable_mla.backends.triton.prefill.runner import TritonPrefill
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Request
from tests.support import prefill_cases, targets
from tests.support.prefill_cases import PrefillCase, build
from tests.support.targets import Target

ROOT = Path(__file__).parents[2]
# The decode kernel of 64 rows with sm80's tile, compiled for an H100 after force_code.
PROGRAM = """
import sys
from unittest.mock import patch

import torch

from ci.compile import cross_compile
from ci.compile.gate import decode_request, rule_of
from ci.tile_override import force_code
from portable_mla.backends.triton.config.decode import TileRequest
from portable_mla.core.arch import ARCHS

name, made = sys.argv[1], []
if name != "sm90":
    force_code(name, ARCHS["sm90"])
rows = TileRequest(64, 512, 64, 64)
request = decode_request("sm90", rows, torch.bfloat16)
tile = rule_of("sm80", rows).tile
with patch.object(cross_compile.Resources, "of", lambda compiled: made.append(compiled)):
    cross_compile.compile_decode(request, tile)
loaded = made[0].asm["cubin"]
text = made[0].asm["ptx"]
target = next(line for line in text.splitlines() if line.startswith(".target"))
print(target, "wgmma" in text, "mma.sync" in text, loaded.rstrip(b"\\0") == text.encode(), loaded[-1] == 0)
"""


def compiled_as(name: str, cache: Path) -> list[str]:
    """The PTX's target, whether it has wgmma and mma.sync, whether it is what would be loaded, and ends in NUL."""
    environ = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(",", "").split()[1:]


def test_unforced_the_tile_uses_wgmma(tmp_path: Path) -> None:
    assert compiled_as("sm90", tmp_path)[:3] == ["sm_90a", "True", "False"]


@pytest.mark.parametrize("name", ["sm80", "sm89"])
def test_an_older_architectures_code_is_its_ptx(name: str, tmp_path: Path) -> None:
    assert compiled_as(name, tmp_path) == [name.replace("sm", "sm_"), "False", "True", "True", "True"]


def test_a_newer_architectures_tiles_are_compiled_for_this_gpu_without_wgmma(tmp_path: Path) -> None:
    assert compiled_as("sm120", tmp_path)[:4] == ["sm_90a", "False", "True", "False"]


@pytest.mark.parametrize("name", [name for name, arch in ARCHS.items() if arch.vendor == "nvidia"])
def test_tiles_of_every_architecture_fit_an_h100_and_keep_its_units(name: str) -> None:
    local = ARCHS["sm90"]
    arch = arch_with_tiles_of(name, local)
    assert (arch.name, arch.units) == (name, local.units)


@pytest.mark.parametrize(
    ("name", "local"), [("gfx942", "sm90"), ("sm80", "gfx942"), ("sm90", "sm120"), ("sm80", "cpu")]
)
def test_tiles_that_cannot_run_are_refused(name: str, local: str) -> None:
    with pytest.raises(ValueError, match=f"of {local}, got {name}"):
        arch_with_tiles_of(name, ARCHS[local])


def test_a_target_says_whose_tiles_it_has() -> None:
    assert str(Target("cuda", "triton", "sm120")) == "triton-with-sm120-tiles-on-cuda"


@pytest.mark.parametrize("name", ["sm80", "sm89", "sm120"])
def test_a_prefill_has_the_tiles_that_are_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "arch_of", lambda device: ARCHS["sm90"])
    tiles, launched = [], []
    monkeypatch.setattr(prefill_runner.TritonPrefill, "run", lambda bound, *results, **scale: launched.append(results))
    bind = prefill_runner.TritonPrefill.__init__

    def note(bound: TritonPrefill, request: Request, tile: PrefillTile) -> None:
        tiles.append((request.arch.name, request.arch.units, tile))
        bind(bound, request, tile)

    monkeypatch.setattr(prefill_runner.TritonPrefill, "__init__", note)
    case = PrefillCase((3,), (3,), geometry=(192, 64, 256))
    prefill_cases.run(Target("cpu", "triton", name), build(case))
    expected = choose_tile(PREFILL_RULES[name], PrefillTileRequest(256, 256))
    assert tiles == [(name, ARCHS["sm90"].units, expected)]
    assert len(launched) == 1
