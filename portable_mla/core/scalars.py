"""Scalars that callers give: checked by value and converted in one way, for every entry point."""

from __future__ import annotations

import math
import numbers


def check_scale(name: str, scale: object) -> float:
    """The scale as a float: it is said, finite and positive; there is no default, since 1/sqrt(latent + rope) is wrong
    for MLA. An integer would be another argument to a kernel."""
    if type(scale) is not float:
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
            hint = ". It is (nope + rope)**-0.5 * mscale**2" if name == "softmax_scale" else ""
            raise ValueError(f"{name}: expected a positive finite float, got {_shown(scale)}{hint}")
        scale = float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{name}: expected a positive finite float, got {scale}")
    return scale


def check_bound(name: str, value: object) -> int:
    """An upper bound as an int: at least 0, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected an int of at least 0, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A number or a name as it is, and of anything else, which may be a whole tensor, the type."""
    return repr(value) if value is None or isinstance(value, str | numbers.Number) else f"a {type(value).__name__}"
