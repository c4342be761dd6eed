"""Estimate: a model of a decode's time from its split plan, its tile, and what its kernel was compiled to.

Never a measurement. A decode takes a launch, and the longest of what its bytes take from memory, what the longest part
of the plan takes from matrix units and shared memory, and what one SM or CU needs to fetch that part. The portable
kernel does products, softmax and shared memory one after another, Hopper's Gluon kernel at the same time: two constants
say how well, found on an H100 (tests/unit/test_estimate.py has the measurements). What a tile costs beside that is left
out: tiles of 16 keys take twice what is said here.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from portable_mla.cli.hardware import PARTS, Part
from portable_mla.cli.report import Section
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.select import load

if TYPE_CHECKING:  # need Triton, which a CPU may lack
    from portable_mla.backends.triton.config.decode import Tile
    from portable_mla.metadata.split_plan.plan import PlanShape

TABLE = "data/compiled.json"  # of ci/compile/budgets.json: python -m ci.compile.table
ESTIMATED = ("triton", "gluon")
IN_TURN = 1.15  # the portable kernel over its products and its shared memory, one after the other
AT_ONCE = 0.75  # of the matrix units' speed that the Gluon kernel reaches
INSTRUCTIONS = {"HMMA": 4096, "16x16x16_bf16": 8192, "16x16x32_bf16": 16384}  # operations of each
MATRIX_UNITS = 4  # of one SM or CU: each warp issues to one of them
FETCH = 30  # bytes a cycle that one SM or CU gets from memory
GLUON_ROWS, GLUON_KEYS, GLUON_WARPS = 64, 64, 12


@dataclass(frozen=True)
class Compiled:
    """What one kernel of the compile gate uses: of a thread, of a workgroup, and matrix instructions by kind."""

    registers: int
    loop_spills: int
    shared: int
    matrix: Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Of one program and one tile: cycles of matrix units and of shared memory; of the kernel: warps of so many
    threads, what it was compiled to, whether the two run at once, and whether partial results are of 16 bits."""

    matrix: float
    shared: float
    warps: int
    wave: int
    compiled: Compiled
    at_once: bool
    narrow: bool = False

    def cycles(self, together: int = 1) -> float:
        """Of a tile, where so many programs share an SM or CU: fewer warps than it has matrix units leave some idle."""
        if self.at_once:
            return max(self.matrix / AT_ONCE, self.shared)
        idle = max(MATRIX_UNITS / (together * self.warps), 1)
        return (self.matrix * idle + self.shared) * IN_TURN


@dataclass(frozen=True)
class Estimate:
    """Seconds by what they are spent on, and what they were found from."""

    part: Part
    kernel: str
    seconds: Mapping[str, float]  # that overlap: the longest one counts
    facts: Mapping[str, str]

    @property
    def bound(self) -> str:
        """What the decode waits for most."""
        longest = max(self.seconds, key=lambda name: self.seconds[name])
        return "launches" if self.seconds[longest] < self.part.launch else longest

    @property
    def total(self) -> float:
        """Seconds of a call."""
        return self.part.launch + max(self.seconds.values())


def estimate(request: Request, backend: str) -> Estimate:
    """Of a decode of max_batch requests of max_context tokens each, with a backend that serves it.

    Raises ValueError where there are no figures: of another architecture, backend, phase or cache.
    """
    arch = request.arch
    known = arch.name in PARTS and backend in ESTIMATED and request.phase is Phase.decode
    if not known or request.shape.cache_format.quantised:
        raise ValueError(
            f"estimate: expected a decode of a bf16 or fp16 cache with one of {', '.join(ESTIMATED)} on one of "
            f"{', '.join(PARTS)}, got {backend} on {arch.name}"
        )
    served: Any = load(backend, arch.vendor)
    shape = served.needs(request).split_plan
    assert shape is not None, "both backends read a split plan"
    part = PARTS[arch.name]
    if backend == "gluon":
        return _estimate(request, part, shape, GLUON_ROWS, gluon_work(request, part), "gluon")
    tile = served.tile(request)
    kernel = kernel_name(request, tile)
    work = portable_work(request, part, tile, compiled_kernel(arch.name, kernel))
    return _estimate(request, part, shape, tile.block_h, work, kernel)


