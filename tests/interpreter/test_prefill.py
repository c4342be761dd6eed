"""Prefill and merge in the interpreter, held to the acceptance rule on poisoned inputs; and kernels broken in one line
each, which it catches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from portable_mla.backends.triton.config.prefill import PrefillTile
from portable_mla.backends.triton.prefill import runner as prefill_runner
from portable_mla.backends.triton.prefill.kernels import prefill as prefill_kernels
from portable_mla.backends.triton.prefill.runner import TritonPrefill
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Request
from portable_mla.dispatch.select import load
from portable_mla.prefill import merge
from portable_mla.prefill.kernels import merge as merge_kernels
from portable_mla.prefill.merge import launch_merge
from tests.contract.test_prefill import close, golden_merge, states
from tests.interpreter.test_broken_kernels import Mutant
from tests.support import prefill_cases
from tests.support.prefill_cases import GEOMETRIES, PrefillCase, PrefillProblem, Result, build

TILE = PrefillTile(32, 16, 4, 2)
DESCRIPTOR = replace(TILE, loads="descriptor")
MINI = GEOMETRIES[-1]

CASES = [
    (PrefillCase((1,), (1,)), TILE),
    (PrefillCase((5, 0, 130, 7), (5, 4, 200, 3)), TILE),
    (PrefillCase((5, 0, 130, 7), (5, 4, 200, 3)), DESCRIPTOR),
    (PrefillCase((5, 33), (5, 90), causal=False), TILE),
    (PrefillCase((5, 33), (5, 90), causal=False, dtype="fp16"), DESCRIPTOR),
    *((PrefillCase((40, 9), (65, 9), 2, geometry), tile) for geometry in GEOMETRIES for tile in (TILE, DESCRIPTOR)),
    (PrefillCase((0, 3, 0), (5, 0, 0), geometry=MINI, padding=70), TILE),
    (PrefillCase((0,), (0,), geometry=MINI), TILE),
    (PrefillCase((70, 64), (70, 64), geometry=MINI, content="neg_extreme"), TILE),
    (PrefillCase((70, 64), (70, 64), geometry=MINI, content="pos_extreme"), DESCRIPTOR),
    (PrefillCase((64, 3), (100, 80), geometry=MINI, content="needle", garbage="hot"), TILE),
    (PrefillCase((64, 3), (100, 80), geometry=MINI, content="ties", garbage="inf"), DESCRIPTOR),
    # more sequences than a program reads offsets of at once
    (PrefillCase((1, 3, 0) * 50, (3, 1, 2) * 50, 1, MINI), TILE),
    (PrefillCase((40, 35), (50, 70), 3, MINI), replace(TILE, num_xcds=4)),
]


def request_of(problem: PrefillProblem, arch: str) -> Request:
    """The problem's request, on an architecture."""
    return replace(problem.arguments.request(deterministic=False), arch=ARCHS[arch])


def run(problem: PrefillProblem, runner: TritonPrefill) -> Result:
    """Prefill into results full of NaN."""
    q = problem.inputs.q
    out = torch.full((*q.shape[:2], problem.inputs.v.shape[2]), torch.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:2], torch.nan)
    runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale)
    return out, lse


def solve(case: PrefillCase, tile: PrefillTile) -> None:
    """Prefill with this tile and hold the result to the rule."""
    problem = build(case)
    prefill_cases.check(problem, *run(problem, TritonPrefill(request_of(problem, "sm90"), tile)))


@pytest.mark.parametrize(("case", "tile"), CASES)
def test_prefill_is_within_the_acceptance_rule(case: PrefillCase, tile: PrefillTile) -> None:
    solve(case, tile)


@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "cpu"])
def test_the_tile_that_an_architecture_chooses_prefills(arch: str) -> None:
    problem = build(PrefillCase((150, 0, 3), (260, 7, 3), 2, MINI))
    request = request_of(problem, arch)
    backend = load("triton", request.arch.vendor)
    assert not backend.reasons_unsupported(request)
    runner = backend.bind(request)
    assert isinstance(runner, TritonPrefill)
    prefill_cases.check(problem, *run(problem, runner))


