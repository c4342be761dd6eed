"""TritonPrefill: one launch for all sequences and heads of a prefill."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from portable_mla.backends.triton.config.decode import amd_options
from portable_mla.backends.triton.config.prefill import PrefillTile
from portable_mla.backends.triton.prefill.kernels.prefill import prefill_kernel
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

SEARCH = 128  # sequences whose offsets a program reads at once
Descriptors = tuple[TensorDescriptor | None, ...]


def split_width(width: int) -> tuple[int, int]:
    """A width as the power of two below or at it, and the rest."""
    main = 1 << (width.bit_length() - 1)
    return main, width - main


def query_blocks(tokens: int, sequences: int, block_m: int) -> int:
    """Programs a head that hold any ragged batch: sum(ceil(query_len / block_m)), padding rows included, is at most
    this, whatever the lengths, so that a captured grid is right for all of them."""
    return tokens // block_m + sequences + 1


class TritonPrefill:
    """Prefill without any buffer of its own; `run` allocates no device memory and never syncs."""

    def __init__(self, request: Request, tile: PrefillTile) -> None:
        self._tile, self._amd = tile, request.arch.vendor == "amd"
        shape = request.shape
        assert shape.nope_dim is not None and shape.v_dim is not None, "refused by dispatch"
        self._nope, self._rest = split_width(shape.nope_dim)
        self._rope, self._v_dim = shape.rope_dim, shape.v_dim

    @property
    def graph_safe(self) -> bool:
        """Lengths are read on the device alone."""
        return True

    def memory(self) -> dict[str, int]:
        """None."""
        return {}

    def run(self, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float) -> None:
        """One launch."""
        q, k_nope, k_pe, v = inputs.q, inputs.k_nope, inputs.k_pe, inputs.v
        descriptors = self._descriptors(k_nope, k_pe, v)
        constants = self.constants(causal=inputs.causal, descriptors=descriptors[0] is not None)
        tokens, heads = q.shape[:2]
        strides = (
            *q.stride()[:2], *k_nope.stride()[:2], k_pe.stride(0), *v.stride()[:2], *out.stride()[:2], *lse.stride()
        )  # fmt: skip
        tensors = (q, k_nope, k_pe, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, out, lse)
        key = (q.device.index, q.dtype, out.dtype, strides, alignment(*tensors))
        blocks = query_blocks(tokens, inputs.sequences, self._tile.block_m)
        _launch(tuple(constants.items()))(
            key, (blocks * heads,),
            q, k_nope, k_pe, v, *descriptors, inputs.cu_seqlens_q, inputs.cu_seqlens_k, out, lse,
            softmax_scale, tokens, v.shape[0], inputs.sequences, heads, *strides,
        )  # fmt: skip

    def constants(self, *, causal: bool, descriptors: bool) -> dict[str, Any]:
        """Constants and options of the launch."""
        tile = self._tile
        return {
            "NOPE": self._nope, "REST": self._rest, "ROPE": self._rope, "V": self._v_dim, "CAUSAL": causal,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SEARCH": SEARCH, "NUM_STAGES": tile.num_stages,
            "DESCRIPTORS": descriptors, "NUM_XCDS": tile.num_xcds, "num_warps": tile.num_warps,
            "num_stages": tile.num_stages, **(amd_options(tile) if self._amd else {}),
        }  # fmt: skip

    def _descriptors(self, k_nope: Tensor, k_pe: Tensor, v: Tensor) -> Descriptors:
        """Descriptors of both parts of the nope keys, of the rope keys and the values, made anew for each call.

        None where the tile gathers, or where an address or a stride is none that the hardware takes.
        """
        if self._tile.loads != "descriptor" or not len(v) or not all(map(_described_by_hardware, (k_nope, k_pe, v))):
            return (None,) * 4
        rows = self._tile.block_n
        return (
            _described(k_nope, [rows, 1, self._nope]), _described(k_nope, [rows, 1, self._rest]),
            _described(k_pe, [rows, self._rope]), _described(v, [rows, 1, self._v_dim]),
        )  # fmt: skip


def _described_by_hardware(tensor: Tensor) -> bool:
    """Whether address and outer strides are multiples of 16 bytes and no two rows are one; or there is no column."""
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    if not tensor.shape[-1]:
        return True
    return tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor | None:
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block) if block[-1] else None


@functools.lru_cache(maxsize=256)
def _launch(constants: tuple[tuple[str, Any], ...]) -> KernelLaunch:
    """The launch of one tile: calls have no state of their own, so that this is where compiled kernels are kept."""
    return KernelLaunch(prefill_kernel, dict(constants))
