"""What the compile gate compiles of the fp8 formats and of the cache write."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ci.compile.cross_compile import Resources
from ci.compile.steps import compile_write
from portable_mla.backends.triton.config.decode import FP8, TileRequest
from portable_mla.core.arch import ARCHS
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request

ROWS = (5, 16, 32, 64, 128)


def fp8_formats(arch: str) -> tuple[CacheFormat, ...]:
    """The quantised formats that an architecture reads."""
    return tuple(one for one in FP8 if not one.needs_scale or one.dtype == ARCHS[arch].float8)


def fp8_requests(arch: str) -> list[TileRequest]:
    """The widest geometry in every quantised format, at every number of rows."""
    return [TileRequest(rows, 512, 64, 64, cache_format) for cache_format in fp8_formats(arch) for rows in ROWS]


def write_variants(arch: str) -> dict[str, Callable[[], Resources]]:
    """The cache write of the widest geometry, in bfloat16 and in every quantised format, by name."""
    formats = (CacheFormat.bf16, *fp8_formats(arch))
    return {f"write {one.name}": functools.partial(compile_write, _request(arch, one)) for one in formats}


def _request(arch: str, cache_format: CacheFormat) -> Request:
    shape = MLAShape(128, 512, 64, 64, torch.bfloat16, cache_format)
    return Request(ARCHS[arch], shape, Phase.decode, 1, True, False, Capacity(64, 64, 1, 4096, 1 << 16, 1 << 30))