@pytest.mark.parametrize("tile", [TILE, DESCRIPTOR], ids=lambda tile: tile.loads)
def test_offsets_that_contradict_the_tensors_touch_no_memory_outside(tile: PrefillTile) -> None:
    problem = build(PrefillCase((40, 100), (50, 200), geometry=MINI))
    for wrong in ((0, 2**30, 2**31 - 1), (0, -5, 100), (500, 20, 10), (2**31 - 1, -(2**31), 1)):
        offsets = torch.tensor(wrong, dtype=torch.int32)
        outside, outside_lse = torch.full((3, 141, 3, 64), 7.0).bfloat16(), torch.full((3, 141, 3), 7.0)
        broken = problem.with_inputs(cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        TritonPrefill(request_of(problem, "sm90"), tile).run(
            broken.inputs, outside[1], outside_lse[1], softmax_scale=0.1
        )
        assert bool((outside[::2] == 7).all() and (outside_lse[::2] == 7).all())


def merged(parts: int, seed: int, width: int = 96) -> None:
    """Merge with the kernel, and compare."""
    outs, lses = states(parts, seed, "cpu")
    outs = outs[..., :width]
    out, lse = torch.full_like(outs[0], torch.nan), torch.full_like(lses[0], torch.nan)
    launch_merge((outs[0], lses[0]), (outs[1:], lses[1:]), out, lse)
    close((out, lse), golden_merge(outs, lses))


@pytest.mark.parametrize(("parts", "width"), [(1, 96), (2, 96), (5, 64), (3, 1)])
def test_the_merge_kernel_is_the_sum_over_all_keys(parts: int, width: int) -> None:
    merged(parts, 4, width)


def test_the_merge_kernel_writes_in_place() -> None:
    outs, lses = states(3, 5, "cpu")
    golden = golden_merge(outs, lses)
    launch_merge((outs[0], lses[0]), (outs[1:], lses[1:]), outs[0], lses[0])
    close((outs[0], lses[0]), golden)


RAGGED = PrefillCase((5, 130, 7), (5, 200, 3), geometry=MINI)
MUTANTS = {
    "the causal limit is one too high": ("kv_len - query_len + 1", "kv_len - query_len + 2", RAGGED),
    "the causal limit is one too low": ("kv_len - query_len + 1", "kv_len - query_len", RAGGED),
    "queries are aligned to the start": ("kv_len - query_len + 1", "1", RAGGED),
    "the last tile is left out": ("(most_limit + BLOCK_N - 1) // BLOCK_N", "most_limit // BLOCK_N", RAGGED),
    "a tile of the diagonal is taken for a full one": (
        "tile_full = least_limit // BLOCK_N",
        "tile_full = (least_limit + BLOCK_N - 1) // BLOCK_N",
        RAGGED,
    ),
    "nothing is rescaled": ("acc = acc * rescale[:, None]", "acc = acc", RAGGED),
    "rope is left out": ("scores = tl.dot(q_rope, tl.trans(k_pe), scores)", "scores = scores", RAGGED),
    "the rest of a wide key is left out": (
        "scores = tl.dot(q_rest, tl.trans(k_rest), scores)",
        "scores = scores",
        replace(RAGGED, geometry=GEOMETRIES[1]),
    ),
    "the logarithm has base 2": ("tl.log2(row_sum)) * LN_2", "tl.log2(row_sum))", RAGGED),
    "keys of another head": (
        "k_nope_ptr + wide_head * stride_nope_head",
        "k_nope_ptr + wide_head // 2 * stride_nope_head",
        RAGGED,
    ),
    "blocks are counted without rounding up": (
        "(tl.maximum(length, 0) + BLOCK_M - 1) // BLOCK_M",
        "tl.maximum(length, 0) // BLOCK_M",
        RAGGED,
    ),
    "padding is left as it was": ("tl.where(sequence < sequences, end, most)", "end", RAGGED),
}


@pytest.mark.parametrize(("line", "broken", "case"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_prefill_kernel_is_caught(
    line: str, broken: str, case: PrefillCase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    solve(case, TILE)
    twin = Mutant(prefill_kernels, line, broken).write(tmp_path)
    _launch_anew(monkeypatch, prefill_runner, "prefill_kernel", twin)
    with pytest.raises(AssertionError, match="^(out|lse)"):
        solve(case, TILE)


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("acc = acc * rescale[:, None] +", "acc = acc +"),
        ("total = total * rescale + weight", "total = total + weight"),
        ("for part in range(parts):", "for part in range(parts - 1):"),
        ("largest + tl.log(total)", "largest"),
        ('mask=mask & (lse != float("-inf"))[:, None]', "mask=mask"),
    ],
)
def test_a_broken_merge_kernel_is_caught(
    line: str, broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merged(4, 6)
    _launch_anew(monkeypatch, merge_kernels, "merge_kernel", Mutant(merge_kernels, line, broken).write(tmp_path))
    with pytest.raises(AssertionError):
        merged(4, 6)


def _launch_anew(monkeypatch: pytest.MonkeyPatch, user: ModuleType, kernel: str, twin: ModuleType) -> None:
    """Nobody keeps a launch of the sound kernel, nor afterwards one of its twin."""
    for module, name in ((prefill_runner, "_launch"), (merge, "_merge_launch")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    monkeypatch.setattr(user, kernel, getattr(twin, kernel))
