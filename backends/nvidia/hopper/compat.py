"""Names that moved between the Triton releases this backend serves."""

from __future__ import annotations

import triton
from triton.language import core

aggregate = getattr(triton, "aggregate", None) or core._aggregate
