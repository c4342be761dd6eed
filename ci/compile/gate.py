"""Compile every tile rule of every architecture, without a GPU, and hold the resources to a recorded budget.

python -m ci.compile.gate [--arch sm90 gfx942] [--only fp16] [--jobs 2] [--record]

Exits with 1 when a kernel needs more shared memory than the architecture has, lacks matrix instructions, has no budget
for this Triton version or exceeds it. --record writes the budgets of this version, for the architectures compiled.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton

from ci.compile.cache_variants import fp8_requests, write_variants
from ci.compile.cross_compile import Resources, compile_combine, compile_decode, compile_gluon
from ci.compile.prefill_variants import gluon_prefill_variants, prefill_variants
from ci.compile.steps import compile_finish, compile_plan, compile_ragged, compile_step
from portable_mla.backends.nvidia.hopper.backend import BACKEND as GLUON
from portable_mla.backends.triton.backend import GEOMETRIES
from portable_mla.backends.triton.config import amd as amd_tiles
from portable_mla.backends.triton.config import nvidia as nvidia_tiles
from portable_mla.backends.triton.config.combine import combine_tiles
from portable_mla.backends.triton.config.decode import DecodeRules, Rule, Tile, TileRequest
from portable_mla.core.arch import ARCHS
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request

BUDGETS = Path(__file__).with_name("budgets.json")
RULES: dict[str, DecodeRules] = {**nvidia_tiles.RULES, **amd_tiles.RULES}
ROWS = (5, 16, 32, 64, 128)
PAGE_SIZES = (64, 1)  # a tile's pages in one piece where its load allows that, and gathered
SLACK_REGISTERS = 16  # growth over the budget that a patch release of the compiler may cause

Job = Callable[[], Resources]
DecodeRule = Rule[TileRequest, Tile]
Used = dict[str, Resources]  # by variant
COMBINES = tuple(combine_tiles(latent_dim=512, wave=32))


def rule_of(arch: str, request: TileRequest) -> DecodeRule:
    """The rule that `choose_tile` follows."""
    return next(rule for rule in RULES[arch] if rule.when(request))


def shares_a_table(arch: str) -> bool:
    """Whether an earlier architecture has the same rules, so that one variant a rule is enough."""
    earlier = list(RULES)[: list(RULES).index(arch)]
    return any(RULES[other] is RULES[arch] for other in earlier)


def decode_request(arch: str, tile: TileRequest, dtype: torch.dtype = torch.bfloat16) -> Request:
    """A request of one query token for each of `rows` heads."""
    cache_format = tile.cache_format if dtype == torch.bfloat16 else CacheFormat.fp16
    shape = MLAShape(tile.rows, tile.latent_dim, tile.rope_dim, tile.page_size, dtype, cache_format)
    capacity = Capacity(
        max_batch=64, max_query_tokens=64, max_query_len=1, max_context=4096, max_pages=1 << 16, cache_bytes=1 << 30
    )
    return Request(ARCHS[arch], shape, Phase.decode, 1, True, False, capacity)


def decode_job(arch: str, request: TileRequest, kind: str = "", *, query_len: int = 1) -> tuple[str, Job]:
    """kind: "fp16", "unaligned" (the way out of a descriptor rule), or how the rule loads. query_len: query tokens that
    the rows of the request are of; of several, the earlier may not see the last keys."""
    tile = rule_of(arch, request).tile
    if request.cache_format.quantised:
        kind = request.cache_format.name
    kind = kind or ("gather" if request.page_size % tile.block_n else tile.loads)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    name = f"decode {request.latent_dim}+{request.rope_dim} {tile.name} {kind}"
    aligned = kind != "unaligned"
    full = decode_request(arch, replace(request, rows=request.rows // query_len), dtype)
    if query_len > 1:
        name, full = f"{name} x{query_len}", replace(full, max_query_len=query_len)
    return name, functools.partial(compile_decode, full, tile, aligned=aligned)


# heads, query_len, page_size, rope_dim, dtype: each tile of sm90_tile, each kind of page, both geometries and dtypes
GLUON_CASES = (
    (16, 1, 64, 64, torch.bfloat16),
    (128, 1, 64, 64, torch.bfloat16),
    (128, 2, 64, 64, torch.bfloat16),
    (16, 8, 16, 64, torch.bfloat16),
    (64, 1, 32, 0, torch.float16),
    (128, 1, 128, 64, torch.float16),
)


def gluon_requests(arch: str) -> dict[str, Request]:
    """What is compiled of the kernel that is written in Gluon, where the architecture has it."""
    requests = {}
    for heads, query_len, page_size, rope_dim, dtype in GLUON_CASES:
        request = decode_request(arch, TileRequest(heads, 512, rope_dim, page_size), dtype)
        request = replace(request, max_query_len=query_len)
        if not GLUON.reasons_unsupported(request):
            name = f"gluon 512+{rope_dim} {heads}x{query_len} page {page_size} {str(dtype).removeprefix('torch.')}"
            requests[name] = request
    return requests


def _gluon_resources(request: Request) -> Resources:
    return Resources.of(compile_gluon(request))


def widest(latent_dim: int, rope_dim: int) -> bool:
    """Whether no geometry of this latent has a wider rope."""
    return rope_dim == max(rope for latent, rope in GEOMETRIES if latent == latent_dim)


def rule_requests(arch: str) -> list[TileRequest]:
    """The first request of each rule, in its widest geometry; of each rule and page size in the first of its table."""
    found: dict[tuple[DecodeRule, int], TileRequest] = {}
    for latent_dim, rope_dim in (geometry for geometry in GEOMETRIES if widest(*geometry)):
        for page_size, rows in itertools.product(PAGE_SIZES, ROWS):
            request = TileRequest(rows, latent_dim, rope_dim, page_size)
            found.setdefault((rule_of(arch, request), 0 if shares_a_table(arch) else page_size), request)
    return list(found.values())


def variants(arch: str) -> dict[str, Job]:
    """What the gate compiles for one architecture, by name."""
    by_rule = rule_requests(arch)
    narrower = [geometry for geometry in GEOMETRIES if not widest(*geometry)]
    jobs = [decode_job(arch, request) for request in by_rule]
    jobs += [decode_job(arch, TileRequest(rows, *geometry, 64)) for geometry in narrower for rows in (16, 128)]
    descriptor = [request for request in by_rule if rule_of(arch, request).tile.loads == "descriptor"]
    jobs += [decode_job(arch, request, "unaligned") for request in descriptor]
    jobs += [decode_job(arch, request) for request in fp8_requests(arch)]
    widest_rows = [request for request in by_rule if request.latent_dim == GEOMETRIES[0][0]] + fp8_requests(arch)
    jobs += [decode_job(arch, replace(one, rows=max(one.rows, 16)), query_len=2) for one in widest_rows]
    most = TileRequest(128, *GEOMETRIES[0], 64)
    jobs.append(decode_job(arch, most, "fp16"))
    tile, request = rule_of(arch, most).tile, decode_request(arch, most)
    ragged = replace(request, max_query_len=8, uniform_queries=False)
    jobs += [
        *((f"combine {kind}", functools.partial(compile_combine, request, kind)) for kind in COMBINES),
        ("plan", functools.partial(compile_plan, ragged, tile)),
        ("plan fixed", functools.partial(compile_plan, replace(ragged, deterministic=True), tile)),
        ("ragged", functools.partial(compile_ragged, request)),
        ("vendor step", functools.partial(compile_step, request)),
        ("vendor rows", functools.partial(compile_finish, request, copied=False)),
        ("vendor rows copied", functools.partial(compile_finish, request, copied=True)),
    ]
    jobs += gluon_prefill_variants(arch).items()
    if gluon := gluon_requests(arch):
        jobs += [(name, functools.partial(_gluon_resources, request)) for name, request in gluon.items()]
        jobs += [
            (f"combine {kind} dependent", functools.partial(compile_combine, request, kind, dependent=True))
            for kind in COMBINES
        ]
        jobs.append(("plan heads", functools.partial(compile_plan, ragged, tile, row_tiles=2)))
    # rules that differ in their plans alone share a kernel, and its name
    return dict(jobs) | write_variants(arch) | prefill_variants(arch)


def compile_all(archs: Sequence[str], workers: int, only: str = "") -> dict[str, Used]:
    """Resources of the architectures' variants with `only` in their names; says what it does as it goes."""
    return {arch: _compile_arch(arch, workers, only) for arch in archs}


