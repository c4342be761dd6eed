"""The packages that the doctor looks for."""

from __future__ import annotations

import importlib.metadata
import platform

from portable_mla.runtime.packages import Package

PACKAGES = (
    Package("torch", "torch", ("torch",)),
    Package("numpy", "numpy", ("numpy",)),
    Package("triton", "triton", ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")),
    Package("flash_mla", "flash_mla", ("flash-mla", "sgl-flash-mla")),
    Package("sgl-flash-mla", "flash_mla", ("sgl-flash-mla",), by_distribution=True),
    Package("flash_attn_interface", "flash_attn_interface", ("flash-attn-3", "flash-attn-interface")),
    Package("flashinfer", "flashinfer", ("flashinfer-python", "flashinfer")),
    Package("aiter", "aiter", ("amd-aiter", "aiter"), marks=("mla.py", "ops")),
    Package("vllm", "vllm", ("vllm",)),
    Package("transformers", "transformers", ("transformers",)),
)


def own_versions() -> dict[str, str]:
    """Versions of Python and of this library."""
    try:
        own = importlib.metadata.version("portable-mla")
    except importlib.metadata.PackageNotFoundError:
        own = "run from its source, not installed"
    return {"python": platform.python_version(), "portable_mla": own}
