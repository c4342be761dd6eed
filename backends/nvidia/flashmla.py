"""FlashMLA: the library's dense decode for Hopper, from any of its three homes.

`flash_mla` upstream (gone from its release of 2026-09-30), the fork on PyPI called sgl-flash-mla, which keeps it behind
`use_legacy`, and the build inside vLLM, which can write into a given result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from portable_mla.backends.library.batch import Step, StepView
from portable_mla.backends.library.calls import NamedCall, Returned, call
from portable_mla.backends.library.layout import VendorLayout, new_layout
from portable_mla.backends.library.library import Builds, Library, Loaded
from portable_mla.backends.library.operator import Operator, find_operator
from portable_mla.backends.nvidia.hopper.arch import HOPPER
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import DecodeInputs, Runner
from portable_mla.errors import BackendError
from portable_mla.metadata import DecodeMetadata, Needs
from portable_mla.runtime.packages import Package

PAGE_SIZE, GEOMETRY = 64, (512, 64)
DECODE, PLAN = "flash_mla_with_kvcache", "get_mla_metadata"
HOISTED = "get_mla_decoding_metadata"  # what sgl-flash-mla's decode plans with where nothing was planned
KEPT_SIZES = 4  # batch sizes of captured calls whose schedules each plan writes anew
# What a call gives, in order, by the names of the Python function and of the operator behind it.
GIVEN = ("q", "k_cache", "block_table", "cache_seqlens", "softmax_scale", "tile_scheduler_metadata", "num_splits")
GIVEN_OPERATOR = ("q", "kcache", "block_table", "seqlens_k", "softmax_scale", "tile_scheduler_metadata", "num_splits")
_CALLED = (*GIVEN, "head_dim_v", "causal")
_VLLM = "vllm.third_party.flashmla.flash_mla_interface"
LIBRARIES = (
    Library(
        Package("flash_mla", "flash_mla", ("flash-mla", "sgl-flash-mla"), marks=("flash_mla_interface.py",)),
        "flash_mla",
        ((DECODE, _CALLED), (PLAN, ())),
        "CUDA",
        extras=((HOISTED, ("seqlens_k", "num_q_tokens_per_head_k", "h_k", "use_legacy")),),
        operator="flash_mla_legacy.dense_decode_fwd",
    ),
    Library(
        Package("vllm", "vllm", ("vllm",)),
        _VLLM,
        ((DECODE, _CALLED), (PLAN, ())),
        "CUDA",
        "third_party/flashmla",
        operator="_flashmla_C.dense_decode_fwd",
    ),
)


def _without_dense_decode(loaded: Loaded) -> tuple[str, ...]:
    """Upstream removed what is called here; the parameter that came with that release tells, as do the forks' own."""
    if loaded.takes(DECODE, "use_legacy") or loaded.takes(DECODE, "out"):
        return ()
    if loaded.takes(DECODE, "enable_batch_invariant"):
        return (f"{loaded.library.name}: too new: dense decode was removed; the package sgl-flash-mla keeps it",)
    return ()


BUILDS = Builds(LIBRARIES, _without_dense_decode)


class _FlashMLABackend:
    def reasons_unavailable(self) -> tuple[str, ...]:
        return BUILDS.reasons_unavailable()

    def reasons_not_loadable(self) -> tuple[str, ...]:
        return BUILDS.reasons_not_loadable()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        shape = request.shape
        geometry = (shape.latent_dim, shape.rope_dim)
        formats = (CacheFormat.bf16, CacheFormat.fp16)
        checks = (
            (request.phase is Phase.decode, f"needs phase decode, got {request.phase.value}"),
            (request.arch.name == HOPPER, f"needs {HOPPER}, got {request.arch.name}"),
            (geometry == GEOMETRY, f"needs latent+rope of 512+64, got {geometry[0]}+{geometry[1]}"),
            (shape.page_size == PAGE_SIZE, f"needs page_size {PAGE_SIZE}, got {shape.page_size}"),
            (shape.cache_format in formats, f"needs a bf16 or fp16 cache, got {shape.cache_format.name}"),
            (
                shape.q_dtype is shape.cache_format.dtype,
                f"needs queries of the cache's dtype, got {shape.q_dtype} and {shape.cache_format.name}",
            ),
            (
                request.uniform_queries,
                f"needs uniform_queries: each request with the same number of query tokens, got up to "
                f"{request.max_query_len}",
            ),
            (not request.deterministic, "needs deterministic off: where a context is split depends on the batch"),
        )
        return tuple(reason for holds, reason in checks if not holds)

    def needs(self, request: Request) -> Needs:
        return Needs(query_indptr=True)

    def bind(self, request: Request) -> Runner:
        return FlashMLARunner(request, BUILDS.first())


