"""Sm90Runner: launches the Hopper decode kernel and the shared combine once a layer, over the step's split plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from portable_mla.backends.nvidia.hopper.decode.config import Sm90Tile, sm90_tile
from portable_mla.backends.nvidia.hopper.decode.fallback import PortablePath
from portable_mla.backends.nvidia.hopper.decode.kernels.entry import sm90_decode_kernel
from portable_mla.backends.nvidia.hopper.decode.kernels.tma import BOX_LAYOUT, TILE_LAYOUT
from portable_mla.backends.nvidia.hopper.eviction import rewriting
from portable_mla.backends.triton.combine.runner import Combine, Partials
from portable_mla.backends.triton.config.decode import Tile, row_tiles
from portable_mla.backends.triton.decode.runner import plan_shape
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.metadata import DecodeMetadata
from portable_mla.metadata.split_plan.plan import PlanShape
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

BLOCK = 64  # rows of a program, keys of a block, columns of a TMA box
ALIGNMENT = 16  # bytes, of every address and stride that TMA takes
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # what TMA writes and wgmma reads
TILES = 4  # of 64 columns, of half a block of keys
_ROWS_AND_KEYS = Tile(block_h=BLOCK, block_n=BLOCK, num_warps=4, num_stages=1)


def sm90_plan_shape(request: Request) -> PlanShape:
    """The split plan of the Gluon kernel."""
    shape = plan_shape(request, _ROWS_AND_KEYS)
    rows = request.shape.heads * shape.block_q
    shape = replace(shape, row_tiles=row_tiles(rows, _ROWS_AND_KEYS), halves=rows > BLOCK // 2)
    tile = sm90_tile(rows)
    return replace(shape, min_tiles=tile.min_tiles, overhead=tile.overhead, merge_cost=tile.merge_cost)


def has_narrow_partials(request: Request) -> bool:
    """Whether partial results are float16, which keeps more digits than the queries have."""
    return request.shape.q_dtype is torch.bfloat16


class Sm90Runner:
    """Decode with partial results at stable addresses; `run` never syncs.

    Queries that TMA cannot see as rows of one matrix are copied into a buffer, which the first such call allocates. A
    cache whose address, strides or ratio of strides is odd is served by the portable kernels. The kernel asserts
    nothing on the device, also under PORTABLE_MLA_DEBUG=1.
    """

    def __init__(self, request: Request, portable: Tile, tile: Sm90Tile | None = None) -> None:
        self._shape, self._capacity = request.shape, request.capacity
        self.plan_shape = sm90_plan_shape(request)
        self._rows = request.shape.heads * self.plan_shape.block_q
        self._tile = tile or sm90_tile(self._rows)
        self._grid = (self.plan_shape.parts * self.plan_shape.row_tiles,)
        narrow = has_narrow_partials(request)
        self.partials = Partials.of(request, self.plan_shape, torch.float16 if narrow else torch.float32)
        constants = self.decode_constants()
        self._query_box: int = constants["QUERY_ROWS"]
        self._box_tiles: int = TILES // constants["BOXES"]
        self._decode = KernelLaunch(sm90_decode_kernel, constants, rewriting)
        self._combine = Combine(request, self.plan_shape.parts, narrow=narrow, dependent=self._tile.dependent)
        self._portable = PortablePath(request, portable)
        self._metadata: DecodeMetadata | None = None
        self._partial_tensors: tuple[Tensor, Tensor] | None = None
        self._dense_q: Tensor | None = None

    @property
    def graph_safe(self) -> bool:
        """Lengths and the page table are read on the device alone."""
        return True

    def plan(self, metadata: DecodeMetadata) -> None:
        """The plan is the metadata's; the first one also allocates the partial results."""
        if self._partial_tensors is None:
            self._partial_tensors = self.partials.allocate(metadata.batch.device)
        self._metadata = metadata
        self._portable.plan(metadata)

    def memory(self) -> dict[str, int]:
        """Bytes of the partial results, and of what odd queries or caches have needed so far."""
        memory = {"split partials": self.partials.nbytes}
        if self._dense_q is not None:
            memory["query copy"] = self._dense_q.nbytes
        return memory | self._portable.memory()

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """Two launches: split decode, and the combine that also defines rows without work."""
        assert self._metadata is not None and self._partial_tensors is not None, "run before plan"
        assert kv_scale is None, "refused by dispatch"
        layout: _Layout | None = inputs.remembered or self._new_layout(inputs, out, lse)
        if layout is None:
            self._portable.run(self._metadata, inputs, out, lse, softmax_scale)
            return
        plan, partials, cache = self._metadata.split_plan, self._partial_tensors, inputs.kv_cache
        assert plan is not None, "asked for in needs()"
        q_desc, kv_desc, box_desc = layout.q_desc, layout.kv_desc, layout.box_desc
        q_desc.base, kv_desc.base = self._dense(inputs.q) if layout.copied_q else inputs.q, cache
        box_desc.base = cache
        layout.decode(
            q_desc, kv_desc, box_desc, cache, plan.table_header, plan.heads, plan.items, out, lse, *partials,
            self._metadata.status.words, softmax_scale, *layout.sizes, self._rows, *layout.results,
        )  # fmt: skip
        layout.combine(plan.token_slots, *partials, out, lse, self._shape.heads, self._rows, *layout.results)
        q_desc.base = kv_desc.base = box_desc.base = None  # a kept one would outlive the tensor

    def _new_layout(self, inputs: DecodeInputs, out: Tensor, lse: Tensor) -> _Layout | None:
        """The layout of a call that is like none before, remembered once both kernels are compiled; None for a cache
        that TMA cannot read.

        Raises GraphCaptureError where a capture could not take a launch: it must not begin with a decode whose combine
        it cannot take, or with a copy of q.
        """
        q, cache = inputs.q, inputs.kv_cache
        rows = page_rows(cache) if cache.numel() else 0  # TMA has no tensors without rows
        if rows == 0:
            return None
        tokens, stride_slot = q.shape[0], _outer_strides(cache)[1]
        results = (*_outer_strides(out), *lse.stride())
        key = (q.device.index, q.stride(), stride_slot, results, alignment(q, cache, out, lse))
        decode, combine = self._decode.at(key, self._grid), self._combine.at(key, tokens)
        copied = not _is_rows(q)
        q_desc = self._query_rows(self._dense(q) if copied else q)
        kv_desc, box_desc = cache_descriptors(cache, rows, self._box_tiles)
        layout = _Layout(q_desc, kv_desc, box_desc, copied, decode, combine, (tokens, rows, stride_slot), results)
        if decode is self._decode.at(key, self._grid) and combine is self._combine.at(key, tokens):
            inputs.remember(layout)  # a first launch, which compiles, is another each time
        return layout

    def decode_constants(self) -> dict[str, Any]:
        """Constants and options of the decode kernel's launch."""
        shape, tile = self._shape, self._tile
        return {
            "HEADS": shape.heads, "ROPE": shape.rope_dim, "PAGE_SIZE": shape.page_size,
            "BLOCK_Q": self.plan_shape.block_q, "QUERY_ROWS": min(max(triton.next_power_of_2(self._rows), 8), BLOCK),
            "BOXES": tile.boxes if shape.page_size >= BLOCK else TILES,
            "DEPENDENT": tile.early,
            "LONG": tile.long if shape.page_size >= BLOCK else 0,  # loaders of small pages would spill
            "FAR": tile.far,
            "REGISTERS": tile.registers, "LOADER_REGISTERS": tile.loader_registers, "num_warps": 4,
            "launch_pdl": tile.early,
        }  # fmt: skip

    def _query_rows(self, q: Tensor) -> TensorDescriptor:
        """q as [tokens * heads, width]."""
        tokens, heads, _ = q.shape
        shape, box = [tokens * heads, q.shape[-1]], [self._query_box, BLOCK]
        return TensorDescriptor(q, shape, [_outer_strides(q)[1], 1], box, LAYOUT)

    def _dense(self, q: Tensor) -> Tensor:
        """A copy of queries whose strides TMA cannot follow."""
        if self._dense_q is None:
            shape = (self._capacity.max_query_tokens, *q.shape[1:])
            self._dense_q = torch.empty(shape, dtype=q.dtype, device=q.device)
        return self._dense_q[: q.shape[0]].copy_(q)


