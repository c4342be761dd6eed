"""Sm90Backend: when the Gluon kernels for Hopper serve."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
from collections.abc import Callable
from typing import Any

import torch

from portable_mla.backends.nvidia.hopper.arch import HOPPER
from portable_mla.backends.triton.backend import TritonBackend
from portable_mla.backends.triton.config.nvidia import BACKEND as PORTABLE
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import PrefillRunner, Runner
from portable_mla.metadata import Needs

GEOMETRIES = ((512, 64), (512, 0))  # latent, rope
PREFILL_GEOMETRIES = ((128, 64, 128), (192, 64, 256), (256, 0, 256), (64, 64, 128), (64, 32, 64))  # nope, rope, v
MAX_HEADS, MAX_QUERY_LEN = 128, 8
PAGE_BOX = 64  # rows of the largest TMA box; pages are multiples of it, or of these fractions
SMALL_PAGES = (16, 32)
DTYPES = {CacheFormat.bf16: torch.bfloat16, CacheFormat.fp16: torch.float16}

Checks = tuple[tuple[bool, str], ...]

_GLUON = "triton.experimental.gluon"
_HOPPER = f"{_GLUON}.language.nvidia.hopper"
# What the kernel is written with, "module:name", each under the names that Triton releases gave it.
GLUON_NAMES = (
    ("triton:aggregate", "triton.language.core:_aggregate"),
    (f"{_GLUON}.language:barrier", f"{_GLUON}.language:thread_barrier"),
    (f"{_GLUON}.language:warp_specialize",),
    (
        f"{_GLUON}.language:shared_memory_descriptor.reinterpret",
        f"{_GLUON}.language:shared_memory_descriptor._reinterpret",
    ),
    (f"{_GLUON}.language:DistributedLinearLayout",),
    (f"{_GLUON}.language:NVMMADistributedLayout",),
    (f"{_HOPPER}:fence_async_shared",),
    (f"{_HOPPER}:warpgroup_mma",),
    (f"{_HOPPER}.mbarrier:expect",),
    (f"{_HOPPER}.tma:async_load", f"{_HOPPER}.tma:async_copy_global_to_shared"),
    (f"{_GLUON}.nvidia.hopper:TensorDescriptor",),
)


def missing_names(find: Callable[[str], Any] = importlib.import_module) -> tuple[str, ...]:
    """The Gluon names that this Triton lacks. find: imports a module, or raises ImportError."""

    def found(path: str) -> bool:
        module, name = path.split(":")
        try:
            operator.attrgetter(name)(find(module))
        except (ImportError, AttributeError):
            return False
        return True

    return tuple(names[0].replace(":", ".") for names in GLUON_NAMES if not any(map(found, names)))


@functools.cache
def _reasons_unavailable() -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("needs the package triton (pip install portable-mla[triton])",)
    missing = missing_names()
    if not missing:
        return ()
    import triton

    return (f"needs a Triton whose Gluon has {', '.join(missing)}, got Triton {triton.__version__}",)


class Sm90Backend:
    """Split-KV decode and prefill with wgmma and TMA, for one architecture; portable Triton serves what it refuses."""

    def __init__(self, portable: TritonBackend, arch_name: str) -> None:
        self._portable, self._arch_name = portable, arch_name

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Gluon is experimental: a release that moved a name is refused, not guessed at."""
        return _reasons_unavailable()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        """Geometries, dtypes and sizes that the kernels are compiled and tested for."""
        checks = self._prefill_checks(request) if request.phase is Phase.prefill else self._decode_checks(request)
        return tuple(reason for holds, reason in checks if not holds)

    def _prefill_checks(self, request: Request) -> Checks:
        shape = request.shape
        known = ", ".join(f"{nope}+{rope}/{v}" for nope, rope, v in PREFILL_GEOMETRIES)
        widths = (shape.nope_dim, shape.rope_dim, shape.v_dim)
        return (
            (request.arch.name == self._arch_name, f"needs {self._arch_name}, got {request.arch.name}"),
            (widths in PREFILL_GEOMETRIES, f"needs nope+rope/v of {known}, got {widths[0]}+{widths[1]}/{widths[2]}"),
            (shape.q_dtype in DTYPES.values(), f"needs bf16 or fp16 queries, got {shape.q_dtype}"),
        )

    def _decode_checks(self, request: Request) -> Checks:
        shape = request.shape
        geometry = (shape.latent_dim, shape.rope_dim)
        known = ", ".join(f"{latent}+{rope}" for latent, rope in GEOMETRIES)
        paged = shape.page_size % PAGE_BOX == 0 or shape.page_size in SMALL_PAGES
        q_dtype = DTYPES.get(shape.cache_format)
        return (
            (request.arch.name == self._arch_name, f"needs {self._arch_name}, got {request.arch.name}"),
            (geometry in GEOMETRIES, f"needs latent+rope of {known}, got {geometry[0]}+{geometry[1]}; triton has more"),
            (q_dtype is not None, f"needs a bf16 or fp16 cache, got {shape.cache_format.name}"),
            (q_dtype in (None, shape.q_dtype), f"needs queries of the cache's dtype, got {shape.q_dtype}"),
            (shape.heads <= MAX_HEADS, f"needs at most {MAX_HEADS} heads, got {shape.heads}"),
            (
                request.max_query_len <= MAX_QUERY_LEN,
                f"needs at most {MAX_QUERY_LEN} query tokens a request, got {request.max_query_len}",
            ),
            (
                paged,
                f"needs a page_size of 16, 32 or a multiple of {PAGE_BOX}, got {shape.page_size}; triton takes any",
            ),
            (not request.deterministic, "needs deterministic off: where a context is split depends on the batch"),
        )

    def needs(self, request: Request) -> Needs:
        """Page tables are walked in place, where the split plan says."""
        from portable_mla.backends.nvidia.hopper.decode.runner import sm90_plan_shape

        return Needs(split_plan=sm90_plan_shape(request))

    def bind(self, request: Request) -> Runner | PrefillRunner:
        """A runner; a decode's buffers are allocated by the first plan, on the device of the batch, and stay."""
        if request.phase is Phase.prefill:
            from portable_mla.backends.nvidia.hopper.prefill.runner import Sm90PrefillRunner

            return Sm90PrefillRunner(request)
        from portable_mla.backends.nvidia.hopper.decode.runner import Sm90Runner

        return Sm90Runner(request, self._portable.tile(request))


BACKEND = Sm90Backend(PORTABLE, HOPPER)