class FlashMLARunner:
    """Decode with FlashMLA; the schedule is the library's, made on the device.

    Where the library plans apart from the decode, the schedules of this step's batch size and of those that were
    captured are written anew by each plan, at addresses that stay. Elsewhere the first call of a step makes it, and a
    captured call its own, so that a replay follows the lengths: a launch of 14 to 23 us more on an H100. Beside the
    library's launches there is one that converts LSE from [batch, heads, query] and, where the library cannot write
    into a given result, copies that too. Queries at odd strides are copied first.
    """

    def __init__(self, request: Request, loaded: Loaded) -> None:
        self._shape, self._query_len = request.shape, request.max_query_len
        self._name = loaded.library.name
        self._get_metadata = loaded.functions[PLAN]
        self._hoisted = loaded.functions.get(HOISTED)
        self._plans_later = self._hoisted is None and loaded.takes_anything(PLAN)
        self._in_place = loaded.takes(DECODE, "out")
        self._operator = _operator_of(loaded, request, in_place=self._in_place)
        self._decode = self._operator or _function_of(loaded, request, in_place=self._in_place)
        self._step = Step(request, table=True, query_len=request.max_query_len)
        self._schedules: dict[int, _Schedule] = {}  # by the requests of a call

    @property
    def graph_safe(self) -> bool:
        """Lengths and the page table are read on the device alone."""
        return True

    def plan(self, metadata: DecodeMetadata) -> None:
        """Copy table and lengths to where they stay, and schedule them for the batch sizes of captured calls."""
        self._step.plan(metadata)
        kept = {batch: schedule for batch, schedule in self._schedules.items() if schedule.captured}
        for batch, schedule in kept.items():
            schedule.update(self._plan(batch).tensors)
        self._schedules = kept

    def memory(self) -> dict[str, int]:
        """Bytes of the table, the lengths and schedules; the library allocates its partial results in each call."""
        tensors = [tensor for schedule in self._schedules.values() for tensor in schedule.tensors]
        return self._step.memory() | {"library schedule": sum(tensor.nbytes for tensor in tensors)}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """The library's launches, and one of ours."""
        assert kv_scale is None, "refused by dispatch"
        layout: VendorLayout = inputs.remembered or self._new_layout(inputs, out, lse)
        returned, copied_q, in_place, finish = layout
        q = inputs.q.contiguous() if copied_q else inputs.q
        batch, query_len, heads, _ = shape = returned.out
        schedule = self._schedules.get(batch)
        if schedule is None or inputs.in_capture():
            schedule = self._schedule_of(batch, capturing=inputs.in_capture())
        step, (planned, splits) = schedule.step, schedule.given
        given: tuple[Any, ...] = (step.table, step.kv_lens, softmax_scale, planned, splits)
        if self._in_place:
            given += (out.view(shape) if in_place else None,)
        results = self._decode(q.view(batch, query_len, heads, -1), inputs.kv_cache.unsqueeze(2), *given)
        rows, theirs = returned.of(results)
        if planned is None:
            schedule.keep(results[2:])
        of_batch, of_head, of_query = theirs.stride()
        finish(theirs, (of_batch, of_query, of_head), None if in_place else rows.contiguous(), out, lse)

    def _new_layout(self, inputs: DecodeInputs, out: Tensor, lse: Tensor) -> VendorLayout:
        (tokens, heads, width), query_len = out.shape, self._query_len
        batch = tokens // query_len
        shapes = (batch, query_len, heads, width), (batch, heads, query_len)
        in_place = self._in_place and out.is_contiguous()
        returned = Returned(self._name, shapes[0], out.dtype, shapes[1])
        return new_layout(returned, self._step, inputs, out, lse, in_place=in_place)

    def _schedule_of(self, batch: int, *, capturing: bool) -> _Schedule:
        """The schedule of this step for so many requests, or, in a capture that none can be kept for, its own."""
        schedule = self._schedules.get(batch)
        if capturing:
            if schedule is not None and not schedule.captured:
                others = sum(other.captured for other in self._schedules.values())
                schedule.captured = bool(schedule.tensors) and others < KEPT_SIZES
            if schedule is None or not schedule.captured:
                return self._plan(batch)
        elif schedule is None:
            schedule = self._schedules[batch] = self._plan(batch)
        return schedule

    def _plan(self, batch: int) -> _Schedule:
        """A schedule by the library."""
        step, rows = self._step.of(batch), self._query_len * self._shape.heads
        if self._hoisted is not None:
            made = call(
                self._name, self._hoisted, seqlens_k=step.kv_lens, num_q_tokens_per_head_k=rows, h_k=1, use_legacy=True
            )  # fmt: skip
        else:
            # By position: the three have had other names, never another order.
            arguments = () if self._plans_later else (step.kv_lens, rows, 1)
            made = call(self._name, functools.partial(self._get_metadata, *arguments))
        if not isinstance(made, tuple) or len(made) != 2:
            raise BackendError(f"{self._name}: returned {type(made).__name__} for its schedule, expected a pair")
        if self._plans_later:
            return _Schedule(step, made if self._operator is None else (None, None), ())
        if self._hoisted is None or self._operator is not None:
            return _Schedule(step, made, made)
        held, none = call(self._name, self._get_metadata)
        held.tile_scheduler_metadata, held.num_splits = made
        return _Schedule(step, (held, none), made)


