"""What planning costs and what it gains, on one GPU: plan times, serving traces, batch-1 scaling, memory.

    python -m ci.bench_metadata [--trace FILE.csv ...] [--json FILE] [--only plan,trace,scaling,memory]

Times are microseconds of CUDA graph replays over caches larger than L2. Each trace is replayed as continuous batching
and some of its decode steps are timed; "split rule" is this library's kernel with every request cut into
min(next_pow2(longest // 512), 2 * units) pieces, "vllm" is vLLM's Triton kernel with that rule, where it is importable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from ci.contenders import DEVICE, LATENT, PAGE_SIZE, ROPE, Calls, Problem, graph_us, ours, split_rule
from ci.peers import vllm
from portable_mla import Capacity, MLAAttention, MLAShape
from portable_mla.cli.trace import SHIPPED_TRACE, TraceRequest, read_trace
from portable_mla.core.cache_format import CacheFormat


def steps(requests: Sequence[TraceRequest], concurrency: int, count: int) -> list[list[int]]:
    """Context lengths of decode steps of a continuous-batching replay, spread over its later four fifths."""
    waiting, running, found = list(requests), [], []
    while len(found) < 4000:
        while len(running) < concurrency and waiting:
            first = waiting.pop(0)
            running.append([first.input_tokens, first.output_tokens])
        if len(running) < concurrency:
            break
        running = [[context + 1, left - 1] for context, left in running]
        found.append([context for context, _ in running])
        running = [[context, left] for context, left in running if left > 0]
    low = len(found) // 5
    return [found[low + (len(found) - 1 - low) * index // (count - 1)] for index in range(count)]


PLANS = {"free": (False, 1), "fixed": (True, 1), "ragged queries": (False, 4)}  # deterministic, longest query


def plan_rows() -> list[dict[str, Any]]:
    """GPU and host time of one plan, for ragged batches of 4096 tokens on average."""
    rows = []
    for batch in (1, 8, 32, 128, 256, 1024, 4096):
        problem = Problem.of([1 + (request * 2654435761) % 8191 for request in range(batch)], 16, caches=0)
        row: dict[str, Any] = {"batch": batch}
        pages = int(problem.batch.block_table.max()) + 1
        shape = MLAShape(16, LATENT, ROPE, PAGE_SIZE, torch.bfloat16, CacheFormat.bf16)
        for name, (fixed, longest) in PLANS.items():
            capacity = Capacity(batch, batch * longest, longest, 8192, pages)
            attention = MLAAttention(
                shape, capacity, device=DEVICE, backend="triton", uniform_queries=longest == 1, deterministic=fixed
            )  # fmt: skip
            lens = torch.randint(1, longest + 1, (batch,), dtype=torch.int32, device=DEVICE) if longest > 1 else None
            step = replace(problem.batch, query_lens=lens, max_query_len=longest)
            row[f"{name} us"] = round(graph_us([lambda a=attention, s=step: a.plan(s)], least=20), 2)
            attention.check()
            row[f"{name} host us"] = round(_host_us(lambda a=attention, s=step: a.plan(s)), 1)
        print(row, flush=True)
        rows.append(row)
    return rows


def _host_us(call: Callable[[], object]) -> float:
    """Median microseconds that the host spends in a call whose device work it need not wait for."""
    times = []
    for _ in range(100):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def trace_rows(
    paths: Sequence[Path], concurrencies: Sequence[int], heads: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """Sum over the steps of each trace, of each planner."""
    rows = []
    for path in paths:
        requests = read_trace(path)
        for concurrency in concurrencies:
            sampled = steps(requests, concurrency, count)
            for head_count in heads:
                contenders: dict[str, Callable[[Problem], Calls]] = {
                    "ours": lambda p: ours(p, "triton"), "split rule": split_rule, "vllm": vllm,
                    "fixed": lambda p: ours(p, "triton", deterministic=True),
                }  # fmt: skip
                row: dict[str, Any] = {"trace": path.stem, "requests": concurrency, "heads": head_count}
                for kv_lens in sampled:
                    problem = Problem.of(kv_lens, head_count)
                    for name, build in contenders.items():
                        row[name] = round(row.get(name, 0.0) + _time(build, problem) / len(sampled), 1)
                    del problem
                    torch.cuda.empty_cache()
                row["split rule / ours"] = round(row["split rule"] / row["ours"], 2)
                row["vllm / ours"] = round(row["vllm"] / row["ours"], 2)
                print(row, flush=True)
                rows.append(row)
    return rows


def scaling_rows() -> list[dict[str, Any]]:
    """Batch 1: time against context."""
    rows = []
    for heads in (16, 128):
        for context in (1024, 2048, 4096, 8192, 16384, 32768, 65536, 81920, 131072):
            problem = Problem.of([context], heads)
            row: dict[str, Any] = {"heads": heads, "context": context}
            row["ours"] = round(_time(lambda p: ours(p, "triton"), problem), 1)
            row["fixed"] = round(_time(lambda p: ours(p, "triton", deterministic=True), problem), 1)
            row["vllm"] = round(_time(vllm, problem), 1)
            row["vllm, 4 splits"] = round(_time(lambda p: vllm(p, 4), problem), 1)
            print(row, flush=True)
            rows.append(row)
    return rows


def _time(build: Callable[[Problem], Calls], problem: Problem) -> float:
    try:
        return graph_us(build(problem))
    except ImportError:
        return float("nan")


def memory_rows() -> list[dict[str, Any]]:
    """Bytes by part, for three capacities of DeepSeek-V3's shapes."""
    rows = []
    for batch, heads, context in ((256, 16, 131072), (256, 128, 131072), (32, 16, 1 << 20)):
        shape = MLAShape(heads, LATENT, ROPE, PAGE_SIZE, torch.bfloat16, CacheFormat.bf16)
        for deterministic in (False, True):
            capacity = Capacity(batch, batch, 1, context, 1 << 20)
            attention = MLAAttention(shape, capacity, device=DEVICE, backend="triton", deterministic=deterministic)
            row = {"batch": batch, "heads": heads, "context": context, "fixed": deterministic, **attention.memory()}
            print(row, flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Print each row as it is measured, and write all of them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trace", type=Path, nargs="*", default=[SHIPPED_TRACE])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--heads", type=int, nargs="*", default=[16])
    parser.add_argument("--steps", type=int, default=8, help="decode steps of each trace that are timed")
    parser.add_argument("--only", default="plan,memory,scaling,trace")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "plan": plan_rows,
        "memory": memory_rows,
        "scaling": scaling_rows,
        "trace": lambda: trace_rows(options.trace, options.concurrency, options.heads, options.steps),
    }
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(versions, flush=True)
    measured: dict[str, Any] = {**versions}
    for name in options.only.split(","):
        measured[name] = sections[name]()
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
