"""What the portable runner launches, and what calls that are alike share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_mla.core.cache_format import CacheFormat
from portable_mla.dispatch.interface import CallMemo, DecodeInputs
from portable_mla.metadata import DecodeMetadata, Status
from tests.support.cases import Case, Problem, build
from tests.support.library_machine import request, shape

pytest.importorskip("triton", reason="needs the package triton")

from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode import runner as runner_module
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.metadata.split_plan.plan import SplitPlan
from tests.support.launches import Launched, note_launches

CPU = torch.device("cpu")
POINTERS, DESCRIPTORS = Tile(16, 64, 4, 3), Tile(16, 64, 4, 3, "descriptor")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Launches, by kernel and argument."""
    return note_launches(monkeypatch)


def planned(tile: Tile, problem: Problem, cache_format: CacheFormat = CacheFormat.bf16) -> tuple[TritonRunner, Any]:
    """A runner of Hopper's with a plan for the problem."""
    runner = TritonRunner(replace(request("sm90"), shape=shape(cache_format=cache_format)), tile)
    metadata = DecodeMetadata(problem.batch, Status.allocate(CPU), SplitPlan.allocate(runner.plan_shape, CPU))
    runner.plan(metadata)
    return runner, metadata


@pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=lambda tile: tile.loads)
def test_calls_that_are_alike_share_a_layout_that_holds_no_tensor_of_theirs(tile: Tile, launched: Launched) -> None:
    problem, memo = build(Case((70, 5), heads=16, page_size=64)), CallMemo()
    runner, metadata = planned(tile, problem)
    for call in range(4):
        q, cache = problem.q.clone(), problem.kv_cache.clone()
        out, lse = torch.empty_like(q[..., :512]), torch.zeros(q.shape[:2])
        runner.run(DecodeInputs(q, cache, memo), out, lse, softmax_scale=0.5 * call)
        assert (memo.layout is None) == (call == 0), "the first launches compile"
        if call:
            (decode, given), (combine, merged) = launched[-2:]
            assert (decode, combine) == ("decode_kernel", "combine_kernel")
            assert given["q_ptr"] is q and given["softmax_scale"] == 0.5 * call
            assert given["out_ptr"] is merged["out_ptr"] is out and given["lse_ptr"] is merged["lse_ptr"] is lse
            assert merged["token_slots_ptr"] is metadata.split_plan.token_slots
            described = [value.base for value in given.values() if hasattr(value, "block_shape")]
            assert all(base is cache for base in described) and len(described) == 2 * (tile is DESCRIPTORS)
    assert len(launched) == 6
    assert all(descriptor is None or descriptor.base is None for descriptor in memo.layout.descriptors)


def test_a_scale_at_another_alignment_is_another_layout(launched: Launched) -> None:
    problem, memo = build(Case((70, 5), heads=16, page_size=64)), CallMemo()
    runner, _ = planned(POINTERS, problem, CacheFormat.fp8_e4m3)
    scales = torch.ones(8)
    inputs = DecodeInputs(problem.q, problem.kv_cache.to(torch.float8_e4m3fn), memo)
    layouts = []
    for scale in (scales[0], scales[0], scales[4], scales[1], scales[1]):
        out, lse = torch.empty_like(problem.q[..., :512]), torch.zeros(problem.q.shape[:2])
        runner.run(inputs, out, lse, softmax_scale=0.1, kv_scale=scale)
        layouts.append(memo.layout)
    assert layouts[0] is None and layouts[1] is not None
    assert layouts[2] is layouts[1], "16 bytes further"
    assert layouts[4] is not layouts[1], "4 bytes further"


def test_on_amd_where_a_storage_ends_is_asked_again(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "built_for_amd", lambda: True)
    ends: list[bool] = [True]
    monkeypatch.setattr(runner_module, "alignment", lambda *tensors: (len(tensors) == 5, *ends))
    problem, memo = build(Case((70, 5), heads=16, page_size=64)), CallMemo()
    runner, _ = planned(POINTERS, problem)
    out, lse = torch.empty_like(problem.q[..., :512]), torch.zeros(problem.q.shape[:2])
    layouts = []
    for end in (True, True, True, False, False):
        ends[:] = [end]
        runner.run(DecodeInputs(problem.q, problem.kv_cache, memo), out, lse, softmax_scale=0.1)
        layouts.append(memo.layout)
    assert layouts[1] is layouts[2] and layouts[4] is not layouts[2]
    assert layouts[4].apart == (True, False)
