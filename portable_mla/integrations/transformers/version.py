"""Which transformers can be served."""

from __future__ import annotations

import importlib.metadata

OLDEST = (5, 15)  # the first whose MLA modules cache latents and expand them in a method of their own, `expand_kv`

LAST_PAGED = (5, 17)  # the last whose continuous batching calls attention functions that others registered


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


def check_continuous_batching() -> None:
    """Raises NotImplementedError, saying what is installed and what is needed."""
    installed = importlib.metadata.version("transformers")
    if tuple(map(int, installed.split(".")[:2])) > LAST_PAGED:
        raise NotImplementedError(
            f"continuous batching needs transformers {OLDEST[0]}.{OLDEST[1]} to {LAST_PAGED[0]}.{LAST_PAGED[1]}, got "
            f"{installed}: newer ones take no attention function but their own"
        )
