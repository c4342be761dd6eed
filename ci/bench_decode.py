"""Decode beside the vendors' libraries that are installed, on one GPU: microseconds a call, ratios, geometric mean.

    python -m ci.bench_decode [--trace FILE.csv ...] [--only table,trace] [--json FILE]

CUDA graphs in one process over 3 GB of caches, planning excluded; "planned" ones plan a step before every call. A
plain kernel stands between calls, so that none overlaps the end of the one before; its own time is taken off.
FlashInfer plans on the host, which no graph captures: planned, it is timed by the host's clock, and no ratio is to it.
A row's floor is the longer of its bytes at the DRAM's clock and its operations at the rate of a large product.
Every result is held to the first contender's before it is timed. A peer that is not installed or refuses a row has no
time there; where this library's own kernels fail, so does the benchmark.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from ci.bench_metadata import steps
from ci.card import Card
from ci.contenders import (
    DEVICE,
    Calls,
    Problem,
    apart,
    graph_us,
    host_us,
    ours,
    with_tiles_of,
)
from ci.peers import flash_attn3, flash_mla, flashinfer, vllm, vllm_flash_mla
from portable_mla.cli.trace import SHIPPED_TRACE, read_trace

OURS: dict[str, Callable[[Problem], Calls]] = {
    "ours": ours,
    "triton": lambda problem: ours(problem, "triton"),
    **{f"through {name}": functools.partial(ours, backend=name) for name in ("flashmla", "flash_attn3", "flashinfer")},
}
OWN = ("ours", "triton", "planned ours")  # serve every row
PEERS: dict[str, Callable[[Problem], Calls]] = {
    "flash_mla": flash_mla, "vllm flash_mla": vllm_flash_mla, "flash_attn3": flash_attn3, "flashinfer": flashinfer,
    "vllm triton": vllm,
    "aiter": lambda problem: ours(problem, "aiter"),  # through the adapter: padded heads and copies are its time too
}  # fmt: skip
PLANNED: dict[str, Callable[[Problem], Calls]] = {
    "planned ours": functools.partial(ours, planned=True),
    "planned flash_mla": functools.partial(flash_mla, planned=True),
    "planned vllm flash_mla": functools.partial(vllm_flash_mla, planned=True),
    "planned flash_attn3": functools.partial(flash_attn3, planned=True),
    "planned flashinfer": functools.partial(flashinfer, planned=True),
}
ON_THE_HOST = "planned flashinfer"  # no graph can capture it: timed without one
FORCED: dict[str, Callable[[Problem], Calls]] = {
    f"{name} tiles": functools.partial(with_tiles_of, name) for name in ("sm80", "sm89", "sm120")
}  # asked for by name
SIZES = ((1, 1024), (1, 8192), (1, 81920), (8, 8192), (32, 4096), (128, 4096), (64, 16384))
ROWS = [(batch, heads, context, 1) for heads in (128, 64, 16) for batch, context in SIZES]
ROWS += [(128, 128, 4096, 2), (32, 16, 4096, 2)]
MOST_DIFFERENT = 6e-3  # relative, of two bfloat16 results over random values


def this_card() -> Card:
    """Measured."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    one = torch.zeros(1, device=DEVICE)
    plain_us = graph_us([lambda: one.add_(1)], least=50)
    copy_us, matmul_us = graph_us([lambda: target.copy_(source)]), graph_us([lambda: square @ square])
    copy, matmul = 2 * source.nbytes / copy_us / 1e6, 2 * 8192**3 / matmul_us / 1e6
    return Card(triton.testing.get_dram_gbps() / 1e3, copy, matmul, plain_us)