@dataclass
class _Schedule:
    """A schedule of a step. given: as the decode takes it; tensors: what it consists of, none where the library plans
    in the decode."""

    step: StepView
    given: tuple[Any, Any]
    tensors: tuple[Tensor, ...]
    captured: bool = False

    def update(self, tensors: tuple[Tensor, ...]) -> None:
        """Another step's, at the same addresses."""
        for mine, theirs in zip(self.tensors, tensors, strict=True):
            mine.copy_(theirs)

    def keep(self, made: Sequence[Any]) -> None:
        """What the operator planned in a step's first call, for the others."""
        if len(made) == len(self.given):
            self.given = made[0], made[1]


def _operator_of(loaded: Loaded, request: Request, *, in_place: bool) -> Operator | None:
    """The operator behind a build's Python function, which does nothing else for a dense cache of 2 bytes a number."""
    constant = {"head_size_v": request.shape.latent_dim, "is_causal": request.max_query_len > 1}
    given = (*GIVEN_OPERATOR, "out_") if in_place else GIVEN_OPERATOR
    library = loaded.library
    return find_operator(library.name, library.operator, given, constant)


def _function_of(loaded: Loaded, request: Request, *, in_place: bool) -> NamedCall:
    constant: dict[str, Any] = {"head_dim_v": request.shape.latent_dim, "causal": request.max_query_len > 1}
    if loaded.takes(DECODE, "use_legacy"):
        constant["use_legacy"] = True
    if loaded.takes(DECODE, "is_fp8_kvcache"):
        constant["is_fp8_kvcache"] = False
    given = (*GIVEN, "out") if in_place else GIVEN
    return NamedCall(loaded.library.name, loaded.functions[DECODE], given, constant)


BACKEND = _FlashMLABackend()
