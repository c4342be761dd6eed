"""Which transformers can be served."""

from __future__ import annotations

import importlib.metadata

OLDEST = (5, 15)  # the first whose MLA modules cache latents and expand them in a method of their own, `expand_kv`


def check_version() -> None:
    """Raises ImportError, saying what is installed and what is needed."""
    needed = f"transformers {OLDEST[0]}.{OLDEST[1]} or newer (pip install portable-mla[transformers])"
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"portable_mla.integrations.transformers needs {needed}; it is not installed") from None
    parts = installed.split(".")
    if not all(part.isdecimal() for part in parts[:2]) or tuple(map(int, parts[:2])) < OLDEST:
        raise ImportError(
            f"portable_mla.integrations.transformers needs {needed}, got {installed}: older MLA modules cache expanded "
            "keys and values, and have no place where latents could be attended to"
        )