def measure(problem: Problem, names: Sequence[str], card: Card) -> dict[str, float]:
    """The floor, and microseconds a call of each contender that is installed and serves the problem."""
    floor_us = card.floor_us(problem.request().shape, problem.kv_lens, problem.batch.max_query_len)
    found = {"floor": round(floor_us, 1)}
    expected = None
    for name in names:
        try:
            calls = (OURS | PEERS | PLANNED | FORCED)[name](problem)
            result = calls[0]().reshape(problem.q.shape[0], -1).float()
            us = host_us(calls) if name == ON_THE_HOST else graph_us(apart(calls)) - card.plain_us
        except (ImportError, RuntimeError, AssertionError) as error:
            if name in OWN:
                raise SystemExit(f"{name} fails: {type(error).__name__}: {error}") from error
            print(f"  {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        expected = result if expected is None else expected
        difference = float((result - expected).norm() / expected.norm())
        if not difference <= MOST_DIFFERENT:
            raise SystemExit(f"{name} differs from {names[0]} by {difference:.1e}")
        found[name] = round(us, 1)
    return found


def with_ratio(row: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    """The row with its times, the fastest peer, ours over that, and over the fastest of our backends."""
    row |= found
    for kind, prefix in ((PEERS, ""), (PLANNED, "planned ")):
        peers = {name: us for name, us in found.items() if name in kind and name not in ("planned ours", ON_THE_HOST)}
        if peers and f"{prefix}ours" in found:
            best = min(peers, key=peers.__getitem__)
            row |= {f"{prefix}best peer": best, f"{prefix}ratio": round(found[f"{prefix}ours"] / peers[best], 3)}
    backends = {name: us for name, us in found.items() if name in OURS}
    if "ours" in backends:
        best = min(backends, key=backends.__getitem__)
        row |= {"best backend": best, "of best backend": round(found["ours"] / backends[best], 3)}
    print(row, flush=True)
    torch.cuda.empty_cache()
    return row


def table_rows(names: Sequence[str], card: Card) -> list[dict[str, Any]]:
    """Equal contexts."""
    rows = []
    for batch, heads, context, query_len in ROWS:
        problem = Problem.of([context] * batch, heads, query_len=query_len)
        row = {"batch": batch, "heads": heads, "context": context, "query_len": query_len}
        rows.append(with_ratio(row, measure(problem, names, card)))
    return rows


def trace_rows(paths: Sequence[Path], names: Sequence[str], card: Card) -> list[dict[str, Any]]:
    """Mean over decode steps of continuous-batching replays."""
    rows = []
    for path in paths:
        requests = read_trace(path)
        for concurrency in (32, 128, 256):
            for heads in (16, 128):
                sums: dict[str, list[float]] = {}
                for kv_lens in steps(requests, concurrency, 4):
                    for name, us in measure(Problem.of(kv_lens, heads), names, card).items():
                        sums.setdefault(name, []).append(us)
                row = {"trace": path.stem, "requests": concurrency, "heads": heads}
                rows.append(with_ratio(row, {name: round(statistics.mean(times), 1) for name, times in sums.items()}))
    return rows


def main() -> None:
    """Print each row as it is measured, and write all of them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, nargs="*", default=[SHIPPED_TRACE])
    parser.add_argument("--only", default="table,trace")
    parser.add_argument(
        "--contenders", nargs="*", default=[*OURS, *PEERS, *PLANNED], choices=[*OURS, *PEERS, *PLANNED, *FORCED]
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    card = this_card()
    measured: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    measured |= {
        "triton": triton.__version__, "plain kernel us": round(card.plain_us, 2), "DRAM TB/s": round(card.dram, 2),
        "copy TB/s": round(card.copy, 2), "matmul TFLOP/s": round(card.matmul),
    }  # fmt: skip
    print(measured, flush=True)
    for name in options.only.split(","):
        if name == "table":
            measured[name] = table_rows(options.contenders, card)
        else:
            measured[name] = trace_rows(options.trace, options.contenders, card)
        for key in ("ratio", "planned ratio"):
            ratios = [row[key] for row in measured[name] if key in row]
            if ratios:
                mean, high = round(statistics.geometric_mean(ratios), 3), sum(ratio > 1.03 for ratio in ratios)
                print(f"{name}, {key}: geometric mean {mean} over {len(ratios)} rows, {high} above 1.03")
                measured[f"{name} geometric mean of {key}"] = mean
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