def _estimate(request: Request, part: Part, shape: PlanShape, block_h: int, work: Work, kernel: str) -> Estimate:
    from portable_mla.metadata.split_plan.reference import plan_splits_reference

    capacity, mla = request.capacity, request.shape
    lens = [capacity.max_context] * capacity.max_batch, [request.max_query_len] * capacity.max_batch
    plan = plan_splits_reference(*lens, shape, max_query_len=request.max_query_len)
    parts = itertools.pairwise(plan.part_indptr)
    runs = [sum(high - low for _, low, high, *_ in plan.items[first:last]) for first, last in parts]
    rows = mla.heads * shape.block_q
    programs = plan.programs or -(-rows // block_h)  # of a part
    program_rows = block_h * shape.row_tiles // programs if plan.programs else block_h
    used = [tiles for tiles in runs if tiles] or [0]
    together = -(-len(used) * programs // request.arch.units)  # programs that one SM or CU has to run
    width = mla.row_width * mla.q_dtype.itemsize
    keys = sum(used) * shape.block_n * width
    pieces = plan.summary[3]
    results = capacity.max_batch * request.max_query_len * mla.heads * (width + mla.latent_dim * mla.q_dtype.itemsize)
    partials = 2 * (2 if work.narrow else 4) * pieces * rows * mla.latent_dim
    longest, per_second = max(used) * together, part.clock
    seconds = {
        "memory": (keys + results + partials) / part.bandwidth,
        "memory of one unit": max(used) * shape.block_n * width / (FETCH * per_second),
    }
    if work.at_once:
        seconds |= {"matrix units": longest * work.matrix / AT_ONCE / per_second}
        seconds |= {"shared memory": longest * work.shared / per_second}
    else:
        name = "matrix units, then shared memory" if work.matrix > work.shared else "shared memory, then matrix units"
        seconds |= {name: longest * work.cycles(together) / per_second}
    resident = _resident(request, part, work)
    facts = {
        "parts, items, partial results": f"{len(used)}, {len(plan.items)}, {pieces}",
        "programs": f"{len(used) * programs} of {program_rows} rows, {programs} a part",
        "programs that fit one unit": f"{resident} ({work.compiled.registers} registers, {work.compiled.shared} B)",
        "waves": str(max(-(-together // resident), 1)),
        "cycles of a tile": f"{work.matrix:.0f} matrix units, {work.shared:.0f} shared memory",
        "memory traffic": f"{(keys + results + partials) / 1e6:.1f} MB, {keys / 1e6:.1f} of it keys",
        "spills in the loop": str(work.compiled.loop_spills),
    }
    return Estimate(part, kernel, seconds, facts)


def _resident(request: Request, part: Part, work: Work) -> int:
    registers = part.registers // (work.warps * work.wave * work.compiled.registers)
    return max(min(registers, request.arch.shared_memory // max(work.compiled.shared, 1)), 1)


def portable_work(request: Request, part: Part, tile: Tile, compiled: Compiled) -> Work:
    """Of the portable kernel. Warps share the rows of a tile in groups of 16 and then its columns: a row group reads
    the values once, and the keys once a time that they are scored; queries are read by each warp, but for AMD's, which
    keeps them in registers. wgmma has row groups of four warps, each of which scores all keys of 64 rows."""
    shape, size = request.shape, request.shape.q_dtype.itemsize
    key, value = tile.block_n * shape.row_width * size, tile.block_n * shape.latent_dim * size
    query = tile.block_h * shape.row_width * size
    kind = next(iter(compiled.matrix))
    if kind == "HGMMA":
        scored = groups = max(tile.num_warps // 4 * 64 // tile.block_h, 1)
        traffic = key + groups * (key + query) + value
    else:
        groups = min(tile.block_h // 16, tile.num_warps)
        columns = tile.num_warps // groups
        scored = times_scored(request, tile, compiled)
        traffic = key + groups * (scored * key + value) + (0 if request.arch.vendor == "amd" else columns * query)
    operations = 2 * tile.block_h * tile.block_n * (scored * shape.row_width + shape.latent_dim)
    speed = part.matrix[kind.partition("_")[0]]
    return Work(
        operations / speed, traffic / part.shared, tile.num_warps, request.arch.wave, compiled, at_once=False
    )  # fmt: skip


def times_scored(request: Request, tile: Tile, compiled: Compiled) -> int:
    """How many warps score the same key, of those that share rows: what explains the number of matrix instructions, in
    a loop that is there once or, pipelined, up to four times."""
    latent, row_width = request.shape.latent_dim, request.shape.latent_dim + widest_rope(request.shape.latent_dim)
    issued = tile.num_warps * sum(INSTRUCTIONS[kind] * count for kind, count in compiled.matrix.items())
    columns = tile.num_warps // min(tile.block_h // 16, tile.num_warps)
    for copies, scored in itertools.product((1, 2, 3, 4), (1, 2, 4, 8)):
        operations = 2 * tile.block_h * tile.block_n * (scored * row_width + latent)
        if scored <= columns and copies * operations == issued:
            return scored
    raise AssertionError(f"{compiled.matrix} is no number of products of {tile.name} on {request.arch.name}")


def gluon_work(request: Request, part: Part) -> Work:
    """Of Hopper's Gluon kernel and one block of keys; its two warpgroups share two of them at once."""
    from portable_mla.backends.nvidia.hopper.decode.runner import has_narrow_partials

    shape = request.shape
    operations = 2 * GLUON_ROWS * GLUON_KEYS * (shape.row_width + shape.latent_dim)
    traffic = (GLUON_KEYS * (2 * shape.row_width + shape.latent_dim) + GLUON_ROWS * shape.row_width) * 2
    compiled = compiled_kernel(request.arch.name, f"gluon 512+{shape.rope_dim}")
    return Work(
        operations / part.matrix["HGMMA"], traffic / part.shared, GLUON_WARPS, request.arch.wave, compiled,
        at_once=True, narrow=has_narrow_partials(request),
    )  # fmt: skip


def kernel_name(request: Request, tile: Tile) -> str:
    """The portable kernel's name in the table, in the widest geometry of its latent."""
    shape = request.shape
    loads = "gather" if shape.page_size % tile.block_n else tile.loads
    return f"decode {shape.latent_dim}+{widest_rope(shape.latent_dim)} {tile.name} {loads}"


def widest_rope(latent_dim: int) -> int:
    """Of the geometries with this latent: the one that the compile gate covers most of."""
    from portable_mla.backends.triton.backend import GEOMETRIES

    return max(rope for latent, rope in GEOMETRIES if latent == latent_dim)


def compiled_kernel(arch: str, name: str) -> Compiled:
    """The table's row. Raises ValueError where the compile gate has none."""
    rows = _table()[arch]
    if name not in rows:
        raise ValueError(f"estimate: {name!r} was not compiled for {arch}; expected one of {', '.join(rows)}")
    return Compiled(**rows[name])


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(files("portable_mla.cli").joinpath(TABLE).read_text())
    return table


def as_section(found: Estimate) -> Section:
    """The estimate, and what it is."""
    origin = "figures measured" if found.part.measured else "peaks of its data sheet, never run here"
    rows = {
        "model, not a measurement": f"about {found.total * 1e6:.0f} us on {found.part.name} ({origin})",
        "bound": found.bound,
        "launches": f"{found.part.launch * 1e6:.1f} us",
        **{name: f"{seconds * 1e6:.1f} us" for name, seconds in found.seconds.items()},
        "kernel": found.kernel,
        **found.facts,
    }
    return Section("estimate of a decode", ("what", "value"), tuple(rows.items()))


def as_json(found: Estimate) -> dict[str, object]:
    """The same as plain values."""
    return {
        "measured": False,
        "part": found.part.name,
        "microseconds": found.total * 1e6,
        "bound": found.bound,
        "launch_microseconds": found.part.launch * 1e6,
        "overlapping_microseconds": {name: seconds * 1e6 for name, seconds in found.seconds.items()},
        "kernel": found.kernel,
        "facts": dict(found.facts),
    }
