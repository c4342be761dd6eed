"""Time the CPU backend against gathering pages and scaled_dot_product_attention: python -m tests.support.bench_cpu"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from portable_mla import Capacity, MLAAttention, MLAShape, PagedBatch
from portable_mla.core.cache_format import cache_format_of

BATCH, HEADS, CONTEXT, PAGE = 8, 16, 4096, 64


def milliseconds(functions: tuple[Callable[[], object], ...], repeats: int = 15) -> list[float]:
    """Median time of each, taken in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= 2:
                mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in times]


def compare(dtype: torch.dtype) -> tuple[float, float]:
    """Milliseconds of the CPU backend and of gather + SDPA, on the same problem."""
    pages = BATCH * CONTEXT // PAGE
    cache = torch.randn(pages + 8, PAGE, 576).to(dtype)
    table = torch.randperm(pages + 8)[:pages].view(BATCH, -1).int()
    lens = torch.full((BATCH,), CONTEXT, dtype=torch.int32)
    q = torch.randn(BATCH, HEADS, 576).to(dtype)
    shape = MLAShape(HEADS, 512, 64, PAGE, dtype, cache_format_of(dtype))
    attention = MLAAttention(shape, Capacity(BATCH, BATCH, 1, CONTEXT, pages + 8), device="cpu", backend="cpu")
    attention.plan(PagedBatch(table, lens))

    def sdpa() -> Tensor:
        rows = cache[table.long()].view(BATCH, 1, CONTEXT, 576)
        q_rows = q.view(BATCH, 1, HEADS, 576)
        out = torch.nn.functional.scaled_dot_product_attention(q_rows, rows, rows, scale=0.07)
        return out[..., :512].reshape(BATCH, HEADS, 512)

    def ours() -> Tensor:
        return attention(q, cache, softmax_scale=0.07)[0]

    assert (ours().float() - sdpa().float()).norm() <= 4e-3 * sdpa().float().norm()
    mine, theirs = milliseconds((ours, sdpa))
    return mine, theirs


def main() -> None:
    """Print a line a dtype."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    print(f"batch {BATCH}, {HEADS} heads, context {CONTEXT}, {torch.get_num_threads()} threads")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        mine, theirs = compare(dtype)
        print(f"{dtype!s:16} cpu backend {mine:5.1f} ms, gather + sdpa {theirs:5.1f} ms, ratio {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
