"""poison_rows: what the bounds of a cached context leave out is never left out silently."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from portable_mla.core.device import on_device_of
from portable_mla.metadata.status import NO_FAULT, Fault
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

SCAN = 256


def poison_rows(
    lens: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, *, max_len: int, max_tokens: int, status: Tensor | None
) -> None:
    """Make the rows of each sequence NaN whose context is negative or over max_len, or with those before it over
    max_tokens, and report the first to the status words. Reads no value on the host; capturable.

    lens: [sequences] int32; cu_seqlens: [sequences + 1] int32, of out [tokens, heads, width] and lse [tokens, heads].
    """
    if not len(lens) or not len(out):
        return
    if not out.is_cuda or importlib.util.find_spec("triton") is None:
        poison_in_torch(lens, cu_seqlens, out, lse, max_len=max_len, max_tokens=max_tokens, status=status)
    else:
        launch_poison(lens, cu_seqlens, out, lse, max_len=max_len, max_tokens=max_tokens, status=status)


def poison_in_torch(
    lens: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, *, max_len: int, max_tokens: int, status: Tensor | None
) -> None:
    """What the kernel does."""
    total = torch.cumsum(lens.clamp(min=0), 0, dtype=torch.int64)
    wrong = (lens < 0) | (lens > max_len) | ((lens > 0) & (total > max_tokens))
    if status is not None:
        sequence = torch.arange(len(lens), dtype=torch.int64, device=lens.device)
        word = torch.where(wrong, sequence << 32 | (lens.long() & 0xFFFFFFFF), NO_FAULT).amin()
        torch.minimum(status[Fault.context_len], word, out=status[Fault.context_len])
    token = torch.arange(len(out), dtype=torch.int32, device=out.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    rows = (sequence < len(lens)) & wrong[sequence.clamp(max=len(lens) - 1)]
    out.masked_fill_(rows[:, None, None], torch.nan)
    lse.masked_fill_(rows[:, None], torch.nan)


def launch_poison(
    lens: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, *, max_len: int, max_tokens: int, status: Tensor | None
) -> None:
    """One launch, of a program a sequence."""
    tensors = (lens, cu_seqlens, out, lse, status)
    strides = (*out.stride()[:2], *lse.stride())
    key = (out.device.index, out.dtype, strides, alignment(*tensors))
    with on_device_of(out):
        _launch(out.shape[2])(
            key, (len(lens),), *tensors, max_len, min(max_tokens, 2**31 - 1), *out.shape[:2], *strides
        )


@functools.lru_cache(maxsize=64)
def _launch(width: int) -> KernelLaunch:
    from portable_mla.prefill.kernels.poison_rows import poison_rows_kernel

    return KernelLaunch(poison_rows_kernel, poison_constants(width))


def poison_constants(width: int) -> dict[str, Any]:
    """Constants and options of the kernel for results of this width."""
    return {"WIDTH": width, "PADDED": 1 << (width - 1).bit_length(), "SCAN": SCAN, "num_warps": 1}
