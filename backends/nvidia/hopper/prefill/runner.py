"""Sm90PrefillRunner: launches the Hopper prefill kernel, one launch a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from portable_mla.backends.nvidia.hopper.prefill.kernels.entry import sm90_prefill_kernel
from portable_mla.core.device import is_capturing
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

ROWS, HALF = 128, 64  # query rows of an item, and of one warpgroup
BOX = 64  # columns of the largest TMA box
ALIGNED = 8  # elements: TMA takes addresses and strides of 16 bytes


@dataclass(frozen=True)
class Sm90PrefillTile:
    """The options of one launch; what they gained stands in kernels/entry.py."""

    block_n: int = 128  # keys of a block
    late: bool = True  # rescale behind the next block's Q K^T
    ahead: bool = True  # score an item's first block while the one before is stored
    l2_bytes: int = 20 << 20  # keys and values of the heads that are worked on together
    registers: int = 232  # of a thread of the warpgroups
    loader_registers: int = 40  # 256 threads of the one and 128 of the other fill the register file


def prefill_tile(nope_dim: int, rope_dim: int, v_dim: int) -> Sm90PrefillTile:
    """What fits 227 KB of shared memory and the registers."""
    if nope_dim + rope_dim > 192 or v_dim > 128:
        return Sm90PrefillTile(block_n=64, late=False, ahead=False)
    return Sm90PrefillTile()


class Sm90PrefillRunner:
    """Ragged prefill in the expanded form; `run` never syncs. One launch at a time: launches share a queue."""

    def __init__(self, request: Request, tile: Sm90PrefillTile | None = None) -> None:
        shape = request.shape
        assert shape.nope_dim is not None and shape.v_dim is not None, "refused by dispatch"
        self._widths = (shape.nope_dim, shape.rope_dim, shape.v_dim)
        self._heads, self._programs = shape.heads, request.arch.units
        self._tile = tile or prefill_tile(*self._widths)
        context = max(request.capacity.max_context, 1)
        most = max(self._tile.l2_bytes // (context * (shape.nope_dim + shape.v_dim) * 2), 1)
        groups = -(-shape.heads // most)
        self._head_group = -(-shape.heads // groups)
        self._launches = {causal: _launch(tuple(self.constants(causal).items())) for causal in (True, False)}
        self._counter: Tensor | None = None

    @property
    def graph_safe(self) -> bool:
        """Lengths are read on the device alone."""
        return True

    def memory(self) -> dict[str, int]:
        """The queue's counter."""
        return {"queue": 4}

    def constants(self, causal: bool) -> dict[str, Any]:
        """Constants and options of the launch."""
        nope, rope, v_dim = self._widths
        tile = self._tile
        return {
            "NOPE": nope, "ROPE": rope, "V_DIM": v_dim, "CAUSAL": causal, "BLOCK_N": tile.block_n,
            "LATE": tile.late, "AHEAD": tile.ahead, "REGISTERS": tile.registers,
            "LOADER_REGISTERS": tile.loader_registers, "num_warps": 4,
        }  # fmt: skip

    def run(self, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float) -> None:
        """One launch; out and lse of every row of q are written."""
        q, k_nope, k_pe, v = map(_aligned, (inputs.q, inputs.k_nope, inputs.k_pe, inputs.v))
        if not q.shape[0]:
            return
        if not k_nope.shape[0]:  # TMA has no tensors without rows
            k_nope, k_pe, v = (tensor.new_zeros(1, *tensor.shape[1:]) for tensor in (k_nope, k_pe, v))
        results = (*out.stride()[:2], *lse.stride())
        pointers = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, out, lse)
        key = (q.device.index, q.dtype, out.dtype, results, alignment(*pointers))
        launch = self._launches[inputs.causal]
        launch.ready(key)  # before a capture does anything that it could not repeat
        rope, block_n = self._widths[1], self._tile.block_n
        k_pe_desc = descriptor(k_pe[:, None], block_n, rope) if rope else descriptor(k_nope, block_n, BOX)
        tokens, batch = q.shape[0], inputs.sequences
        slots = tokens // ROWS + batch + 1
        launch(
            key, (min(self._programs, slots * self._heads),),
            descriptor(q, HALF, BOX), descriptor(q, HALF, rope or BOX), descriptor(k_nope, block_n, BOX), k_pe_desc,
            descriptor(v, block_n, BOX), inputs.cu_seqlens_q, inputs.cu_seqlens_k, self._queue(q), out, lse,
            softmax_scale, batch, tokens, k_nope.shape[0], slots, self._heads, self._head_group,
            q, k_nope, k_pe, v, q.stride(0), k_nope.stride(0), k_pe.stride(0), v.stride(0),
            q.stride(1), k_nope.stride(1), v.stride(1), *results,
        )  # fmt: skip

    def _queue(self, q: Tensor) -> Tensor:
        """The counter, 0 before and after each launch. One that a capture allocates is zeroed by the graph's replays
        alone, so it serves that launch and is not kept."""
        if self._counter is not None:
            return self._counter
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
        if not is_capturing(q):
            self._counter = counter
        return counter


@functools.lru_cache(maxsize=64)
def _launch(constants: tuple[tuple[str, Any], ...]) -> KernelLaunch:
    """Runners of single calls come and go: compiled kernels are kept here."""
    return KernelLaunch(sm90_prefill_kernel, dict(constants))


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """[length, heads, width] as rows whose columns run over all heads, and a box of it."""
    length, heads, width = tensor.shape
    across = (heads - 1) * tensor.stride(1) + width
    stride = tensor.stride(0) if length > 1 else -(-across // ALIGNED) * ALIGNED
    return TensorDescriptor(tensor, [length, across], [stride, 1], [rows, columns], box_layout(columns))


def box_layout(columns: int) -> gl.NVMMASharedLayout:
    """What TMA writes and wgmma reads."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where TMA cannot read it: columns of all heads are counted in 31 bits."""
    stride = tensor.stride(0) if tensor.shape[0] > 1 else 0
    near = tensor.dim() < 3 or (tensor.shape[1] - 1) * tensor.stride(1) + tensor.shape[2] < 2**31
    seen = tensor.data_ptr() % 16 == 0 and stride % ALIGNED == 0 and tensor.stride(-1) == 1 and near
    return tensor if seen else tensor.clone(memory_format=torch.contiguous_format)
