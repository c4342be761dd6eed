"""Checks of tensors that every entry point shares: from host attributes alone, without a sync or a launch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from portable_mla.core.arch import Arch
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.scalars import check_scale
from portable_mla.core.shape import MLAShape

_Q_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_tensors(q: Tensor, kv_cache: Tensor) -> None:
    """q and kv_cache are 3-dimensional tensors of one device, dense in their last dimension."""
    for name, tensor, dims in (
        ("q", q, "[tokens, heads, latent + rope]"),
        ("kv_cache", kv_cache, "[pages, page_size, row]"),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected {dims}, got shape {tuple(tensor.shape)}")
        if tensor.shape[2] > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name}: expected a last-dimension stride of 1, got strides {tensor.stride()}")
    check_device("q", q, kv_cache)
    if span_bytes(kv_cache) >= 2**63:
        raise ValueError(f"kv_cache: spans 2**63 bytes or more, strides {kv_cache.stride()}")


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "kv_cache") -> None:
    """`tensor` lives where the other does."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: is on {tensor.device}, {other_name} is on {other.device}; move them to one device")


def check_kv_scale(
    kv_scale: Tensor | None,
    cache_format: CacheFormat,
    arch: Arch,
    kv_cache: Tensor | None = None,
    *,
    values: bool = False,
) -> None:
    """A per-tensor scale is given exactly where the format needs one, on the cache's device where there is a cache, and
    the format is of a flavour that the part reads. It is positive and finite: read where it is in host memory, and with
    `values`, which waits for the device."""
    if cache_format in (CacheFormat.fp8_e4m3, CacheFormat.fp8_e4m3fnuz) and arch.float8 not in (
        None,
        cache_format.dtype,
    ):
        raise TypeError(
            f"kv_cache: {arch.name} reads {arch.float8}, got {cache_format.dtype}. "
            f"Convert with kv_cache.float().to({arch.float8}), rescaled to its range"
        )
    if not cache_format.needs_scale:
        if kv_scale is not None:
            raise ValueError(f"kv_scale: expected None for a {cache_format.name} cache, got {kv_scale}")
        return
    if kv_scale is None:
        raise ValueError(f"kv_scale: kv_scale required for fp8 caches ({cache_format.name}), got None")
    if kv_scale.numel() != 1 or kv_scale.dtype != torch.float32:
        raise ValueError(f"kv_scale: expected one float32 value, got shape {tuple(kv_scale.shape)} of {kv_scale.dtype}")
    if kv_cache is not None:
        check_device("kv_scale", kv_scale, kv_cache)
    if (kv_scale.device.type == "cpu" or values) and not torch.compiler.is_compiling():
        check_scale("kv_scale", kv_scale.item())


def check_cache_row(kv_cache: Tensor, shape: MLAShape) -> None:
    """The cache's rows have the width that its format gives the geometry, and stand where their parts can be read."""
    check_cache_alignment(kv_cache, shape.cache_format)
    if kv_cache.shape[2] != shape.row_width:
        raise ValueError(
            f"kv_cache: expected rows of {shape.row_width} for {shape.latent_dim} latent + {shape.rope_dim} rope in "
            f"{shape.cache_format.name}, got {kv_cache.shape[2]}"
        )


def check_cache_alignment(kv_cache: Tensor, cache_format: CacheFormat) -> None:
    """float32 scales and bfloat16 rope values in byte rows are aligned."""
    steps = (kv_cache.storage_offset(), *kv_cache.stride()[:2])
    if cache_format is CacheFormat.fp8_656 and any(step % 4 for step in steps):
        raise ValueError(
            f"kv_cache: fp8_656 needs an offset and strides that are multiples of 4, got {steps[0]} and {steps[1:]}"
        )


def check_floating(q_dtype: torch.dtype) -> None:
    """q is of a supported dtype."""
    if q_dtype not in _Q_DTYPES:
        raise TypeError(f"q: expected a dtype of {', '.join(map(str, _Q_DTYPES))}, got {q_dtype}")


def check_q_dtype(q_dtype: torch.dtype, cache_format: CacheFormat) -> None:
    """q is of a supported dtype, and the cache's own unless the cache is quantised."""
    check_floating(q_dtype)
    if not cache_format.quantised and q_dtype != cache_format.dtype:
        raise TypeError(f"kv_cache: expected {q_dtype} like q, or an fp8 format, got {cache_format.dtype}")


def check_outputs(
    out: Tensor, lse: Tensor, width: int, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """out [tokens, heads, width] and lse [tokens, heads] have the shape and dtype of the results of inputs["q"], and
    share no memory with each other or an input. dtype: of out, if not q's. The device is the last input's."""
    q, (anchor_name, anchor) = inputs["q"], list(inputs.items())[-1]
    for name, tensor, shape, wanted in (
        ("out", out, (*q.shape[:2], width), dtype or q.dtype),
        ("lse", lse, tuple(q.shape[:2]), torch.float32),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != wanted:
            raise TypeError(f"{name}: expected {wanted}, got {tensor.dtype}")
        check_device(name, tensor, anchor, anchor_name)
        check_dense(name, tensor)
        if not _rows_are_apart(tensor):
            raise ValueError(f"{name}: rows overlap one another, strides {tensor.stride()}")
    for name, one, others in (("out", out, {**inputs, "lse": lse}), ("lse", lse, inputs)):
        for other_name, other in others.items():
            if _overlap(one, other):
                raise ValueError(
                    f"{name}: shares memory with {other_name}, strides {one.stride()} and {other.stride()}"
                )


def check_dense(name: str, tensor: Tensor) -> None:
    """The last dimension has a stride of 1."""
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected a last-dimension stride of 1, got strides {tensor.stride()}")


def _rows_are_apart(tensor: Tensor) -> bool:
    """No element has two indices: sorted by stride, each dimension steps over the ones inside it."""
    extent = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += (size - 1) * stride
    return True


def _overlap(one: Tensor, other: Tensor) -> bool:
    if torch.compiler.is_compiling() or not (one.numel() and other.numel()):
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    return one.data_ptr() < other.data_ptr() + span_bytes(other) and other.data_ptr() < one.data_ptr() + span_bytes(one)


def span_bytes(tensor: Tensor) -> int:
    """Bytes from the first to the last element of a strided tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
