"""What the compile gate compiles of prefill and of merging."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ci.compile.cross_compile import Resources, compile_gluon_prefill, compile_merge, compile_poison, compile_prefill
from portable_mla.backends.nvidia.hopper.arch import HOPPER
from portable_mla.backends.triton.backend import PREFILL_GEOMETRIES, TritonBackend
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.select import load

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
    jobs |= {f"merge {width}": functools.partial(compile_merge, ARCHS[arch], width) for width in (128, 512)}
    return jobs | {"poison 128": functools.partial(compile_poison, ARCHS[arch], 128)}


# nope, rope, v_dim, dtype, causal
GLUON_CASES = (
    (128, 64, 128, torch.bfloat16, True),
    (128, 64, 128, torch.float16, False),
    (64, 64, 128, torch.bfloat16, True),
    (64, 32, 64, torch.bfloat16, True),
    (192, 64, 256, torch.bfloat16, True),
    (256, 0, 256, torch.bfloat16, True),
)


def gluon_prefill_requests(arch: str) -> dict[str, tuple[Request, bool]]:
    """What is compiled of the prefill kernel that is written in Gluon, where the architecture has it, and if causal."""
    requests = {}
    for nope_dim, rope_dim, v_dim, dtype, causal in GLUON_CASES if arch == HOPPER else ():
        shape = MLAShape.expanded(128, nope_dim, rope_dim, v_dim, dtype)
        request = Request(ARCHS[arch], shape, Phase.prefill, CAPACITY.max_query_len, False, False, CAPACITY)
        words = "causal" if causal else "full"
        name = f"gluon prefill {nope_dim}+{rope_dim} v {v_dim} {str(dtype).removeprefix('torch.')} {words}"
        requests[name] = (request, causal)
    return requests


def _gluon_resources(request: Request, causal: bool) -> Resources:
    return Resources.of(compile_gluon_prefill(request, causal=causal))


def gluon_prefill_variants(arch: str) -> dict[str, Job]:
    """Hopper's Gluon prefill kernel."""
    return {name: functools.partial(_gluon_resources, *case) for name, case in gluon_prefill_requests(arch).items()}
