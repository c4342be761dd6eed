"""TritonRunner: launches decode and combine once a layer, over the step's split plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from portable_mla.backends.triton.backend import MAX_QUERY_LEN
from portable_mla.backends.triton.combine.runner import Combine, Partials
from portable_mla.backends.triton.config.decode import Tile, amd_options, count_parts, query_block, row_tiles
from portable_mla.backends.triton.decode.kernels.decode import decode_kernel
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.device import built_for_amd
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.metadata import DecodeMetadata
from portable_mla.metadata.split_plan.plan import PlanShape
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment


def plan_shape(request: Request, tile: Tile) -> PlanShape:
    """The split plan of this tile. A uniform batch reads each latent row once for all of a request's query tokens; a
    ragged one is cut into blocks of query tokens, so that short queries leave no row tile idle; where results must not
    depend on the batch, so must the blocks. An absorbed prefill is many such blocks, each with its own causal end.
    """
    capacity, heads, most = request.capacity, request.shape.heads, request.max_query_len
    whole = request.uniform_queries and not request.deterministic and most <= MAX_QUERY_LEN
    block_q = most if whole else query_block(heads, most, tile)
    return PlanShape(
        parts=count_parts(heads * block_q, tile, request.arch.units),
        max_batch=capacity.max_batch,
        max_tokens=capacity.max_query_tokens,
        max_query_len=most,
        max_context=capacity.max_context,
        block_q=block_q,
        block_n=tile.block_n,
        min_tiles=tile.min_tiles,
        fixed=request.deterministic,
    )


def float8_conversion(request: Request) -> str | None:
    """Who converts the values of an fp8 cache: "hardware", or arithmetic, which is told their flavour."""
    dtype = request.shape.cache_format.float8
    if dtype is None:
        return None
    if request.arch.converts(dtype):
        return "hardware"
    return "e4m3fnuz" if dtype == torch.float8_e4m3fnuz else "e4m3"


class _Layout(NamedTuple):
    """What calls that are alike share. Its descriptors are of no cache but during a call: they would outlive it."""

    descriptors: tuple[TensorDescriptor | None, TensorDescriptor | None]
    decode: Callable[..., None]
    combine: Callable[..., None]
    sizes: tuple[int, int]  # query tokens and pages
    strides: tuple[int, ...]  # outer ones of q and the cache
    results: tuple[int, ...]  # of out and lse
    apart: tuple[bool | None, ...]

    def describe(self, cache: Tensor | None) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """The descriptors, of this cache from now on."""
        for descriptor in self.descriptors:
            if descriptor is not None:
                descriptor.base = cache
        return self.descriptors


class TritonRunner:
    """Decode with partial results at stable addresses; `run` allocates no device memory and never syncs.

    A captured graph stays right when the plan is written again, outside it or captured, for any page table tensor.
    """

    def __init__(self, request: Request, tile: Tile) -> None:
        self._shape, self._tile, self._amd = request.shape, tile, request.arch.vendor == "amd"
        self._float8 = float8_conversion(request)
        self.plan_shape = plan_shape(request, tile)
        self._rows = request.shape.heads * self.plan_shape.block_q
        self._grid = (self.plan_shape.parts * row_tiles(self._rows, tile),)
        self._partial_sizes = Partials.of(request, self.plan_shape)
        self.combine = Combine(request, self.plan_shape.parts)
        self._launches: dict[str, KernelLaunch] = {}
        self._metadata: DecodeMetadata | None = None
        self._partials: tuple[Tensor, Tensor] | None = None

    @property
    def graph_safe(self) -> bool:
        """Lengths and the page table are read on the device alone."""
        return True

    def plan(self, metadata: DecodeMetadata) -> None:
        """The plan is the metadata's; the first one also allocates the partial results and chooses the launches."""
        if self._partials is None:
            self._partials = self._partial_sizes.allocate(metadata.batch.device)
            self._launches = self._bind_launches(metadata.debug)
        self._metadata = metadata

    def memory(self) -> dict[str, int]:
        """Bytes of the partial results: rows that are split, in float32."""
        return {"split partials": self._partial_sizes.nbytes}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """Two launches: split decode, and the combine that also defines rows without work."""
        assert self._metadata is not None and self._partials is not None, "run before plan"
        q, cache, plan = inputs.q, self._as_read(inputs.kv_cache), self._metadata.split_plan
        assert plan is not None, "asked for in needs()"
        # What a memo does not tell apart: the scale's address and, on AMD, where storages end.
        apart = alignment(*((q, cache, kv_scale, out, lse) if built_for_amd() else (kv_scale,)))
        layout: _Layout | None = inputs.remembered
        if layout is None or layout.apart != apart:
            layout = self._new_layout(inputs, kv_scale, out, lse, apart)
        latent_desc, rope_desc = layout.describe(cache)
        layout.decode(
            q, cache, kv_scale, latent_desc, rope_desc, plan.table_header, plan.part_indptr, plan.items, out, lse,
            *self._partials, self._metadata.status.words, softmax_scale, *layout.sizes, self._rows, *layout.strides,
            *layout.results,
        )  # fmt: skip
        layout.combine(plan.token_slots, *self._partials, out, lse, self._shape.heads, self._rows, *layout.results)
        layout.describe(None)

    def _new_layout(
        self, inputs: DecodeInputs, kv_scale: Tensor | None, out: Tensor, lse: Tensor, apart: tuple[bool | None, ...]
    ) -> _Layout:
        """The layout of a call that is like none before, remembered once both kernels are compiled.

        Raises GraphCaptureError where a capture could not take a launch: it must not begin with a decode whose combine
        it cannot take.
        """
        q, cache = inputs.q, self._as_read(inputs.kv_cache)
        tokens, descriptors = q.shape[0], self._descriptors(cache)
        launches = self._launches["descriptor" if descriptors[0] is not None else self._gathered(cache)]
        strides, results = (*q.stride()[:2], *cache.stride()[:2]), (*out.stride()[:2], *lse.stride())
        key = (q.device.index, strides, results, alignment(q, cache, kv_scale, out, lse))
        decode, combine = launches.at(key, self._grid), self.combine.at(key, tokens)
        layout = _Layout(descriptors, decode, combine, (tokens, cache.shape[0]), strides, results, apart)
        if decode is launches.at(key, self._grid) and combine is self.combine.at(key, tokens):
            inputs.remember(layout)  # a first launch, which compiles, is another each time
        return layout

    def _bind_launches(self, debug: bool) -> dict[str, KernelLaunch]:
        options = {"debug": True} if debug else {}
        return {
            "descriptor": KernelLaunch(decode_kernel, self.decode_constants("descriptor") | options),
            "pointer": KernelLaunch(decode_kernel, self.decode_constants("pointer") | options),
            "single": KernelLaunch(decode_kernel, self.decode_constants("pointer") | options | {"PAIRS": False}),
        }

    def _gathered(self, cache: Tensor) -> str:
        """The launch without descriptors: rows at odd addresses have no pairs of bytes that one load could take."""
        odd = self._shape.cache_format.needs_scale and (cache.data_ptr() | cache.stride(0) | cache.stride(1)) & 1
        return "single" if odd else "pointer"

    def _as_read(self, cache: Tensor) -> Tensor:
        """The cache as the kernel reads it: bytes, where no instruction converts its fp8."""
        is_bits = self._shape.cache_format.quantised and self._float8 != "hardware"
        return cache.view(torch.uint8) if is_bits else cache

    def _descriptors(self, cache: Tensor) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Descriptors of the latent and the rope columns.

        None where the tile gathers, where the cache has no pages, or where its address or strides are not multiples of
        16 bytes.
        """
        size, strides = cache.shape, cache.stride()
        bytes_ = cache.element_size()
        odd = cache.data_ptr() % 16 or any(s * bytes_ % 16 for s in strides[:2])
        if self._tile.loads != "descriptor" or odd or not cache.numel():
            return None, None
        block_n, rope_dim = self._tile.block_n, self._shape.rope_dim
        latent = TensorDescriptor(cache, size, strides, [1, block_n, self._shape.latent_dim])
        return latent, TensorDescriptor(cache, size, strides, [1, block_n, rope_dim]) if rope_dim else None

    def decode_constants(self, loads: Literal["descriptor", "pointer"]) -> dict[str, Any]:
        """Constants and options of the decode kernel's launch. A descriptor tile that must gather after all holds its
        keys in registers, since they are not aligned for copies: with fewer than 8 warps it spills 168 to 1824 bytes.
        """
        shape, tile = self._shape, self._tile
        if loads != tile.loads:
            tile = replace(tile, loads=loads, num_warps=max(tile.num_warps, 8))
        return {
            "HEADS": shape.heads, "LATENT": shape.latent_dim, "ROPE": shape.rope_dim, "PAGE_SIZE": shape.page_size,
            "ROW_TILES": row_tiles(self._rows, tile), "BLOCK_H": tile.block_h, "BLOCK_N": tile.block_n,
            "NUM_STAGES": tile.num_stages, "DESCRIPTORS": tile.loads == "descriptor", "NUM_XCDS": tile.num_xcds,
            "FLOAT8": self._float8, "GROUPED": shape.cache_format is CacheFormat.fp8_656,
            "EARLY": shape.cache_format.needs_scale and tile.conversion == "early",
            "PAIRS": self._float8 == "hardware" and not self._amd and tile.conversion == "pairs",
            "HIDDEN_KEYS": self.plan_shape.block_q > 1,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages, **(amd_options(tile) if self._amd else {}),
        }  # fmt: skip
