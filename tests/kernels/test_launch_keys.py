"""Launch keys: whatever Triton specialises on is in the key of a launch, for every kernel and every launch site."""

from __future__ import annotations

import ast
import importlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import PagedBatch
from portable_mla.cache.write_launch import launch_write
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.metadata import DecodeMetadata, Status
from portable_mla.metadata.ragged.forms import RaggedForms, RaggedShape
from portable_mla.prefill.context_bounds import launch_poison
from portable_mla.prefill.merge import launch_merge
from portable_mla.runtime.kernel_launch import KernelLaunch
from tests.support.cases import Case, build
from tests.support.launches import noted
from tests.support.library_machine import request
from tests.support.write_cases import WriteCase

pytest.importorskip("triton", reason="needs the package triton")

from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, native_specialize_impl

from portable_mla.backends.library.batch import Step
from portable_mla.backends.nvidia.hopper import backend as sm90
from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.config.prefill import PrefillTile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.backends.triton.prefill.runner import TritonPrefill
from portable_mla.metadata.split_plan.plan import PlanShape, SplitPlan

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
POINTERS = ("_ptr", "_desc")
Recorded = list[tuple[Any, Hashable, tuple[Any, ...]]]  # launch, key, arguments


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package, by import name."""
    for folder in ("portable_mla", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if not name.startswith("portable_mla.backends"):  # the link to the other folder
                yield name.replace("backends", "portable_mla.backends", 1), ast.parse(path.read_text())


def kernels() -> dict[str, JITFunction[Any]]:
    """Every kernel that something launches, by name."""
    found: dict[str, JITFunction[Any]] = {}
    for module, tree in sources():
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if not ("sm90" in module and sm90.missing_names()):
                found[node.name] = getattr(importlib.import_module(module), node.name)
    return {name: kernel for name, kernel in found.items() if isinstance(kernel, JITFunction)}


def test_every_launch_is_of_a_kernel_that_these_tests_know() -> None:
    known = set(kernels())
    launches = [
        node.args[0]
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "KernelLaunch"
    ]
    names = {argument.id for argument in launches if isinstance(argument, ast.Name)}
    assert len(launches) >= 10 and all(isinstance(argument, ast.Name) for argument in launches)
    assert names <= known | {name for name in names if name.startswith("sm90") and sm90.missing_names()}
    assert {driver.__name__ for driver in DRIVERS} == {name.removesuffix("_kernel") for name in names}


def test_every_runtime_scalar_is_a_stride_or_is_never_baked_in() -> None:
    for name, kernel in kernels().items():
        for parameter in kernel.params:
            pointer = parameter.name.endswith(POINTERS) or parameter.is_constexpr
            stride = parameter.name.startswith("stride_")
            assert pointer or stride or parameter.do_not_specialize, f"{name}: {parameter.name}"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Launches from now on, none of which happens."""
    launches: Recorded = []

    def at(self: KernelLaunch, key: Hashable, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: launches.append((self, key, tuple(map(noted, arguments))))

    monkeypatch.setattr(KernelLaunch, "at", at)
    monkeypatch.setattr(KernelLaunch, "ready", lambda self, key: None)
    return launches


def specialised(kernel: Any, arguments: tuple[Any, ...], baked: str = "") -> tuple[Any, ...]:
    """What Triton's own specialisation makes of the arguments. baked: a parameter as if it could be baked in."""
    return tuple(
        native_specialize_impl(
            BaseBackend, argument, parameter.is_const,
            not parameter.do_not_specialize or parameter.name == baked, not parameter.do_not_specialize_on_alignment,
        )
        for parameter, argument in zip(kernel.params, arguments, strict=False)
    )  # fmt: skip


def conflicts(launches: Recorded, baked: str = "") -> list[str]:
    """Kernels that are compiled in two ways under one key."""
    seen: dict[Any, tuple[Any, ...]] = {}
    found = []
    for launch, key, arguments in launches:
        own = specialised(launch._kernel, arguments, baked)
        if seen.setdefault((launch, key), own) != own:
            found.append(launch._kernel.__name__)
    return found


def odd(tensor: Tensor) -> Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    spare = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return spare.copy_(tensor)


def batches() -> Iterator[PagedBatch]:
    """Batches of 1, 16 and other numbers of requests, with and without what is optional, at odd addresses too."""
    for requests, width, placed in itertools.product((1, 2, 16), (1, 16, 17), (lambda t: t, odd)):
        table = placed(torch.zeros(requests, width, dtype=torch.int32))
        lens = placed(torch.ones(requests, dtype=torch.int32))
        positions = torch.zeros(requests, dtype=torch.int64)
        yield PagedBatch(table, lens)
        yield PagedBatch(table, lens, placed(torch.ones_like(lens)), 3)
        yield PagedBatch(table, lens, None, 1, placed(positions))
        yield PagedBatch(table, lens, None, 1, placed(positions.int()))


def plan_splits() -> None:
    """Plans of any batch and number of pages."""
    shape = PlanShape(
        parts=8, max_batch=16, max_tokens=48, max_query_len=3, max_context=64, block_q=1, block_n=16, min_tiles=2
    )
    status = Status.allocate(CPU)
    for own in (shape, replace(shape, row_tiles=1, max_tokens=16), replace(shape, parts=1, max_tokens=1, min_tiles=1)):
        plan = SplitPlan.allocate(own, CPU)
        for batch, pages in itertools.product(batches(), (1, 16, 7)):
            plan.update(batch, status, page_size=16, max_pages=pages)


def write_ragged() -> None:
    """Ragged forms of any batch."""
    for tokens, index_size in ((16, None), (48, 16), (17, 1)):
        forms = RaggedForms.allocate(RaggedShape(16, tokens, 64, 100, 16, index_size), CPU)
        for batch, pages in itertools.product(batches(), (1, 16, 7)):
            forms.update(batch, Status.allocate(CPU), max_pages=pages)


def results(tokens: int, heads: int, width: int, placed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """out and lse; of one head both have strides of 1 and more."""
    return placed(torch.zeros(tokens, heads, width, dtype=torch.bfloat16)), placed(torch.zeros(tokens, heads))


def decode() -> None:
    """Hopper's portable decode, of caches and results at odd addresses and with odd strides."""
    for tile, heads in itertools.product((Tile(16, 64, 4, 3), Tile(16, 64, 4, 3, "descriptor")), (1, 16)):
        problem = build(Case((70, 5), heads=heads, page_size=64))
        asked = request("sm90")
        runner = TritonRunner(replace(asked, shape=replace(asked.shape, heads=heads)), tile)
        runner.plan(DecodeMetadata(problem.batch, Status.allocate(CPU), SplitPlan.allocate(runner.plan_shape, CPU)))
        wide = torch.zeros(1, *problem.kv_cache.shape[:2], 577, dtype=torch.bfloat16)[0, ..., 1:]
        for cache in (problem.kv_cache, odd(problem.kv_cache), wide, problem.kv_cache[:1]):
            for q, placed in itertools.product((problem.q, odd(problem.q), problem.q[:1]), (lambda t: t, odd)):
                out, lse = results(len(q), heads, 512, placed)
                runner.run(problem.with_q(q).with_cache(cache).inputs, out, lse, softmax_scale=1.0)


def combine() -> None:
    """With the decode: their launches are made together."""
    decode()


def prefill_inputs() -> Iterator[tuple[PrefillInputs, Tensor, Tensor]]:
    """Prefills of 1, 16 and other numbers of tokens and heads, at odd addresses too."""
    for tokens, heads, placed in itertools.product((1, 16, 17), (1, 16), (lambda t: t, odd)):
        q = placed(torch.zeros(tokens, heads, 192, dtype=torch.bfloat16))
        projected = placed(torch.zeros(tokens, heads, 256, dtype=torch.bfloat16))
        k_pe = placed(torch.zeros(tokens, 576, dtype=torch.bfloat16))[:, 512:]
        offsets = placed(torch.tensor([0, tokens], dtype=torch.int32))
        out, lse = results(tokens, heads, 128, placed)
        inputs = PrefillInputs(q, projected[..., :128], k_pe, projected[..., 128:], offsets, offsets)
        yield inputs, out, lse
        yield replace(inputs, causal=False), out.float(), lse


def prefill_request(heads: int) -> Request:
    """Of DeepSeek's widths."""
    shape = MLAShape.expanded(heads, 128, 64, 128, torch.bfloat16)
    return Request(ARCHS["sm90"], shape, Phase.prefill, 32, False, False, Capacity(8, 32, 32, 32, 0, 0))


def prefill() -> None:
    """The portable prefill."""
    for tile, (inputs, out, lse) in itertools.product(
        (PrefillTile(64, 32, 4, 2), PrefillTile(64, 32, 4, 2, "descriptor")), prefill_inputs()
    ):
        TritonPrefill(prefill_request(inputs.q.shape[1]), tile).run(inputs, out, lse, softmax_scale=1.0)


def sm90_prefill() -> None:
    """Hopper's prefill, whose launches go through `at` too."""
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.prefill.runner import Sm90PrefillRunner

    for inputs, out, lse in prefill_inputs():
        Sm90PrefillRunner(prefill_request(inputs.q.shape[1])).run(inputs, out, lse, softmax_scale=1.0)


def sm90_decode() -> None:
    """Hopper's decode."""
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.decode.runner import Sm90Runner

    for heads, queries in itertools.product((1, 16, 128), (1, 2)):
        problem = build(Case((70, 5), heads=heads, page_size=64, max_query_len=queries))
        asked = request("sm90", max_query_len=queries)
        runner = Sm90Runner(replace(asked, shape=replace(asked.shape, heads=heads)), Tile(16, 64, 4, 3))
        runner.plan(DecodeMetadata(problem.batch, Status.allocate(CPU), SplitPlan.allocate(runner.plan_shape, CPU)))
        layers = torch.zeros(problem.kv_cache.shape[0], 2, 64, 576, dtype=torch.bfloat16)[:, 1]
        for cache, q in itertools.product((problem.kv_cache, layers), (problem.q, odd(problem.q))):
            for placed in (lambda t: t, odd):
                out, lse = results(len(q), heads, 512, placed)
                runner.run(problem.with_q(q).with_cache(cache).inputs, out, lse, softmax_scale=1.0)


def merge() -> None:
    """Merges of any strides and alignments."""
    for tokens, heads, placed in itertools.product((1, 16, 17), (1, 16), (lambda t: t, odd)):
        out, lse = results(tokens, heads, 128, placed)
        parts = placed(torch.zeros(2, tokens, heads, 128)), placed(torch.zeros(2, tokens, heads))
        launch_merge((out, lse), parts, out, lse)
        launch_merge((out.transpose(0, 1), lse.T), (parts[0].transpose(1, 2), parts[1].mT), out.transpose(0, 1), lse.T)


def write_latent() -> None:
    """Cache writes of every case, and of one whose tensors are at odd addresses."""
    for gaps, norm, index in itertools.product((False, True), (False, True), (torch.int32, torch.int64)):
        call = WriteCase(gaps=gaps, norm=norm, index=index).build()
        launch_write(call)
        assert call.positions is not None
        one: dict[str, Any] = {name: odd(getattr(call, name)[:1]) for name in ("slots", "c_kv", "k_pe", "positions")}
        source = call.q_pe if call.q_source is None else call.q_source
        assert source is not None
        launch_write(replace(call, **one, q_source=None, q_pe=source[:1, :1], rows=None))


def poison_rows() -> None:
    """Bounds of any contexts, and results at odd addresses."""
    for sequences, heads, placed in itertools.product((1, 2, 16), (1, 16), (lambda t: t, odd)):
        lens, offsets = placed(torch.ones(sequences).int()), placed(torch.arange(sequences + 1).int())
        out, lse = results(sequences, heads, 128, placed)
        for bound, status in itertools.product((0, 1, 16), (None, Status.allocate(CPU).words)):
            launch_poison(lens, offsets, out, lse, max_len=bound, max_tokens=bound, status=status)


def prepare_step() -> None:
    """A library's step of any batch."""
    for table in (False, True):
        step = Step(request("sm90", uniform_queries=False, max_query_len=3), table=table)
        step.buffers = step._allocate(CPU)
        forms = RaggedForms.allocate(RaggedShape(16, 48, 64, 100, 64), CPU)
        for batch in batches():
            metadata = DecodeMetadata(batch, Status.allocate(CPU), ragged=forms)
            step.launch_prepare(metadata)


def finish_rows() -> None:
    """A library's results, whose addresses may be odd."""
    step = Step(request("sm90"), table=False)
    step.buffers = step._allocate(CPU)
    for heads, copied, placed, theirs in itertools.product((1, 16), (False, True), (lambda t: t, odd), (odd, odd)):
        out, lse = results(3, heads, 512, placed)
        for given in (theirs, lambda t: t):
            finish = step._finishing_launch(copied, out, lse)
            source = given(torch.zeros(3, heads, 512, dtype=torch.bfloat16)) if copied else None
            finish(given(torch.zeros(3, heads, 1)), (heads, 1, 1), source, out, lse)


DRIVERS = (
    plan_splits, write_ragged, decode, combine, prefill, sm90_prefill, sm90_decode, merge, write_latent, poison_rows,
    prepare_step, finish_rows,
)  # fmt: skip


@pytest.mark.parametrize("drive", DRIVERS, ids=lambda drive: drive.__name__)
def test_one_key_is_one_compiled_kernel(drive: Callable[[], None], recorded: Recorded) -> None:
    drive()
    assert f"{drive.__name__}_kernel" in {launch._kernel.__name__ for launch, _, _ in recorded}
    assert len({key for _, key, _ in recorded}) > 1
    assert conflicts(recorded) == []


@pytest.mark.parametrize(
    ("drive", "baked"),
    [(plan_splits, "given_positions"), (write_ragged, "given_positions"), (plan_splits, "batch"), (prefill, "tokens")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_scalar_that_triton_could_bake_in_would_be_noticed(
    drive: Callable[[], None], baked: str, recorded: Recorded
) -> None:
    drive()
    assert conflicts(recorded, baked)