def _compile_arch(arch: str, workers: int, only: str) -> Used:
    """In processes of its own: after gfx942's fp8, Triton 3.6.0 compiles gfx950's otherwise than alone."""
    used: Used = {}
    with ProcessPoolExecutor(workers) as pool:
        pending = {pool.submit(job): name for name, job in variants(arch).items() if only in name}
        for done, future in enumerate(as_completed(pending), 1):
            found = used[pending[future]] = future.result()
            line = f"[{done}/{len(pending)}] {arch} {pending[future]}: {described(found)}"
            print(line, file=sys.stderr, flush=True)
    return used


def described(used: Resources) -> str:
    """One line."""
    spills = f", {used.spills} spilled ({used.loop_spills} times in the loop)" if used.spills else ""
    matrix = "".join(f", {count} {kind}" for kind, count in used.matrix.items())
    return f"{used.registers} registers{spills}, {used.shared / 1024:.0f} KB{matrix}"


def violations(arch: str, used: Used, budgets: Used) -> list[str]:
    """What is wrong with the variants of one architecture, a line each."""
    if not budgets:
        return [f"{arch}: no budgets for Triton {version()}; look at the figures, then record them with --record"]
    wrong = []
    for name, found in used.items():
        wrong += [f"{arch} {name}: {fault}" for fault in _faults(arch, name, found, budgets.get(name))]
    return wrong


