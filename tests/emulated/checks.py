"""What is run on an emulated GPU: each kernel through the library that launches it, held to its usual rule."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from portable_mla import CacheFormat
from portable_mla.backends.triton.combine import runner as combine
from portable_mla.backends.triton.combine.kernels import combine as combine_kernels
from portable_mla.backends.triton.decode import runner
from portable_mla.backends.triton.decode.kernels import decode as decode_kernels
from portable_mla.backends.triton.prefill import runner as prefill_runner
from portable_mla.cache import write_launch
from portable_mla.cache.kernels import write as cache_write_kernels
from portable_mla.cache.write import write_in_torch
from portable_mla.core.arch import ARCHS
from portable_mla.dispatch.select import load
from portable_mla.metadata import Limits, Status
from portable_mla.metadata.ragged import forms as ragged
from portable_mla.metadata.split_plan import plan as split_plan
from portable_mla.metadata.split_plan.kernels import plan as split_kernels
from portable_mla.metadata.split_plan.plan import PlanShape
from portable_mla.prefill import merge
from portable_mla.prefill.kernels import merge as merge_kernels
from tests.interpreter import test_prefill
from tests.interpreter.running import MIDDLE, SMALL, decode, request_of, solve_as
from tests.interpreter.test_broken_kernels import Mutant
from tests.interpreter.test_combine import KINDS, assert_merged_as_defined
from tests.interpreter.test_ragged import RaggedCase, assert_ragged_as_defined
from tests.interpreter.test_split_plan import PlanCase, assert_planned_as_defined
from tests.support import prefill_cases
from tests.support.acceptance import Errors, check
from tests.support.cases import Case, Problem, build
from tests.support.write_cases import WriteCase, written_bytes

Check = Callable[[str], Errors | None]  # of an architecture; AssertionError where the result is wrong
TWO_GIB = 1 << 31
SHORT = PlanShape(
    parts=66, max_batch=9, max_tokens=30, max_query_len=8, max_context=20_000, block_q=2, block_n=32, min_tiles=4
)  # fmt: skip
BATCH = ([100, 0, 20_000, 33, 700], [1, 0, 8, 2, 3])

# Keys of requests: the first tile, which a pipeline loads before its loop, is partial.
LESS_THAN_A_TILE = (1, 9, 17, 31)

# case, compute units: the plan has as many parts as these hold programs
DECODES = {
    "512+64, 16 heads": (Case((37, 5), 16), 4),
    "512+64, 16 heads, split": (Case((700, 33), 16, page_size=64, content="split_skew"), 12),
    "512+64, 16 heads, less than a tile": (Case(LESS_THAN_A_TILE, 16), 4),
    "512+64, 20 heads, fp16": (Case((100, 40), 20, dtype="fp16"), 4),
    "512+64, 64 heads": (Case((70, 33), 64, page_size=64), 4),
    "512+64, 128 heads, page 1": (Case((65,), 128, page_size=1, content="fingerprint"), 4),
    "512+0, 12 heads, ragged queries": (Case((90, 5, 40), 12, rope_dim=0, query_lens=(3, 1, 2), max_query_len=3), 8),
    "256+32, 40 heads": (Case((100, 64), 40, **MIDDLE), 6),
    "256+32, 16 heads, needle": (Case((200, 64), 16, **MIDDLE, content="needle", garbage="hot"), 6),
    "128+32, 16 heads, page 1": (Case((130, 0, 65), 16, **SMALL, page_size=1), 6),
    "128+32, 20 heads, 2 tokens": (Case((100, 2, 65), 20, **SMALL, max_query_len=2), 6),
    "128+32, large logits": (Case((1, 64, 200), **SMALL, content="neg_extreme", max_query_len=2), 9),
    "128+32, 5 heads, many pieces": (Case((1500,), 5, **SMALL, page_size=64), 60),
}
PREFILLS = {
    "128+64/128": prefill_cases.PrefillCase((40, 0, 130), (40, 4, 200), 2),
    "192+64/256, not causal": prefill_cases.PrefillCase((33,), (90,), 1, (192, 64, 256), causal=False),
    "64+32/64, fp16": prefill_cases.PrefillCase((70, 5), (70, 64), 2, (64, 32, 64), "fp16"),
}
# The same over fp8: "scaled" stands for the format with one scale that the architecture reads.
FP8_DECODES = {
    "scaled, 16 heads": (Case((100, 40), 16), 4),
    "scaled, 16 heads, less than a tile": (Case(LESS_THAN_A_TILE, 16, seed=1), 4),
    "scaled, 64 heads, page 1": (Case((70,), 64, page_size=1, seed=1), 4),
    "fp8_656, 16 heads": (Case((100, 40), 16, cache="fp8_656", seed=1), 4),
    "fp8_656, 16 heads, less than a tile": (Case(LESS_THAN_A_TILE, 16, cache="fp8_656", seed=1), 4),
    "fp8_656, 40 heads, less than a tile": (Case(LESS_THAN_A_TILE, 40, cache="fp8_656", page_size=64), 4),
    "fp8_656, 40 heads, 2 tokens": (Case((65, 3), 40, cache="fp8_656", max_query_len=2, page_size=64), 6),
}
WRITES = {
    "bf16": WriteCase(),
    "fp16, half, gaps": WriteCase(CacheFormat.fp16, torch.float16, "half", gaps=True, index=torch.int64),
    "scaled": WriteCase(CacheFormat.fp8_e4m3),
    "scaled, 128+32": WriteCase(CacheFormat.fp8_e4m3, latent_dim=128, rope_dim=32, scale=7.0),
    "fp8_656": WriteCase(CacheFormat.fp8_656),
}


def _decode(name: str, arch: str) -> Errors:
    return solve_as(arch, *DECODES[name])


def _scaled(arch: str) -> CacheFormat:
    return next(one for one in CacheFormat if one.needs_scale and one.dtype is ARCHS[arch].float8)


def _decode_fp8(name: str, arch: str) -> Errors:
    case, units = FP8_DECODES[name]
    return solve_as(arch, replace(case, cache=case.cache or _scaled(arch).name), units)


def _write(name: str, arch: str) -> None:
    """The cache write, bit for bit what torch's operations write."""
    case = WRITES[name]
    if case.cache_format.needs_scale:
        case = replace(case, cache_format=_scaled(arch))
    expected, got = case.build(), case.build()
    write_in_torch(expected)
    write_launch.launch_write(got)
    for part, bits in written_bytes(expected).items():
        assert torch.equal(written_bytes(got)[part], bits), f"{part} has other bits"


