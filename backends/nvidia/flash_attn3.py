"""FlashAttention 3: decode through its q_v path, where keys are the rope columns and values the latent ones.

From `flash_attn_interface` (upstream), or the build inside vLLM, which can write into a given result.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.library.batch import Step
from portable_mla.backends.library.calls import NamedCall, Returned, call, wide
from portable_mla.backends.library.layout import VendorLayout, new_layout
from portable_mla.backends.library.library import Builds, Library, Loaded
from portable_mla.backends.library.operator import Operator, find_operator
from portable_mla.backends.nvidia.hopper.arch import HOPPER
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import DecodeInputs, Runner
from portable_mla.errors import NoBackend
from portable_mla.metadata import DecodeMetadata, Needs
from portable_mla.runtime.packages import Package

GEOMETRY = (512, 64)
BLOCK_N = 64  # keys of a block, at these widths
SPLIT_BYTES = 256 << 20  # most of the partial results that the library allocates in a call, in float32
MOST_SPLITS = 128
SCHEDULE_VECTORS = 4  # of one number a request, at most, and a counter: a schedule
TILE_ROWS = 64  # heads times query tokens of a tile
PLAN = "get_scheduler_metadata"
_PLANNED = (
    "batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim", "headdim_v", "qkv_dtype",
    "cache_seqlens", "cu_seqlens_q", "page_size", "causal", "num_splits",
)  # fmt: skip
UPSTREAM, IN_VLLM = "flash_attn_with_kvcache", "flash_attn_varlen_func"
# What a call gives, in order, by the names of each Python function and of the operator behind vLLM's.
GIVEN = {
    UPSTREAM: ("q", "k_cache", "v_cache", "qv", "cu_seqlens_q", "cache_seqlens", "page_table", "softmax_scale",
               "scheduler_metadata"),
    IN_VLLM: ("q", "k", "v", "q_v", "cu_seqlens_q", "seqused_k", "block_table", "softmax_scale", "scheduler_metadata",
              "out"),
}  # fmt: skip
GIVEN_OPERATOR = ("q", "k", "v", "q_v", "cu_seqlens_q", "seqused_k", "page_table", "softmax_scale",
                  "scheduler_metadata", "out")  # fmt: skip
_CONSTANT = ("max_seqlen_q", "causal", "num_splits", "return_softmax_lse")
# The operator's other arguments, where they ask for nothing.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(
        ("k_new", "v_new", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "kv_batch_idx", "leftpad_k", "rotary_cos",
         "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale", "pack_gqa", "s_aux", "cp_tot_seqused_k")
    ),
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True, "sm_margin": 0,
    "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip
LIBRARIES = (
    Library(
        Package("flash_attn_interface", "flash_attn_interface", ("flash-attn-3", "flash-attn-interface")),
        "flash_attn_interface",
        ((UPSTREAM, (*GIVEN[UPSTREAM], *_CONSTANT)), (PLAN, _PLANNED)),
        "CUDA",
    ),
    Library(
        Package("vllm", "vllm", ("vllm",)),
        "vllm.vllm_flash_attn",
        (
            (IN_VLLM, (*GIVEN[IN_VLLM], *_CONSTANT, "max_seqlen_k", "fa_version")),
            (PLAN, _PLANNED),
            ("fa_version_unsupported_reason", ("fa_version",)),
        ),
        "CUDA",
        "vllm_flash_attn",
        operator="_vllm_fa3_C.fwd",
    ),
)


def _without_version_3(loaded: Loaded) -> tuple[str, ...]:
    """vLLM's package may hold FA2 alone."""
    if "fa_version_unsupported_reason" not in loaded.functions:
        return ()
    reason = loaded.functions["fa_version_unsupported_reason"](fa_version=3)
    return () if reason is None else (f"{loaded.library.name}: {reason}",)


BUILDS = Builds(LIBRARIES, _without_version_3)


