"""Which backends exist, and for each architecture their order, best first. Imports nothing: backends are named here
as strings and loaded when asked for."""

# name -> "module:attribute" of its Backend; {vendor} is the architecture's.
BACKENDS: dict[str, str] = {
    "gluon": "portable_mla.backends.{vendor}.gluon:BACKEND",
    "triton": "portable_mla.backends.{vendor}.triton:BACKEND",
    "cpu": "portable_mla.backends.cpu:BACKEND",
    "reference": "portable_mla.backends.reference:BACKEND",
}

# The reference ends every row: right for any request, fast for none, and logged when it is chosen.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "sm80": ("triton", "reference"),
    "sm86": ("triton", "reference"),
    "sm89": ("triton", "reference"),
    # gluon is twice as fast from 64 heads on and level below; triton serves what it refuses (deterministic, other
    # geometries).
    "sm90": ("gluon", "triton", "reference"),
    "sm100": ("triton", "reference"),
    "sm103": ("triton", "reference"),
    "sm120": ("triton", "reference"),
    "sm121": ("triton", "reference"),
    "gfx90a": ("triton", "reference"),
    "gfx942": ("triton", "reference"),
    "gfx950": ("triton", "reference"),
}
