"""What the environment asks of a test run: PORTABLE_MLA_TEST_ variables, as strict as the library's own."""

from __future__ import annotations

import os

from portable_mla.core.arch import ARCHS
from portable_mla.settings import TEST_PREFIX, Variable

REQUIRE = Variable("require", tuple(ARCHS), "unset", "stop unless this architecture is present")
TILES = Variable(
    "tiles",
    tuple(name for name, arch in ARCHS.items() if arch.vendor == "nvidia"),
    "unset",
    "only the portable kernels, with this architecture's tiles on another NVIDIA GPU",
)
HYPOTHESIS = Variable("hypothesis", ("dev", "ci", "nightly"), "dev, or ci where CI is set", "property-test profile")
TEST_VARIABLES = {f"{TEST_PREFIX}{one.field.upper()}": one for one in (REQUIRE, TILES, HYPOTHESIS)}


def asked(variable: Variable) -> str | None:
    """What the environment says of a variable; None where it is not set.

    Raises ValueError for an unknown PORTABLE_MLA_TEST_ variable or a value that is not allowed.
    """
    for name in os.environ:
        if name.startswith(TEST_PREFIX) and name not in TEST_VARIABLES:
            raise ValueError(f"{name}: unknown variable; allowed: {', '.join(TEST_VARIABLES)}")
    name = f"{TEST_PREFIX}{variable.field.upper()}"
    text = os.environ.get(name)
    return None if text is None else str(variable.read(name, text))
