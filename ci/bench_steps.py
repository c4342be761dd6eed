"""Steps that hold prefills, on one GPU: mixed with decodes, and over a cached context. Microseconds of CUDA graphs.

    python -m ci.bench_steps [--only mixed,chunked] [--json FILE]

mixed: one request decodes beside short prompts, in two launches of a captured step. Its two parts alone, and the whole
batch, the decode included, as one absorbed prefill that splits no context, stand beside it; each with a cold L2.
chunked: new tokens over a long context in the latent cache, window by window, and in one call over the keys and values
of all tokens; up-projecting the context counts in both.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ci.contenders import DEVICE, LATENT, PAGE_SIZE, ROPE, graph_us, ruled_tile
from portable_mla import CachedContext, Capacity, MixedAttention, MLAShape, PagedBatch, Phase, Request, arch_of
from portable_mla import mla_chunked_prefill as chunked_prefill
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.cache_format import CacheFormat
from portable_mla.dispatch.interface import DecodeInputs, PrefillInputs, prefill_runner
from portable_mla.dispatch.select import select
from portable_mla.metadata import DecodeBuffers, Needs, Status
from portable_mla.metadata.split_plan.plan import PlanShape

NOPE = V_DIM = 128
SCALE = (NOPE + ROPE) ** -0.5
PROMPTS, PROMPT = 100, 128  # beside the decode
NEW, CACHED = 4096, 61440  # of a chunked prefill


def randn(*shape: int) -> Tensor:
    """bfloat16 on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


