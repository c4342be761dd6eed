"""Hopper's Gluon kernel without a Hopper: what it refuses and why, its plan, and what its compiled variants use."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portable_mla import explain
from portable_mla.core.arch import ARCHS
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.interface import CallMemo, DecodeInputs
from portable_mla.dispatch.select import load
from portable_mla.metadata import DecodeMetadata, Status
from portable_mla.runtime.kernel_launch import KernelLaunch
from tests.support.cases import Case, build

pytest.importorskip("triton", reason="needs the package triton")

from portable_mla.backends.nvidia.hopper import backend as sm90
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode.runner import TritonRunner

ROOT = Path(__file__).parents[2]
SHAPE = MLAShape(128, 512, 64, 64, torch.bfloat16, CacheFormat.bf16)
CAPACITY = Capacity(
    max_batch=64, max_query_tokens=64, max_query_len=1, max_context=4096, max_pages=1 << 16, cache_bytes=1 << 30
)
REQUEST = Request(ARCHS["sm90"], SHAPE, Phase.decode, 1, True, False, CAPACITY)


def test_it_comes_first_and_triton_serves_what_it_refuses() -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    assert explain(REQUEST).chosen == "gluon"
    assert explain(replace(REQUEST, deterministic=True)).chosen == "triton"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (replace(REQUEST, shape=replace(SHAPE, page_size=1)), "page_size"),
        (replace(REQUEST, shape=replace(SHAPE, page_size=48)), "page_size"),
        (replace(REQUEST, shape=replace(SHAPE, latent_dim=256)), "latent+rope"),
        (replace(REQUEST, shape=replace(SHAPE, heads=129)), "heads"),
        (replace(REQUEST, shape=replace(SHAPE, q_dtype=torch.float16)), "queries"),
        (replace(REQUEST, max_query_len=9), "query tokens"),
        (replace(REQUEST, deterministic=True), "deterministic"),
    ],
)
def test_it_refuses_by_name_what_it_is_not_built_for(changed: Request, reason: str) -> None:
    assert any(reason in line for line in explain(changed, "gluon").candidates[0].reasons)


def test_a_triton_without_a_name_is_refused_and_the_name_is_said() -> None:
    def find(module: str) -> Any:
        if module.endswith("hopper.tma"):
            return object()
        if module.endswith("hopper.mbarrier"):
            raise ImportError(module)
        return importlib.import_module(module)

    missing = sm90.missing_names(find)
    assert [name.rsplit(".", 1)[1] for name in missing] == ["expect", "async_load"]


def test_a_cache_is_seen_as_rows_where_its_strides_allow_it() -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode.runner import page_rows

    dense = torch.empty(5, 64, 576, dtype=torch.bfloat16)
    assert page_rows(dense) == 64
    assert page_rows(torch.empty(5, 2, 64, 584, dtype=torch.bfloat16)[:, 1, :, 8:]) == 128
    assert page_rows(dense.as_strided((3, 64, 576), (64 * 576 + 16, 576, 1))) == 0, "pages that are no whole rows apart"
    assert page_rows(dense.as_strided((3, 64, 576), (64 * 577, 577, 1))) == 0, "rows that start at odd addresses"
    assert page_rows(dense.flatten()[1:].as_strided((3, 64, 576), (64 * 576, 576, 1))) == 0, (
        "a cache that starts at one"
    )
    assert page_rows(dense[:1]) == 64


def test_a_cache_is_described_by_pages_and_small_ones_by_rows() -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode.runner import cache_descriptors

    layers = torch.empty(5, 2, 128, 576, dtype=torch.bfloat16)
    pages, boxes = cache_descriptors(layers[:, 1], 256, 4)
    assert (pages.shape, pages.strides, pages.block_shape) == ([5, 128, 576], [256 * 576, 576, 1], [1, 64, 64])
    assert (boxes.shape, boxes.strides) == ([9, 5, 128, 64], [64, 256 * 576, 576, 1])
    assert boxes.block_shape == [4, 1, 64, 64]
    rows, same = cache_descriptors(torch.empty(5, 2, 32, 576, dtype=torch.bfloat16)[:, 0], 64, 4)
    assert rows is same
    assert (rows.shape, rows.strides, rows.block_shape) == ([4 * 64 + 32, 576], [576, 1], [32, 64])


def ragged(request: Request, heads: int, max_query_len: int) -> Request:
    """The request with ragged queries."""
    shape = replace(request.shape, heads=heads)
    return replace(request, shape=shape, max_query_len=max_query_len, uniform_queries=False)


@pytest.mark.parametrize(("heads", "block_q"), [(1, 8), (8, 8), (16, 4), (20, 3), (64, 1), (80, 1), (128, 1)])
def test_a_unit_of_a_ragged_batch_fills_the_row_tiles_that_one_token_needs(heads: int, block_q: int) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    request = ragged(REQUEST, heads, 8)
    backend = load("gluon", "nvidia")
    shape = backend.needs(request).split_plan
    assert shape is not None
    assert (shape.block_q, shape.block_n) == (block_q, 64)
    assert shape.parts == 132 // -(-heads * block_q // 64)
    assert -(-heads * block_q // 64) == -(-heads // 64), "no more row tiles than one token's heads need"
    whole = backend.needs(replace(request, uniform_queries=True)).split_plan
    assert whole is not None
    assert whole.block_q == 8, "a uniform batch reads each row once for all of a request's query tokens"


def test_an_odd_cache_gets_a_plan_of_its_own_on_first_need_and_each_step_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode import fallback as sm90_portable
    from portable_mla.metadata.split_plan.plan import SplitPlan

    planned: list[int] = []
    monkeypatch.setattr(
        SplitPlan, "update", lambda self, batch, status, page_size, max_pages: planned.append(max_pages)
    )
    memos: list[CallMemo | None] = []
    monkeypatch.setattr(TritonRunner, "run", lambda self, inputs, *_, **__: memos.append(inputs.memo))
    path = sm90_portable.PortablePath(REQUEST, Tile(64, 64, 8, 2))
    problem = build(Case((70, 5), heads=128, page_size=64))
    metadata = DecodeMetadata(problem.batch, Status.allocate(torch.device("cpu")))
    out, lse = problem.q[..., :512], torch.zeros(problem.q.shape[:2])
    path.plan(metadata)
    assert (planned, path.memory()) == ([], {})
    for _ in range(2):
        path.run(metadata, problem.inputs._replace(memo=CallMemo()), out, lse, 1.0)
    assert memos == [None, None], "a memo is of one runner"
    pages = problem.kv_cache.shape[0]
    assert planned == [pages], "two layers share a plan"
    path.plan(metadata)
    path.run(metadata, problem.inputs, out, lse, 1.0)
    assert planned == [pages, pages]
    path.run(metadata, problem.with_cache(problem.kv_cache[1:]).inputs, out, lse, 1.0)
    assert planned == [pages, pages, pages - 1], "page ids must be right for the smallest cache"
    assert next(iter(path.memory().values())) > 0


def test_a_call_gives_both_kernels_what_their_signatures_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode.runner import Sm90Runner
    from portable_mla.metadata.split_plan.plan import SplitPlan
    from tests.support.launches import Launched, noted

    launched: Launched = []

    def at(self: KernelLaunch, key: object, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            assert set(self._kernel.arg_names[len(arguments) :]) <= set(self._constants)
            assert len(arguments) + len(self._trailing) == len(self._kernel.arg_names)
            given = dict(zip(self._kernel.arg_names, map(noted, arguments), strict=False))
            launched.append((self._kernel.__name__, given))

        hash(key)
        return launch

    monkeypatch.setattr(KernelLaunch, "at", at)
    problem = build(Case((70, 5, 9), heads=20, page_size=64, query_lens=(3, 1, 2), max_query_len=3))
    runner = Sm90Runner(ragged(REQUEST, 20, 3), Tile(64, 64, 8, 2))
    plan = SplitPlan.allocate(runner.plan_shape, torch.device("cpu"))
    runner.plan(DecodeMetadata(problem.batch, Status.allocate(torch.device("cpu")), plan))
    memory = runner.memory()
    out, lse = torch.empty_like(problem.q[..., :512]), torch.zeros(problem.q.shape[:2])
    runner.run(problem.inputs, out, lse, softmax_scale=0.1)
    (decode, given), (combine, _) = launched
    assert (decode, combine) == ("sm90_decode_kernel", "combine_kernel")
    assert (given["tokens"], given["page_rows"], given["max_rows"]) == (6, 64, 60)
    assert (given["stride_slot"], given["stride_out_token"], given["stride_lse_token"]) == (576, 20 * 512, 20)
    assert (given["q_desc"].shape, given["q_desc"].block_shape) == ([120, 576], [64, 64])
    pages = problem.kv_cache.shape[0]
    assert (given["kv_desc"].shape, given["kv_desc"].block_shape) == ([pages, 64, 576], [1, 64, 64])
    assert (given["box_desc"].shape, given["box_desc"].strides) == ([9, pages, 64, 64], [64, 64 * 576, 576, 1])
    assert given["status_ptr"].dtype == given["table_header_ptr"].dtype == torch.int64
    assert runner.memory() == memory
    wide = torch.zeros(6, 22, 576, dtype=problem.q.dtype)
    wide[:, 1:-1] = problem.q
    runner.run(problem.with_q(wide[:, 1:-1]).inputs, out, lse, softmax_scale=0.1)
    copied = launched[2][1]["q_desc"].base
    assert torch.equal(copied, problem.q), "queries that are no rows of one matrix are copied"
    assert runner.memory()["query copy"] == 64 * 20 * 576 * 2


def test_calls_that_are_alike_share_a_layout_that_holds_no_tensor_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode.runner import Sm90Runner
    from portable_mla.metadata.split_plan.plan import SplitPlan
    from tests.support.launches import note_launches

    launched = note_launches(monkeypatch)
    runner = Sm90Runner(REQUEST, Tile(64, 64, 8, 2))
    device, memo = torch.device("cpu"), CallMemo()
    problem = build(Case((70, 5), heads=128, page_size=64))
    for call in range(4):
        plan = SplitPlan.allocate(runner.plan_shape, device)
        runner.plan(DecodeMetadata(problem.batch, Status.allocate(device), plan))
        q, cache = problem.q.clone(), problem.kv_cache.clone()
        out, lse = torch.empty_like(q[..., :512]), torch.zeros(q.shape[:2])
        runner.run(DecodeInputs(q, cache, memo), out, lse, softmax_scale=0.1 * call)
        assert (memo.layout is None) == (call == 0), "the first launches compile"
        if call:
            (_, decode), (_, combine) = launched[-2:]
            assert decode["q_desc"].base is q and decode["kv_desc"].base is decode["kv_ptr"] is cache
            assert decode["box_desc"].base is cache and decode["box_desc"].block_shape == [2, 1, 64, 64]
            assert decode["heads_ptr"] is plan.heads is not None
            assert decode["table_header_ptr"] is plan.table_header and decode["items_ptr"] is plan.items
            assert combine["token_slots_ptr"] is plan.token_slots
            for given in (decode, combine):
                assert given["out_ptr"] is out and given["lse_ptr"] is lse
                assert given.get("softmax_scale", 0.1 * call) == 0.1 * call
    assert memo.layout.q_desc.base is None and memo.layout.kv_desc.base is None
    assert memo.layout.box_desc.base is None


LOAD = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2, {%r3, %r4}], [%r5];"


def test_loads_behind_a_mark_and_no_others_are_rewritten() -> None:
    from portable_mla.backends.nvidia.hopper import eviction as sm90_eviction

    mark = f"// {sm90_eviction.MARK}; // %r9\n\tmov.b32 %r1, 7;\n"
    hinted = sm90_eviction.evict_first(f"{mark}\t@%p1 {LOAD}\n\t{LOAD}\n{mark}\t{LOAD}\n")
    assert hinted.count(".L2::cache_hint [%r1], [%rd2, {%r3, %r4}], [%r5], policy;") == 2
    assert hinted.count(f"\t{LOAD}") == 1, "the load that no mark precedes"
    assert "@%p1 cp.async" in hinted
    for dimensions in ("3d", "4d"):
        box = LOAD.replace("2d", dimensions)
        assert sm90_eviction.evict_first(f"{mark}\t{box}\n").count(".L2::cache_hint [%r1]") == 1
    for unknown in (f"\t{LOAD}\n", f"{mark}\tcp.async.bulk.tensor.3d.shared [%r1];\n\t{LOAD}\n"):
        assert sm90_eviction.evict_first(unknown) == unknown


def test_compilations_are_rewritten_within_alone_and_a_hook_that_is_there_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton import knobs

    from portable_mla.backends.nvidia.hopper import eviction as sm90_eviction

    seen: list[tuple[Any, ...]] = []

    def before(*arguments: Any) -> Any:
        seen.append(arguments)
        return ("key", "hash")

    monkeypatch.setattr(sm90_eviction, "POLICY", {})
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", before, raising=False)
    stages = {"ptx": lambda source, metadata: source + metadata}
    with sm90_eviction.rewriting():
        hook: Any = knobs.runtime.add_stages_inspection_hook
        assert hook() == (f"key {sm90_eviction.MARK}", f"hash {sm90_eviction.MARK}")
        hook("backend", stages, "options", "language", 90)
    assert knobs.runtime.add_stages_inspection_hook is before
    assert seen == [(), ("backend", stages, "options", "language", 90)]
    assert "cache_hint" in stages["ptx"](f"// {sm90_eviction.MARK}\n", LOAD)


def test_no_variant_spills_beyond_its_budget_and_no_wgmma_waits_for_another() -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    code = """
import re

from ci.compile import cross_compile, gate
budgets = gate.read_budgets().get(gate.version(), {}).get("sm90", {})
for name, request in list(gate.gluon_requests("sm90").items())[1:5:3]:
    compiled = cross_compile.compile_gluon(request)
    used = cross_compile.Resources.of(compiled)
    hinted = set(re.findall(r"tensor\\.(.)d\\.\\S*L2::cache_hint", compiled.asm["ptx"]))
    assert hinted == (set("234") if request.shape.page_size >= 64 else set("2")), (name, hinted)
    assert cross_compile.serialised_wgmma(compiled) == [], cross_compile.serialised_wgmma(compiled)
    assert cross_compile.stray_mbarriers(compiled) == [], (name, cross_compile.stray_mbarriers(compiled))
    assert used.matrix["HGMMA"] >= 120, used
    if gate.version() == "3.6":  # what the kernel was tuned on
        assert used.spills == 0 and used.loop_spills == 0, used
    elif budgets:
        assert gate.violations("sm90", {name: used}, budgets) == []
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
