"""How the cache write's kernel is launched."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from portable_mla.cache.write_arguments import WriteArguments
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.device import on_device_of
from portable_mla.core.quantize import stored_parts
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment

BLOCK_HEADS = 16
_FLAVOURS = {
    CacheFormat.fp8_e4m3: "e4m3",
    CacheFormat.fp8_656: "e4m3",
    CacheFormat.fp8_e4m3fnuz: "e4m3fnuz",
}


def launch_write(call: WriteArguments) -> None:
    """One launch: a program for each token's row, and one for every 16 heads of its query."""
    cache = call.kv_cache
    if call.cache_format in _FLAVOURS and call.cache_format is not CacheFormat.fp8_656:
        cache = cache.view(torch.uint8)
    latent, rope, groups = stored_parts(cache, call.cache_format, call.latent_dim)
    if groups is not None:
        latent = latent.view(torch.uint8)
    source = call.q_pe if call.q_source is None else call.q_source
    tensors = (
        latent, rope, groups, call.slots, call.c_kv, call.k_pe, call.norm_weight, call.positions, call.cos_sin,
        call.kv_scale, source, call.q_pe, call.rows, call.status,
    )  # fmt: skip
    strides = (
        *latent.stride()[:2], *rope.stride()[:2], *_strides(groups, 2), *_strides(call.slots, 1),
        *_strides(call.c_kv, 1), *_strides(call.k_pe, 1), *_strides(call.positions, 1), *_strides(call.cos_sin, 1),
        *_strides(source, 2), *_strides(call.q_pe, 2), *_strides(call.rows, 1),
    )  # fmt: skip
    heads = 0 if source is None else source.shape[1]
    table_rows = 0 if call.cos_sin is None else len(call.cos_sin)
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
    key = (cache.device.index, dtypes, strides, alignment(*tensors))
    launch = _launch(cache.shape[1], call.latent_dim, call.rope_dim, call.interleaved, call.cache_format)
    grid = (len(call.slots), 1 + -(-heads // BLOCK_HEADS))
    with on_device_of(cache):
        launch(key, grid, *tensors, call.eps, cache.shape[0], table_rows, heads, *strides)


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


@functools.lru_cache(maxsize=64)
def _launch(
    page_size: int, latent_dim: int, rope_dim: int, interleaved: bool, cache_format: CacheFormat
) -> KernelLaunch:
    from portable_mla.cache.kernels.write import write_latent_kernel

    return KernelLaunch(
        write_latent_kernel, write_constants(page_size, latent_dim, rope_dim, interleaved, cache_format)
    )


def write_constants(
    page_size: int, latent_dim: int, rope_dim: int, interleaved: bool, cache_format: CacheFormat
) -> dict[str, Any]:
    """Constants and options of the launch. A product and the sum after it are rounded apart, as torch rounds them."""
    half = rope_dim // 2
    return {
        "PAGE_SIZE": page_size, "LATENT": latent_dim, "PADDED": _power_of_two(latent_dim), "HALF": half,
        "PADDED_HALF": _power_of_two(half), "BLOCK_HEADS": BLOCK_HEADS, "INTERLEAVED": interleaved,
        "FLOAT8": _FLAVOURS.get(cache_format), "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip


def _power_of_two(width: int) -> int:
    return 1 << max(width - 1, 0).bit_length()
