"""PrefillArguments: the tensors of one prefill call, checked from host attributes alone (no sync, no launch)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.checks import check_dense, check_device, check_floating
from portable_mla.core.device import arch_of
from portable_mla.core.scalars import check_bound, check_scale
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.interface import PrefillInputs

_DIMENSIONS = {
    "q": "[tokens, heads, nope + rope]",
    "k_nope": "[keys, heads, nope]",
    "k_pe": "[keys, rope]",
    "v": "[keys, heads, v_dim]",
}


@dataclass(frozen=True)
class PrefillArguments:
    """One prefill call as the caller made it. Shapes as in `mla_prefill`."""

    inputs: PrefillInputs
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float

    def __post_init__(self) -> None:
        check_prefill_tensors(self.inputs)
        object.__setattr__(self, "softmax_scale", check_scale("softmax_scale", self.softmax_scale))
        for name in ("max_seqlen_q", "max_seqlen_k"):
            check_bound(name, getattr(self, name))

    def request(self, *, deterministic: bool, float32_out: bool = False) -> Request:
        """The tightest request that this call fits."""
        inputs, most = self.inputs, max(self.max_seqlen_q, 1)
        q, v = inputs.q, inputs.v
        shape = MLAShape.expanded(
            q.shape[1], inputs.k_nope.shape[2], inputs.k_pe.shape[1], v.shape[2], q.dtype
        )  # fmt: skip
        capacity = Capacity(
            max_batch=inputs.sequences,
            max_query_tokens=q.shape[0],
            max_query_len=most,
            max_context=self.max_seqlen_k,
            max_pages=0,
        )
        arch = arch_of(q.device)
        return Request(arch, shape, Phase.prefill, most, False, deterministic, capacity, float32_out)

    def check_values(self) -> None:
        """Check the offsets by value: free in host memory, a sync on a GPU.

        Raises ValueError naming the offset, what is allowed and what it is.
        """
        inputs = self.inputs
        for name, offsets, rows, most in (
            ("cu_seqlens_q", inputs.cu_seqlens_q, inputs.q.shape[0], self.max_seqlen_q),
            ("cu_seqlens_k", inputs.cu_seqlens_k, inputs.v.shape[0], self.max_seqlen_k),
        ):
            values = offsets.tolist()
            if values[0] != 0 or values[-1] > rows:
                raise ValueError(f"{name}: expected offsets from 0 to at most {rows}, got {values[0]} to {values[-1]}")
            bound = f"0 to {most} rows (max_seqlen_{name[-1]})"
            for sequence, (start, end) in enumerate(itertools.pairwise(values)):
                if not 0 <= end - start <= most:
                    raise ValueError(f"{name}: sequence {sequence}: expected {bound}, got {end - start}")


def check_prefill_tensors(inputs: PrefillInputs) -> None:
    """Dimensions, dtypes and devices of the inputs fit one another."""
    q = inputs.q
    for name, dimensions in _DIMENSIONS.items():
        tensor = getattr(inputs, name)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != dimensions.count(",") + 1:
            raise ValueError(f"{name}: expected {dimensions}, got shape {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {tensor.dtype}")
        check_dense(name, tensor)
        check_device(name, tensor, q, "q")
    check_floating(q.dtype)
    heads, keys = q.shape[1], inputs.v.shape[0]
    for name, what, expected, got in (
        ("q", "in the last dimension (nope + rope)", inputs.k_nope.shape[2] + inputs.k_pe.shape[1], q.shape[2]),
        ("k_nope", "heads like q", heads, inputs.k_nope.shape[1]),
        ("v", "heads like q", heads, inputs.v.shape[1]),
        ("k_nope", "keys like v", keys, inputs.k_nope.shape[0]),
        ("k_pe", "keys like v", keys, inputs.k_pe.shape[0]),
    ):
        if expected != got:
            raise ValueError(f"{name}: expected {expected} {what}, got {got}")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        _check_offsets(name, getattr(inputs, name), q)
    if inputs.cu_seqlens_q.shape != inputs.cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected {inputs.sequences + 1} offsets like cu_seqlens_q, "
            f"got {inputs.cu_seqlens_k.shape[0]}"
        )


def _check_offsets(name: str, offsets: Tensor, q: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(offsets).__name__}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {offsets.dtype}. Convert with .to(torch.int32)")
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"{name}: expected [sequences + 1], got shape {tuple(offsets.shape)}")
    check_dense(name, offsets)
    check_device(name, offsets, q, "q")
