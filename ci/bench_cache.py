"""fp8 caches beside a bfloat16 one in the same Triton kernel, and the cache write beside composed torch operations.

    python -m ci.bench_cache [--only tiles,decode,write] [--formats fp8_656 ...] [--tiles 16x64w8s3p1 ...] [--json FILE]

Microseconds a call in CUDA graphs, over caches larger than L2. "tiles" tries launch shapes of the fp8 formats, written
as block_h x block_n, warps, stages, programs a unit, and "-early" or "-pairs" for a conversion that is not late;
"decode" then takes the best beside the one of the tile rules. A result is held to that of the bfloat16 kernel over the
dequantised cache before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ci.compile.cache_variants import fp8_formats
from ci.contenders import DEVICE, LATENT, PAGE_SIZE, ROPE, SCALE, Calls, Problem, apart, graph_us, ruled_tile
from portable_mla import CacheFormat, arch_of, rope_table, write_latent
from portable_mla.backends.triton.config.decode import Conversion, Tile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.quantize import dequantise_rows, quantise_rows
from portable_mla.core.rope import rotate
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.metadata import DecodeBuffers, Needs, Status

SIZES = ((128, 16, 4096), (64, 16, 16384))  # batch, heads, context
GOALS = {"fp8_e4m3": 1.6, "fp8_e4m3fnuz": 1.6, "fp8_656": 1.4}
MOST_DIFFERENT = 6e-3  # relative, of two bfloat16 results
KV_SCALE = 2.0**-6  # a power of two: dequantised values are exact in bfloat16
TOKENS = (1, 32, 128, 4096)
_TILE = re.compile(r"(\d+)x(\d+)w(\d+)s(\d+)p(\d+)(?:-(early|pairs))?")


def tile_named(name: str) -> Tile:
    """16x64w4s3p2-pairs: block_h, block_n, warps, stages, programs a unit, and the conversion."""
    found = _TILE.fullmatch(name)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a tile such as 16x64w4s3p2-pairs, got {name!r}")
    block_h, block_n, warps, stages, programs = map(int, found.groups()[:5])
    conversion = cast(Conversion, found[6] or "late")
    return Tile(block_h, block_n, warps, stages, programs_per_unit=programs, conversion=conversion)


def name_of(tile: Tile) -> str:
    """What `tile_named` reads."""
    name = f"{tile.block_h}x{tile.block_n}w{tile.num_warps}s{tile.num_stages}p{tile.programs_per_unit}"
    name += "" if tile.conversion == "late" else f"-{tile.conversion}"
    return name if tile.loads == "pointer" else f"{name} {tile.loads}"


def candidates() -> list[Tile]:
    """Launch shapes for 16 rows."""
    names = ["16x32w4s2p2", "16x32w4s3p2", "16x32w4s4p2", "16x64w4s2p2", "16x64w4s3p2", "16x64w4s3p1", "16x64w4s4p1"]
    names += ["16x32w8s3p1", "16x64w8s2p1", "16x64w8s3p1", "16x64w8s4p1", "16x128w8s2p1", "16x128w8s3p1", "32x64w8s2p1"]
    return [tile_named(name) for name in (*(f"{name}-pairs" for name in names), "16x64w4s4p2", "16x32w4s2p2")]


def request_of(problem: Problem, cache_format: CacheFormat) -> Request:
    """What dispatch would be asked."""
    request = problem.request()
    return replace(request, shape=replace(request.shape, cache_format=cache_format))


def scale_of(cache_format: CacheFormat) -> Tensor | None:
    """The scale of a per-tensor format."""
    return torch.full((1,), KV_SCALE, device=DEVICE) if cache_format.needs_scale else None


def stored(cache: Tensor, cache_format: CacheFormat) -> Tensor:
    """The bfloat16 cache in another format."""
    if not cache_format.quantised:
        return cache
    scale, width = scale_of(cache_format), cache_format.row_width(LATENT, ROPE)
    found = torch.empty(*cache.shape[:2], width, dtype=torch.uint8, device=cache.device)
    for part, rows in zip(found.split(1024), cache.split(1024), strict=True):
        part.copy_(quantise_rows(rows.float(), cache_format, scale).view(torch.uint8))
    return found.view(cache_format.dtype)


def dequantised(cache: Tensor, cache_format: CacheFormat) -> Tensor:
    """The values that a format kept, in bfloat16."""
    scale = scale_of(cache_format)
    return torch.cat([dequantise_rows(part, cache_format, scale, torch.bfloat16) for part in cache.split(1024)])


def decode(problem: Problem, cache_format: CacheFormat, tile: Tile | None, caches: Sequence[Tensor]) -> Calls:
    """The Triton kernel with a tile, or with that of the rules."""
    request = request_of(problem, cache_format)
    runner = TritonRunner(request, tile or ruled_tile(request))
    status = Status.allocate(torch.device(DEVICE))
    buffers = DecodeBuffers(request.capacity, PAGE_SIZE, Needs(split_plan=runner.plan_shape), status)
    runner.plan(buffers.update(problem.batch, caches[0].shape[0]))
    out, lse = problem.outputs()
    scale = scale_of(cache_format)

    def call(cache: Tensor) -> Tensor:
        runner.run(DecodeInputs(problem.q, cache), out, lse, softmax_scale=SCALE, kv_scale=scale)
        return out

    return [lambda c=c: call(c) for c in caches]


def compile_tile(job: tuple[str, str]) -> str:
    """Launch one tile over a small cache, so that its kernel is in Triton's cache; what went wrong, if anything."""
    cache_format, tile = CacheFormat[job[0]], tile_named(job[1])
    problem = Problem.of([PAGE_SIZE] * 2, SIZES[0][1], caches=1)
    try:
        decode(problem, cache_format, tile, [stored(problem.caches[0], cache_format)])[0]()
        torch.cuda.synchronize()
    except (TritonError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


def compile_tiles(tiles: Sequence[Tile], wanted: Sequence[CacheFormat], workers: int) -> list[tuple[str, Tile]]:
    """Format and tile of those that compile; compiled in processes, since each takes seconds."""
    jobs = [
        (one.name, name_of(tile)) for one in wanted for tile in tiles if one.needs_scale or tile.conversion != "early"
    ]  # fmt: skip
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        faults = list(pool.map(compile_tile, jobs))
    for job, fault in zip(jobs, faults, strict=True):
        if fault:
            print(f"  {' '.join(job)}: {fault}", flush=True)
    return [(one, tile_named(name)) for (one, name), fault in zip(jobs, faults, strict=True) if not fault]


def held_us(calls: Calls, expected: Tensor, plain_us: float) -> float | None:
    """Microseconds of a call whose result is near the expected one; None where it is not, which is said."""
    difference = float((calls[0]().float() - expected).norm() / expected.norm())
    if not difference <= MOST_DIFFERENT:
        print(f"WRONG: the next result differs from the dequantised cache's by {difference:.1e}", flush=True)
        return None
    return round(graph_us(apart(calls)) - plain_us, 1)


def decode_rows(tiles: Sequence[tuple[str, Tile]], wanted: Sequence[CacheFormat], plain_us: float) -> Iterator[Any]:
    """Of each size and format: the tile of the rules, then the given ones, over the bfloat16 kernel's time."""
    for batch, heads, context in SIZES:
        problem = Problem.of([context] * batch, heads, caches=1)
        base = graph_us(apart(decode(problem, CacheFormat.bf16, None, problem.caches))) - plain_us
        shape = {"batch": batch, "heads": heads, "context": context, "bf16 us": round(base, 1)}
        for one in wanted:
            cache = stored(problem.caches[0], one)
            expected = decode(problem, CacheFormat.bf16, None, [dequantised(cache, one)])[0]().float()
            ruled = ruled_tile(request_of(problem, one))
            for tile in (ruled, *(tile for name, tile in tiles if name == one.name)):
                us = held_us(decode(problem, one, tile, [cache]), expected, plain_us)
                row = shape | {"format": one.name, "tile": name_of(tile), "ruled": tile is ruled, "us": us}
                yield row | {"times as fast": round(base / us, 3) if us else 0.0, "goal": GOALS[one.name]}
            del cache, expected
            torch.cuda.empty_cache()


def best_tiles(rows: Sequence[dict[str, Any]], count: int = 3) -> list[tuple[str, Tile]]:
    """Of each format, the tiles with the best geometric mean over the sizes."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if not row["ruled"]:
            key = row["format"], row["tile"]
            found[key] = found.get(key, 1.0) * row["times as fast"]
    best: list[tuple[str, Tile]] = []
    for name in sorted({name for name, _ in found}):
        tiles = sorted((key for key in found if key[0] == name), key=found.__getitem__, reverse=True)
        best += [(name, tile_named(tile)) for _, tile in tiles[:count]]
    return best


def composed(tensors: dict[str, Tensor], cache: Tensor, cache_format: CacheFormat) -> Callable[[], Tensor]:
    """The write in operations of torch."""
    scale, table, weight = scale_of(cache_format), tensors["table"], tensors["weight"]
    rows_of = cache.view(-1, cache.shape[2])
    rows_of = rows_of.view(torch.uint8) if cache_format.quantised else rows_of

    def call() -> Tensor:
        latent = torch.nn.functional.rms_norm(tensors["c_kv"], (LATENT,), weight, 1e-6)
        cos_sin = table[tensors["positions"]]
        k_pe = rotate(tensors["k_pe"].float(), cos_sin, "interleaved")
        q_pe = tensors["q"][..., LATENT:]
        q_pe.copy_(rotate(q_pe.float(), cos_sin[:, None], "interleaved"))
        rows = quantise_rows(torch.cat([latent.float(), k_pe], 1), cache_format, scale)
        rows_of[tensors["slots"]] = rows.view(torch.uint8) if cache_format.quantised else rows
        return rows

    return call


def write_rows(wanted: Sequence[CacheFormat], plain_us: float) -> Iterator[dict[str, Any]]:
    """write_latent with the rotation of q in place, and the composed operations."""
    for one, tokens, heads in itertools.product((CacheFormat.bf16, *wanted), TOKENS, (16, 128)):
        pages = max(tokens // PAGE_SIZE * 2, 8)
        row_bytes = one.row_width(LATENT, ROPE) * one.dtype.itemsize
        cache = torch.zeros(pages, PAGE_SIZE, row_bytes, dtype=torch.uint8, device=DEVICE).view(one.dtype)
        half = {"dtype": torch.bfloat16, "device": DEVICE}
        tensors = {
            "c_kv": torch.randn(tokens, LATENT, **half),
            "k_pe": torch.randn(tokens, ROPE, **half),
            "q": torch.randn(tokens, heads, LATENT + ROPE, **half),
            "weight": torch.ones(LATENT, **half),
            "table": rope_table(8192, ROPE, device=DEVICE),
            "positions": torch.arange(tokens, device=DEVICE),
            "slots": torch.randperm(pages * PAGE_SIZE, device=DEVICE)[:tokens],
        }
        ours = fused(tensors, cache, one)
        us, torch_us = (graph_us(apart([call]), least=20) - plain_us for call in (ours, composed(tensors, cache, one)))
        yield {
            "format": one.name, "tokens": tokens, "heads": heads, "write_latent us": round(us, 2),
            "composed us": round(torch_us, 2), "times as fast": round(torch_us / us, 2),
        }  # fmt: skip


def fused(tensors: dict[str, Tensor], cache: Tensor, cache_format: CacheFormat) -> Callable[[], Any]:
    """The write in one launch."""
    scale = scale_of(cache_format)
    return lambda: write_latent(
        cache, tensors["slots"], tensors["c_kv"], tensors["k_pe"], norm_weight=tensors["weight"], eps=1e-6,
        positions=tensors["positions"], cos_sin=tensors["table"], kv_scale=scale, q_pe=tensors["q"][..., LATENT:],
    )  # fmt: skip


def printed(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each shown as it is measured."""
    found = []
    for row in rows:
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    """Print each row as it is measured, and write all of them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="decode,write")
    parser.add_argument("--formats", nargs="*", choices=list(GOALS))
    parser.add_argument("--tiles", nargs="*", type=tile_named, default=[], metavar="TILE")
    parser.add_argument("--jobs", type=int, default=max(len(os.sched_getaffinity(0)) - 2, 1))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = [one for one in fp8_formats(arch_of(DEVICE).name) if not options.formats or one.name in options.formats]
    one = torch.zeros(1, device=DEVICE)
    plain_us = graph_us([lambda: one.add_(1)], least=50)
    measured: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    measured |= {"triton": triton.__version__, "plain kernel us": round(plain_us, 2)}
    print(measured, flush=True)
    tiles = [(one.name, tile) for one in wanted for tile in options.tiles]
    for name in options.only.split(","):
        if name == "tiles":
            tried = compile_tiles(options.tiles or candidates(), wanted, options.jobs)
            measured[name] = printed(decode_rows(tried, wanted, plain_us))
            tiles = best_tiles(measured[name])
        else:
            rows = decode_rows(tiles, wanted, plain_us) if name == "decode" else write_rows(wanted, plain_us)
            measured[name] = printed(rows)
        if options.json:
            options.json.write_text(json.dumps(measured, indent=1))
    if any(row.get("us", 0) is None for rows in measured.values() if isinstance(rows, list) for row in rows):
        raise SystemExit("some results are wrong")


if __name__ == "__main__":
    main()
