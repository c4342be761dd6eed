"""Part: the figures of one GPU that a time is estimated with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

FIGURES = "data/parts.json"


@dataclass(frozen=True)
class Part:
    """bandwidth: bytes/s of a copy; matrix: bf16 operations a cycle of one SM or CU, by instruction; shared: bytes a
    cycle from its shared memory; registers: 32-bit ones, all lanes; launch: seconds of a decode and its combine in a
    graph, with nothing to do; measured: whether they are measurements of ours."""

    name: str
    clock: float
    bandwidth: float
    matrix: dict[str, int]
    shared: int
    registers: int
    launch: float
    measured: bool


# The H100 has 3.0 TB/s of 3.35 and 798 TFLOP/s of 989 by measurement. The others have the peaks of their data sheets
# with the same shares of them, 90 % and 81 %, and its launches. HMMA runs at half of wgmma's rate on an H100.
PARTS = {
    arch: Part(**figures)
    for arch, figures in json.loads(files("portable_mla.cli").joinpath(FIGURES).read_text()).items()
}
