"""Which backends exist, and for each architecture their order, best first. Imports nothing: backends are named here
as strings and loaded when asked for."""

# name -> "module:attribute" of its Backend; {vendor} is the architecture's.
BACKENDS: dict[str, str] = {
    "gluon": "portable_mla.backends.{vendor}.hopper.backend:BACKEND",
    "triton": "portable_mla.backends.triton.config.{vendor}:BACKEND",
    "flashmla": "portable_mla.backends.{vendor}.flashmla:BACKEND",
    "flash_attn3": "portable_mla.backends.{vendor}.flash_attn3:BACKEND",
    "flashinfer": "portable_mla.backends.{vendor}.flashinfer.backend:BACKEND",
    "aiter": "portable_mla.backends.{vendor}.aiter.backend:BACKEND",
    "aiter_persistent": "portable_mla.backends.{vendor}.aiter.backend:PERSISTENT",
    "cpu": "portable_mla.backends.cpu:BACKEND",
    "reference": "portable_mla.backends.reference:BACKEND",
}

# The reference ends every row: right for any request, fast for none, and logged when it is chosen. Libraries of vendors
# come after our own kernels and serve by name: on an H100, through their adapters and in graphs, none was more than 1 %
# faster, at equal contexts or over two serving traces (README, Speed).
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "sm80": ("triton", "flashinfer", "reference"),
    "sm86": ("triton", "flashinfer", "reference"),
    "sm89": ("triton", "flashinfer", "reference"),
    # gluon is twice as fast from 64 heads on and level below, and half as fast again in prefills; triton serves what it
    # refuses (deterministic, other geometries).
    "sm90": ("gluon", "triton", "flashmla", "flash_attn3", "flashinfer", "reference"),
    "sm100": ("triton", "flashinfer", "reference"),
    "sm103": ("triton", "flashinfer", "reference"),
    "sm120": ("triton", "flashinfer", "reference"),
    "sm121": ("triton", "flashinfer", "reference"),
    "gfx90a": ("triton", "reference"),
    "gfx942": ("triton", "aiter", "reference"),
    "gfx950": ("triton", "aiter", "aiter_persistent", "reference"),
}