def _faults(arch: str, name: str, found: Resources, budget: Resources | None) -> Iterator[str]:
    limit = ARCHS[arch].shared_memory
    if found.shared > limit:
        yield f"{found.shared} B of shared memory, {arch} has {limit}"
    if name.startswith(("decode", "gluon", "prefill")) and not found.matrix:
        yield "no matrix instruction"
    if budget is None:
        yield "no budget; look at its figures, then record them with --record"
        return
    if found.spills > budget.spills:
        yield f"spills {found.spills}, the budget is {budget.spills}"
    if found.loop_spills > budget.loop_spills:
        yield f"spills {found.loop_spills} times in the loop, the budget is {budget.loop_spills}"
    if found.registers > budget.registers + SLACK_REGISTERS:
        yield f"{found.registers} registers, the budget is {budget.registers} and {SLACK_REGISTERS} more"


def table(used: Mapping[str, Used]) -> str:
    """One row an architecture."""
    head = ("arch", "variants", "registers", "shared KB", "of", "spilling", "most", "in loop", "matrix instructions")
    rows: list[tuple[str, ...]] = [head]
    for arch, found in ((arch, found) for arch, found in used.items() if found):
        all_of = found.values()
        spilling = [one for one in all_of if one.spills]
        rows.append((
            arch, str(len(found)), str(max(one.registers for one in all_of)),
            f"{max(one.shared for one in all_of) / 1024:.0f}", f"{ARCHS[arch].shared_memory // 1024}",
            str(len(spilling)), str(max(one.spills for one in all_of)), str(sum(one.loop_spills > 0 for one in all_of)),
            ", ".join(sorted({kind for one in all_of for kind in one.matrix})),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return "\n".join("  ".join([*map(str.rjust, row, widths), row[-1]]) for row in rows)


def version() -> str:
    """Triton's minor version: budgets are recorded for each."""
    return ".".join(triton.__version__.split(".")[:2])


def read_budgets(path: Path = BUDGETS) -> dict[str, dict[str, Used]]:
    """Recorded resources by Triton version, architecture and variant."""
    recorded = json.loads(path.read_text()) if path.exists() else {}
    return {
        triton_version: {
            arch: {name: Resources(**values) for name, values in used.items()} for arch, used in by_arch.items()
        }
        for triton_version, by_arch in recorded.items()
    }


def record(used: Mapping[str, Used], path: Path = BUDGETS) -> None:
    """Write the budgets of this Triton version, a variant a line so that a change reads well in a diff."""
    budgets = read_budgets(path)
    budgets[version()] = budgets.get(version(), {}) | dict(used)
    versions = []
    for triton_version, by_arch in sorted(budgets.items()):
        archs = []
        for arch in (arch for arch in ARCHS if arch in by_arch):
            lines = [f"   {json.dumps(name)}: {json.dumps(asdict(one))}" for name, one in sorted(by_arch[arch].items())]
            archs.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(triton_version)}: {{\n" + ",\n".join(archs) + "\n }")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> int:
    """Compile, print the table, and name what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=list(RULES), default=list(RULES), metavar="ARCH")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, one a core if unsaid"
    )
    parser.add_argument("--record", action="store_true", help="write the budgets of this Triton version")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name has TEXT in it, such as fp16")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record needs all variants of an architecture: leave --only out")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and an interpreted process cannot compile: unset it")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="compile_gate_") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a kernel found in a cache would prove nothing
        used = compile_all(options.arch, options.jobs, options.only)
    if options.record:
        record(used)
    budgets = read_budgets().get(version(), {})
    wrong = [line for arch, found in used.items() for line in violations(arch, found, budgets.get(arch, {}))]
    print(table(used))
    count, seconds = sum(map(len, used.values())), time.perf_counter() - start
    print(f"{count} kernels on Triton {triton.__version__} in {seconds:.0f} s: {len(wrong)} faults")
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
