"""What the compile gate compiles of prefill and of merging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ci.cross_compile import Resources, compile_merge, compile_prefill
from portable_mla.backends.triton.backend import PREFILL_GEOMETRIES, TritonBackend
from portable_mla.device import ARCHS
from portable_mla.dispatch import load
from portable_mla.shape import Capacity, MLAShape, Phase, Request

Job = Callable[[], Resources]
CAPACITY = Capacity(
    max_batch=8, max_query_tokens=8192, max_query_len=4096, max_context=4096, max_pages=0, cache_bytes=0
)  # fmt: skip


def prefill_request(arch: str, geometry: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Request:
    """A prefill of 16 heads. geometry: nope, rope, v."""
    shape = MLAShape.expanded(16, *geometry, dtype)
    return Request(ARCHS[arch], shape, Phase.prefill, CAPACITY.max_query_len, False, False, CAPACITY)


def prefill_variants(arch: str) -> dict[str, Job]:
    """Each geometry with its rule's tile, and gathered where that loads by descriptor; the widest rows of the zoo also
    in fp16, without the causal mask and with a float32 result."""
    backend = load("triton", ARCHS[arch].vendor)
    assert isinstance(backend, TritonBackend)
    jobs: dict[str, Job] = {}
    for geometry in PREFILL_GEOMETRIES:
        request = prefill_request(arch, geometry)
        tile = backend.prefill_tile(request)
        options = f"w{tile.num_warps}s{tile.num_stages}" + (f"e{tile.waves_per_eu}" if tile.waves_per_eu else "")
        name = "prefill {}+{}/{}".format(*geometry) + f" {tile.block_m}x{tile.block_n}{options}"
        compiled = functools.partial(compile_prefill, tile=tile)
        jobs[f"{name} {tile.loads}"] = functools.partial(compiled, request)
        if tile.loads == "descriptor":
            jobs[f"{name} unaligned"] = functools.partial(compiled, request, aligned=False)
        if geometry == PREFILL_GEOMETRIES[0]:
            half = prefill_request(arch, geometry, torch.float16)
            jobs[f"{name} fp16"] = functools.partial(compiled, half)
            jobs[f"{name} full"] = functools.partial(compiled, request, causal=False)
            jobs[f"{name} full fp32 out"] = functools.partial(
                compiled, replace(request, float32_out=True), causal=False
            )
    return jobs | {f"merge {width}": functools.partial(compile_merge, ARCHS[arch], width) for width in (128, 512)}