class _FlashAttn3Backend:
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
            (
                shape.cache_format in formats,
                f"needs a bf16 or fp16 cache (q_v takes no fp8), got {shape.cache_format.name}",
            ),
            (
                shape.q_dtype is shape.cache_format.dtype,
                f"needs queries of the cache's dtype, got {shape.q_dtype} and {shape.cache_format.name}",
            ),
            (not request.deterministic, "needs deterministic off: where a context is split depends on the batch"),
        )
        return tuple(reason for holds, reason in checks if not holds)

    def needs(self, request: Request) -> Needs:
        return Needs(query_indptr=True)

    def bind(self, request: Request) -> Runner:
        return FlashAttn3Runner(request, BUILDS.first())


def most_splits(request: Request) -> int:
    """A bound on the splits of a request, from the capacity alone: the same in a captured graph and outside."""
    capacity, shape = request.capacity, request.shape
    bytes_a_split = 4 * max(capacity.max_query_tokens, 1) * shape.heads * shape.latent_dim
    blocks = -(-max(capacity.max_context, 1) // BLOCK_N)
    return max(min(MOST_SPLITS, blocks, SPLIT_BYTES // bytes_a_split), 1)


def page_ratio(request: Request) -> int:
    """How many pages the library is shown for one of ours.

    By its source, where pages are whole blocks and rows fill more than one tile it copies whole blocks, so that an
    unowned slot of the last page that holds NaN is multiplied by a weight of 0; of half blocks it copies, and zeroes
    the rest of, the slots in use. Neither was timed.
    """
    rows, page_size = request.shape.heads * request.max_query_len, request.shape.page_size
    return page_size // (BLOCK_N // 2) if rows > TILE_ROWS and page_size % BLOCK_N == 0 else 1


class FlashAttn3Runner:
    """Decode with FA3; each request is cut on the device, into at most `most_splits` parts.

    The schedule is made once a step, into a buffer that stays. A captured call makes its own, one small launch more,
    since the schedule of another batch size has another layout. Beside the library's launches there is one that
    transposes LSE, defines rows that the library does not write, and with upstream's build copies the result.
    """

    def __init__(self, request: Request, loaded: Loaded) -> None:
        self._shape, self._capacity, self._query_len = request.shape, request.capacity, request.max_query_len
        self._name, self._loaded = loaded.library.name, loaded
        self._in_place = IN_VLLM in loaded.functions
        self._widths = [request.shape.latent_dim, request.shape.rope_dim]
        self._splits = most_splits(request)
        self._ratio = page_ratio(request)
        self._step = Step(request, table=True, ratio=self._ratio)
        self._decode = self._find_operator() or self._function()
        self._batch = 0
        self._schedule: Tensor | None = None
        self._current: Tensor | None = None

    @property
    def graph_safe(self) -> bool:
        """Lengths and the page table are read on the device alone."""
        return True

    def plan(self, metadata: DecodeMetadata) -> None:
        """Copy table and lengths to where they stay, and have the library schedule them."""
        self._step.plan(metadata)
        self._batch = metadata.batch.size
        self._plan()

    def memory(self) -> dict[str, int]:
        """Bytes of the table, the lengths and the schedule; the library allocates its partial results in each call."""
        schedule = 0 if self._schedule is None else self._schedule.nbytes
        return self._step.memory() | {"library schedule": schedule}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """The library's launches, and one of ours."""
        assert kv_scale is None, "refused by dispatch"
        layout: VendorLayout = inputs.remembered or self._new_layout(inputs, out, lse)
        returned, copied_q, in_place, finish = layout
        q = inputs.q.contiguous() if copied_q else inputs.q
        if self._step.fit(q):
            self._plan()
        if self._batch == 0:
            out.zero_()
            lse.fill_(-torch.inf)
            return
        step = self._step.of(self._batch)
        values, keys = torch.split_with_sizes(self._pages(inputs.kv_cache), self._widths, -1)
        q_v, q_rope = torch.split_with_sizes(q, self._widths, -1)
        schedule = None if inputs.in_capture() else self._current
        given: tuple[Any, ...] = (step.query_indptr, step.kv_lens, step.table, softmax_scale, schedule)
        if self._in_place:
            given += (out if in_place else None,)
        rows, theirs = returned.of(self._decode(q_rope, keys, values, q_v, *given))
        of_head, of_query = theirs.stride()
        finish(theirs, (of_query, 0, of_head), None if in_place else rows.contiguous(), out, lse)

    def _new_layout(self, inputs: DecodeInputs, out: Tensor, lse: Tensor) -> VendorLayout:
        tokens, heads, _ = out.shape
        returned = Returned(self._name, out.shape, out.dtype, (heads, tokens))
        return new_layout(returned, self._step, inputs, out, lse, in_place=self._in_place and wide(out))

    def _find_operator(self) -> Operator | None:
        """The operator behind vLLM's function, which beside it checks its arguments and allocates one for nobody."""
        constant = {
            "max_seqlen_q": self._query_len, "max_seqlen_k": self._max_kv_len, "is_causal": True,
            "num_splits": self._splits,
        }  # fmt: skip
        return find_operator(self._name, self._loaded.library.operator, GIVEN_OPERATOR, constant, _NEUTRAL)

    def _function(self) -> NamedCall:
        constant: dict[str, Any] = {
            "max_seqlen_q": self._query_len, "causal": True, "num_splits": self._splits, "return_softmax_lse": True,
        }  # fmt: skip
        if self._in_place:
            constant |= {"max_seqlen_k": self._max_kv_len, "fa_version": 3}
        name = IN_VLLM if self._in_place else UPSTREAM
        return NamedCall(self._name, self._loaded.functions[name], GIVEN[name], constant)

    @functools.cached_property
    def _max_kv_len(self) -> int:
        return self._step.width * (self._shape.page_size // self._ratio)

    def _pages(self, cache: Tensor) -> Tensor:
        """The cache in the pages that the library is shown, [pages, page_size, 1, latent + rope]."""
        if self._ratio == 1:
            return cache.unsqueeze(2)
        pages, page_size, width = cache.shape
        of_page, of_slot, _ = cache.stride()
        if of_page != page_size * of_slot and pages > 1:
            raise NoBackend(
                f"{self._name}: needs a kv_cache whose pages follow one another, got strides {cache.stride()}; triton "
                "takes any"
            )
        small = page_size // self._ratio
        return cache.as_strided((pages * self._ratio, small, 1, width), (small * of_slot, of_slot, width, 1))

    def _plan(self) -> None:
        """Schedule the step; FA3 has none for a batch of no requests."""
        self._current = None
        if self._batch == 0:
            return
        shape, step = self._shape, self._step.of(self._batch)
        arguments: dict[str, Any] = {
            "batch_size": self._batch, "max_seqlen_q": self._query_len, "max_seqlen_k": self._max_kv_len,
            "num_heads_q": shape.heads, "num_heads_kv": 1, "headdim": shape.rope_dim, "headdim_v": shape.latent_dim,
            "qkv_dtype": shape.q_dtype, "cache_seqlens": step.kv_lens,
            "cu_seqlens_q": step.query_indptr, "page_size": shape.page_size // self._ratio,
            "causal": True, "num_splits": self._splits,
        }  # fmt: skip
        made: Tensor = call(self._name, self._loaded.functions[PLAN], **arguments)
        if self._schedule is None or self._schedule.numel() < made.numel():
            most = SCHEDULE_VECTORS * -(-self._capacity.max_batch // 4) * 4 + 1
            self._schedule = made.new_empty(max(most, made.numel()))
        self._current = self._schedule[: made.numel()].copy_(made)


BACKEND = _FlashAttn3Backend()