class _Layout(NamedTuple):
    """What calls that are alike share. Their descriptors are of no tensor but during a call."""

    q_desc: TensorDescriptor
    kv_desc: TensorDescriptor
    box_desc: TensorDescriptor
    copied_q: bool
    decode: Callable[..., None]
    combine: Callable[..., None]
    sizes: tuple[int, int, int]  # query tokens, cache rows from page to page, stride of a slot
    results: tuple[int, ...]  # outer strides of out and lse


def _outer_strides(tensor: Tensor) -> tuple[int, int]:
    """Strides of the outer two of three dimensions; of a dimension of one, what a dense tensor's would be."""
    stride_head = tensor.stride(1) if tensor.shape[1] > 1 else tensor.shape[2]
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1] * stride_head, stride_head


def _is_rows(q: Tensor) -> bool:
    """Whether TMA can see all heads of all tokens as rows of one matrix."""
    tokens, heads, _ = q.shape
    stride_token, stride_head = _outer_strides(q)
    return (stride_token == heads * stride_head or tokens <= 1) and _aligned(q, stride_head)


def _aligned(tensor: Tensor, *strides: int) -> bool:
    bytes_ = tensor.element_size()
    return tensor.data_ptr() % ALIGNMENT == 0 and all(stride * bytes_ % ALIGNMENT == 0 for stride in strides)


def page_rows(cache: Tensor) -> int:
    """Rows from one page to the next when the cache is seen as rows of its slots' stride; 0 where it cannot be."""
    stride_page, stride_slot = _outer_strides(cache)
    seen = stride_slot > 0 and stride_page % stride_slot == 0 and _aligned(cache, stride_slot)
    return stride_page // stride_slot if seen else 0


def cache_blocks(page_size: int, tiles: int) -> tuple[tuple[list[int], Any], tuple[list[int], Any]]:
    """Block and layout of each of the two descriptors of the cache: one tile of 64 columns of a page's rows and `tiles`
    of them, or for both all rows of a small page."""
    if page_size < BLOCK:
        rows = ([page_size, BLOCK], LAYOUT)
        return rows, rows
    return ([1, BLOCK, BLOCK], TILE_LAYOUT.value), ([tiles, 1, BLOCK, BLOCK], BOX_LAYOUT.value)


def cache_descriptors(cache: Tensor, step: int, tiles: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """The cache as pages, and as tiles of 64 columns of those: what is outside a page is read as 0. Small pages are
    loaded as rows of slots, of which `step` are from page to page."""
    pages, page_size, width = cache.shape
    stride_page, stride_slot = _outer_strides(cache)
    block, box = cache_blocks(page_size, tiles)
    if page_size < BLOCK:
        rows = TensorDescriptor(cache, [(pages - 1) * step + page_size, width], [stride_slot, 1], *block)
        return rows, rows
    shape, strides = [width // BLOCK, pages, page_size, BLOCK], [BLOCK, stride_page, stride_slot, 1]
    whole = TensorDescriptor(cache, [*cache.shape], [stride_page, stride_slot, 1], *block)
    return whole, TensorDescriptor(cache, shape, strides, *box)
