"""merge_state and merge_states: attention over disjoint sets of keys, from the results over each."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from portable_mla.core.checks import check_dense, check_device
from portable_mla.core.device import on_device_of
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment
from portable_mla.runtime.torch_ops import register_op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CELLS = 2048  # values of one program; twice as many, with 64-bit row numbers, spilled up to 2.5 KB on sm100
_MOST_ROWS = 2**31 - 1  # token x head

State = tuple[Tensor, Tensor]  # out and lse of attention over some keys


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, in float32.

    Args:
        out_a, out_b: [tokens, heads, width] bfloat16, float16 or float32, any outer strides.
        lse_a, lse_b: [tokens, heads] float32, natural logarithm; -inf says that a row saw no key, and then its out
            counts for nothing, whatever it holds.

    Returns:
        out in out_a's dtype and lse float32. Rows that are empty in both are 0 and -inf; a row that is empty in one has
        the bits of the other; NaN stays NaN.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it got.

    Inference only: no gradient flows through it, and results never require grad.
    """
    result: tuple[Tensor, Tensor] = torch.ops.portable_mla.merge_state.default(out_a, lse_a, out_b, lse_b)
    return result


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of any number of parts: outs [parts, tokens, heads, width] and lses [parts, tokens, heads]."""
    result: tuple[Tensor, Tensor] = torch.ops.portable_mla.merge_states.default(outs, lses)
    return result


def merge_into(first: State, rest: State, out: Tensor, lse: Tensor) -> None:
    """Merge the first part with the rest, stacked, into out and lse, which may be the first part's own.

    first: out [tokens, heads, width] and lse [tokens, heads]; rest: the same behind a dimension of parts.
    """
    if first[0].numel() == 0:
        return
    if first[0].device.type == "cpu":
        merge_in_torch(first, rest, out, lse)
    else:
        launch_merge(first, rest, out, lse)


def merge_in_torch(first: State, rest: State, out: Tensor, lse: Tensor) -> None:
    """`merge_into` as torch has it."""
    lses = torch.cat([first[1][None], rest[1]])
    largest = lses.amax(0)
    weights = torch.exp(lses - largest.masked_fill(largest == -torch.inf, 0.0))
    total = weights.sum(0)
    acc = torch.zeros(first[0].shape, dtype=torch.float32, device=out.device)
    for part, weight, empty in zip((first[0], *rest[0]), weights, lses == -torch.inf, strict=True):
        acc += torch.where(empty[..., None], 0.0, part.float() * weight[..., None])
    out.copy_(acc / total.masked_fill(total == 0, 1.0)[..., None])
    lse.copy_(largest + torch.log(total))


def launch_merge(first: State, rest: State, out: Tensor, lse: Tensor) -> None:
    """`merge_into` as one launch."""
    tokens, heads, width = out.shape
    tensors = (*first, *rest, out, lse)
    strides = (
        *first[0].stride()[:2], *rest[0].stride()[:3], *out.stride()[:2],
        *first[1].stride(), *rest[1].stride(), *lse.stride(),
    )  # fmt: skip
    rows, launch = _merge_launch(width)
    key = (out.device.index, tuple(t.dtype for t in tensors), strides, alignment(*tensors))
    with on_device_of(out):
        launch(key, (-(-tokens * heads // rows),), *tensors, tokens, heads, len(rest[0]), *strides)


@functools.lru_cache(maxsize=64)
def _merge_launch(width: int) -> tuple[int, KernelLaunch]:
    """Rows of a program, and the launch."""
    from portable_mla.prefill.kernels.merge import merge_kernel

    constants = merge_constants(width)
    return constants["ROWS"], KernelLaunch(merge_kernel, constants)


def merge_constants(width: int) -> dict[str, Any]:
    """Constants and options of the kernel for results of this width."""
    padded = 1 << (width - 1).bit_length()
    return {"WIDTH": width, "PADDED": padded, "ROWS": max(_CELLS // padded, 1), "num_warps": 4}


def _check_parts(outs: Tensor, lses: Tensor, names: tuple[str, str], rank: int) -> None:
    out_name, lse_name = names
    for name, tensor, dims in ((out_name, outs, rank), (lse_name, lses, rank - 1)):
        if tensor.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    if outs.dtype not in _DTYPES:
        raise TypeError(f"{out_name}: expected a dtype of {', '.join(map(str, _DTYPES))}, got {outs.dtype}")
    if lses.dtype != torch.float32:
        raise TypeError(f"{lse_name}: expected torch.float32, got {lses.dtype}")
    if lses.shape != outs.shape[:-1]:
        raise ValueError(f"{lse_name}: expected shape {tuple(outs.shape[:-1])}, got {tuple(lses.shape)}")
    if outs.shape[-3] * outs.shape[-2] > _MOST_ROWS:
        raise ValueError(f"{out_name}: expected at most {_MOST_ROWS} rows, got {outs.shape[-3] * outs.shape[-2]}")
    check_dense(out_name, outs)
    check_device(lse_name, lses, outs, out_name)


def _results(out: Tensor) -> tuple[Tensor, Tensor]:
    return out.new_empty(out.shape), out.new_empty(out.shape[:-1], dtype=torch.float32)


def _merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check_parts(out_a, lse_a, ("out_a", "lse_a"), 3)
    _check_parts(out_b, lse_b, ("out_b", "lse_b"), 3)
    check_device("out_b", out_b, out_a, "out_a")
    if out_a.shape != out_b.shape:
        raise ValueError(f"out_b: expected shape {tuple(out_a.shape)} like out_a, got {tuple(out_b.shape)}")
    out, lse = _results(out_a)
    merge_into((out_a, lse_a), (out_b[None], lse_b[None]), out, lse)
    return out, lse


def _merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    _check_parts(outs, lses, ("outs", "lses"), 4)
    if not len(outs):
        raise ValueError(f"outs: expected at least one part, got shape {tuple(outs.shape)}")
    out, lse = _results(outs[0])
    merge_into((outs[0], lses[0]), (outs[1:], lses[1:]), out, lse)
    return out, lse


register_op(
    "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    _merge_state,
    lambda out_a, *_: _results(out_a),
)
register_op(
    "merge_states(Tensor outs, Tensor lses) -> (Tensor, Tensor)", _merge_states, lambda outs, _: _results(outs[0])
)