def beyond_two_gib(arch: str) -> Errors:
    """Pages that are further from the first than 32 bits of bytes, where addresses must have 64 bits."""
    problem = build(Case((100, 33), 16, page_size=64))
    few, page = len(problem.kv_cache), problem.kv_cache[0]
    first = TWO_GIB // (page.numel() * page.element_size()) + 1
    cache = torch.empty(first + few, *page.shape, dtype=page.dtype)  # memory that is never touched costs nothing
    cache[first:] = problem.kv_cache
    table = problem.batch.block_table
    far = problem.with_table(torch.where(table < few, table + first, table)).with_cache(cache)
    return check(far, *_decoded(far, arch))


def _decoded(problem: Problem, arch: str, status: Status | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    request = request_of(problem, arch, 4)
    bound = load("triton", "amd").bind(request)
    assert isinstance(bound, runner.TritonRunner)
    return decode(problem, bound, status)


def wrong_page(arch: str) -> None:
    """A page that is not there makes its request's rows NaN and is reported."""
    problem = build(Case((40, 5, 90), 12, **SMALL))
    table, status = problem.batch.block_table.clone(), Status.allocate(torch.device("cpu"))
    table[1, 0] = 2**31 - 1
    out, _ = _decoded(problem.with_table(table), arch, status)
    assert out.isnan().all((1, 2)).tolist() == [False, True, False], "other rows than the faulty request's are NaN"
    try:
        status.check(Limits(len(problem.kv_cache), 10_000, 1, 3))
    except IndexError as error:
        assert "block_table: request 1" in str(error), f"reported is {error}"
    else:
        raise AssertionError("nothing is reported")


def _prefill(name: str, arch: str) -> Errors:
    problem = prefill_cases.build(PREFILLS[name])
    bound = load("triton", "amd").bind(test_prefill.request_of(problem, arch))
    assert isinstance(bound, prefill_runner.TritonPrefill)
    return prefill_cases.check(problem, *test_prefill.run(problem, bound))


def plan(arch: str, *, fixed: bool) -> None:
    """The split plan, bit for bit."""
    faulty = [False] * 4 + [True]
    assert_planned_as_defined(PlanCase(*BATCH, replace(SHORT, fixed=fixed), SHORT.max_query_len, faulty))


def kv_indices(arch: str) -> None:
    """Row pointers, token indices and positions, bit for bit."""
    shape = ragged.RaggedShape(7, 16, 300, 100, page_size=48, index_size=12)
    assert_ragged_as_defined(RaggedCase([100, 0, 300, 301, 17], [1, 0, 4, 2, 3], shape, 4, 20, 1, 90, seed=3))


def merging(arch: str) -> None:
    """Results over disjoint keys."""
    test_prefill.merged(4, 6)


CHECKS: dict[str, Check] = {
    **{f"decode {name}": functools.partial(_decode, name) for name in DECODES},
    "decode beyond 2 GiB": beyond_two_gib,
    "decode wrong page": wrong_page,
    **{
        f"combine {kind} {str(dtype).removeprefix('torch.')}": functools.partial(
            assert_merged_as_defined, kind=kind, dtype=dtype
        )
        for kind in KINDS
        for dtype in (torch.float32, torch.float16)
    },
    "plan": functools.partial(plan, fixed=False),
    "plan fixed": functools.partial(plan, fixed=True),
    "kv indices": kv_indices,
    **{f"decode {name}": functools.partial(_decode_fp8, name) for name in FP8_DECODES},
    **{f"write {name}": functools.partial(_write, name) for name in WRITES},
    **{f"prefill {name}": functools.partial(_prefill, name) for name in PREFILLS},
    "merge": merging,
}

SPLIT = Case((400, 100), 16, **SMALL)
# Kernels broken in one line, and the check that must notice.
MUTANTS: dict[str, tuple[ModuleType, str, Mutant, Check]] = {
    "decode does not rescale": (
        runner, "decode_kernel", Mutant(decode_kernels, "acc = acc * rescale[:, None]", "acc = acc"),
        lambda arch: solve_as(arch, SPLIT, 6),
    ),
    "decode sees a token past the end": (
        runner, "decode_kernel", Mutant(decode_kernels, "(token - query_start) + 1", "(token - query_start) + 2"),
        lambda arch: solve_as(arch, Case((90, 40), 5, **SMALL, max_query_len=3), 6),
    ),
    "combine leaves out the last piece": (
        combine, "combine_kernel", Mutant(combine_kernels, "(slot < slot_hi)", "(slot < slot_hi - 1)"),
        lambda arch: solve_as(arch, SPLIT, 6),
    ),
    "the plan drops a tile at each cut": (
        split_plan, "plan_splits_kernel",
        Mutant(split_kernels, "(part + 1) * share - origin)", "(part + 1) * share - origin - 1)"),
        functools.partial(plan, fixed=False),
    ),
    "the write forgets the norm's weight": (
        cache_write_kernels, "write_latent_kernel",
        Mutant(cache_write_kernels, "return latent * factor * weight", "return latent * factor"),
        functools.partial(_write, "bf16"),
    ),
    "merge leaves out the last part": (
        merge_kernels, "merge_kernel",
        Mutant(merge_kernels, "for part in range(parts):", "for part in range(parts - 1):"),
        merging,
    ),
}  # fmt: skip


def caught(name: str, arch: str) -> str:
    """How the check notices; AssertionError where it does not."""
    user, kernel, mutant, judge = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder, _launches_anew():
        twin = getattr(mutant.write(Path(folder)), kernel)
        with patch.object(user, kernel, twin):
            try:
                judge(arch)
            except AssertionError as error:
                return str(error).splitlines()[0] if str(error) else "not bit for bit what is defined"
    raise AssertionError(f"{kernel} with {mutant.broken!r} in place of {mutant.line!r} passes")


@contextmanager
def _launches_anew() -> Iterator[None]:
    """No launch is remembered from before, nor afterwards."""
    remembered: tuple[Any, ...] = (
        split_plan._launch_of, ragged._launch, prefill_runner._launch, merge._merge_launch, write_launch._launch
    )  # fmt: skip
    for launch in remembered:
        launch.cache_clear()
    try:
        yield
    finally:
        for launch in remembered:
            launch.cache_clear()