class _Whole(PlanShape):
    """Plans in which every unit is one piece."""

    @property
    def fixed_tiles(self) -> int:
        return -(-self.max_context // self.block_n)


def absorbed_unsplit(shape: MLAShape, batch: PagedBatch, capacity: Capacity, cache: Tensor) -> Callable[[], object]:
    """Every request through the absorbed kernel of portable Triton, a program for a whole context."""
    request = Request(arch_of(DEVICE), shape, Phase.decode, capacity.max_query_len, False, False, capacity)
    runner = TritonRunner(request, ruled_tile(request))
    whole = _Whole(**vars(runner.plan_shape) | {"fixed": True})
    buffers = DecodeBuffers(capacity, PAGE_SIZE, Needs(split_plan=whole), Status.allocate(torch.device(DEVICE)))
    runner.plan(buffers.update(batch, capacity.max_pages))
    tokens = capacity.max_query_tokens
    q, out = randn(tokens, shape.heads, LATENT + ROPE), randn(tokens, shape.heads, LATENT)
    lse = torch.empty(tokens, shape.heads, device=DEVICE)
    return lambda: runner.run(DecodeInputs(q, cache), out, lse, softmax_scale=SCALE)


def cold_us(call: Callable[[], object]) -> float:
    """Microseconds of a call that finds nothing of its own in L2."""
    flushed = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    return graph_us([lambda: (flushed.zero_(), call())], least=8) - graph_us([flushed.zero_], least=8)


def mixed_row(context: int, heads: int) -> dict[str, Any]:
    """One decode at the context, and prompts."""
    query_lens = [1, *[PROMPT] * PROMPTS]
    kv_lens = [context, *[PROMPT] * PROMPTS]
    pages, width, tokens = sum(n // PAGE_SIZE for n in kv_lens), context // PAGE_SIZE, sum(query_lens)
    order = torch.randperm(pages, device=DEVICE, dtype=torch.int32)
    table = torch.zeros(len(kv_lens), width, dtype=torch.int32, device=DEVICE)
    table[0] = order[:width]
    each = PROMPT // PAGE_SIZE
    table[1:, :each] = order[width:].view(PROMPTS, each)
    keys, queries = (torch.tensor(lens, dtype=torch.int32, device=DEVICE) for lens in (kv_lens, query_lens))
    batch = PagedBatch(table, keys, queries, PROMPT)
    cache = randn(pages, PAGE_SIZE, LATENT + ROPE)
    capacity = Capacity(len(kv_lens), tokens, PROMPT, context, pages, cache.nbytes)
    shape = MLAShape(heads, LATENT, ROPE, PAGE_SIZE, torch.bfloat16, CacheFormat.bf16, NOPE, V_DIM)
    mixed = MixedAttention(shape, capacity, device=DEVICE)
    mixed.plan(batch, query_lens)
    absorbed, new = randn(1, heads, LATENT + ROPE), tokens - 1
    expanded = (randn(new, heads, NOPE + ROPE), randn(new, heads, NOPE), randn(new, ROPE), randn(new, heads, V_DIM))
    decode = lambda: mixed.decode(absorbed, cache, softmax_scale=SCALE)  # noqa: E731
    prefill = lambda: mixed.prefill(*expanded, softmax_scale=SCALE)  # noqa: E731
    times = {
        "mixed": cold_us(lambda: (decode(), prefill())),
        "decode alone": cold_us(decode),
        "prefill alone": cold_us(prefill),
        "one absorbed launch": cold_us(absorbed_unsplit(shape, batch, capacity, cache)),
    }
    both = times["decode alone"] + times["prefill alone"]
    ratios = {"of the parts": times["mixed"] / both, "faster": times["one absorbed launch"] / times["mixed"]}
    return {"heads": heads, "context": context} | {name: round(value, 2) for name, value in (times | ratios).items()}


def chunked_row(heads: int) -> dict[str, Any]:
    """NEW tokens over CACHED."""
    cache = randn(CACHED // PAGE_SIZE, PAGE_SIZE, LATENT + ROPE)
    table = torch.randperm(CACHED // PAGE_SIZE, device=DEVICE, dtype=torch.int32)[None]
    offsets, keys = (torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (NEW, NEW + CACHED))
    q = randn(NEW, heads, NOPE + ROPE)
    k_nope, k_pe, v = (randn(NEW + CACHED, *rest) for rest in ((heads, NOPE), (ROPE,), (heads, V_DIM)))
    w_uk, w_uv = randn(heads, NOPE, LATENT), randn(heads, V_DIM, LATENT)
    lens = torch.tensor([CACHED], dtype=torch.int32, device=DEVICE)
    context = CachedContext(cache, table, lens, CACHED, w_uk, w_uv)
    out, lse = torch.empty_like(v[:NEW]), torch.empty(NEW, heads, device=DEVICE)
    whole = PrefillInputs(q, k_nope, k_pe, v, offsets, keys)
    capacity = Capacity(1, NEW, NEW, NEW + CACHED, 0, 0)
    expanded = MLAShape.expanded(heads, NOPE, ROPE, V_DIM, torch.bfloat16)
    request = Request(arch_of(DEVICE), expanded, Phase.prefill, NEW, False, False, capacity)
    runner = prefill_runner(select(request), request)

    def unchunked() -> None:
        rows = cache[table[0].long()].view(CACHED, -1)
        for weight, result in ((w_uk, k_nope), (w_uv, v)):
            torch.matmul(rows[:, :LATENT], weight.view(-1, LATENT).T, out=result[:CACHED].view(CACHED, -1))
        k_pe[:CACHED] = rows[:, LATENT:]
        runner.run(whole, out, lse, softmax_scale=SCALE)

    def chunked() -> None:
        new = k_nope[CACHED:], k_pe[CACHED:], v[CACHED:]
        chunked_prefill(
            q, *new, offsets, offsets, context, max_seqlen_q=NEW, max_seqlen_k=NEW, softmax_scale=SCALE,
            out=out, lse=lse,
        )  # fmt: skip

    unchunked()
    expected = out.float()
    chunked()
    difference = float((out.float() - expected).norm() / expected.norm())
    free = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    chunked()
    held = torch.cuda.max_memory_allocated() - free
    calls = {"chunked": chunked, "one call": unchunked}
    times = {name: graph_us([call], least=1, replays=5) for name, call in calls.items()}
    return {
        "heads": heads, "new": NEW, "cached": CACHED, **{name: round(us) for name, us in times.items()},
        "ratio": round(times["chunked"] / times["one call"], 3), "relative difference": f"{difference:.1e}",
        "memory held, MB": round(held / 1e6), "keys and values at once, MB": round((k_nope.nbytes + v.nbytes) / 1e6),
    }  # fmt: skip


def main() -> None:
    """Print each row as it is measured, and write all of them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="mixed,chunked")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    measured |= {"triton": triton.__version__}
    contexts = (16384, 32768, 65536)
    tables: dict[str, Sequence[Callable[[int], dict[str, Any]]]] = {
        "mixed": [functools.partial(mixed_row, context) for context in contexts],
        "chunked": [chunked_row],
    }
    for name in options.only.split(","):
        measured[name] = []
        for heads in options.heads:
            for row in tables[name]:
                measured[name].append(row(heads))
                print(name, measured[name][-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
