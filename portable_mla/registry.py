"""Which backends exist, and for each architecture their order, best first. Imports nothing: backends are named here
as strings and loaded when asked for."""

# name -> "module:attribute" of its Backend.
BACKENDS: dict[str, str] = {
    "cpu": "portable_mla.backends.cpu:BACKEND",
    "reference": "portable_mla.backends.reference:BACKEND",
}

# The reference ends every row: right for any request, fast for none, and logged when it is chosen.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "sm80": ("reference",),
    "sm86": ("reference",),
    "sm89": ("reference",),
    "sm90": ("reference",),
    "sm100": ("reference",),
    "sm103": ("reference",),
    "sm120": ("reference",),
    "sm121": ("reference",),
    "gfx90a": ("reference",),
    "gfx942": ("reference",),
    "gfx950": ("reference",),
}
