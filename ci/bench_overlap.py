"""A DeepSeek-V3 attention layer with its branches on one stream and on two: microseconds a layer in a CUDA graph.

    python -m ci.bench_overlap [--batches 1 32 128] [--ranks 8 1] [--context 4096] [--json FILE]

Several layers with weights and caches of their own, so that none is found in L2. Both ways take turns; the median of
the rounds is printed. Outputs and caches of both are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ci.contenders import DEVICE, graph_us
from portable_mla import (
    CacheFormat,
    Capacity,
    LayerGeometry,
    LayerStep,
    MLAAttention,
    MLALayer,
    PagedBatch,
    Yarn,
    rope_table,
    softmax_scale,
    yarn_mscale,
)

PAGE_SIZE = 64
DEEPSEEK_V3 = LayerGeometry(
    7168, 128, 512, 64, 128, 128, softmax_scale(128, 64, mscale=yarn_mscale(40.0)), q_lora_rank=1536
)


@dataclass(frozen=True)
class Model:
    """Layers of one rank, their caches, a batch of hidden states, and where its tokens stand."""

    layers: list[MLALayer]
    caches: list[Tensor]
    hidden: Tensor
    step: LayerStep

    @classmethod
    def of(cls, geometry: LayerGeometry, *, ranks: int, batch: int, context: int, layers: int) -> Model:
        """Random weights and rows; every request has `context` tokens, the new one included."""
        torch.manual_seed(0)
        half = {"dtype": torch.bfloat16, "device": DEVICE}
        made = [MLALayer(geometry, tensor_parallel=ranks, dtype=torch.bfloat16, device=DEVICE) for _ in range(layers)]
        width = -(-context // PAGE_SIZE)
        shape = geometry.shape(torch.bfloat16, CacheFormat.bf16, page_size=PAGE_SIZE, tensor_parallel=ranks)
        row = (batch * width, PAGE_SIZE, shape.row_width)
        caches = [torch.randn(row, **half) for _ in range(layers)]
        table = torch.randperm(batch * width, device=DEVICE).to(torch.int32).view(batch, width)
        paged = PagedBatch(table, torch.full((batch,), context, dtype=torch.int32, device=DEVICE))
        capacity = Capacity(batch, batch, 1, width * PAGE_SIZE, batch * width, caches[0].nbytes)
        attention = MLAAttention(shape, capacity, device=DEVICE)
        attention.plan(paged)
        cos_sin = rope_table(context, geometry.rope_dim, yarn=Yarn(40.0, 4096), device=DEVICE)
        hidden = torch.randn(batch, geometry.hidden_size, **half)
        return cls(made, caches, hidden, LayerStep.of(attention, paged, batch, cos_sin, overlap=False))

    def calls(self, *, overlap: bool) -> list[Callable[[], Tensor]]:
        """One call a layer."""
        step = replace(self.step, overlap=overlap)
        return [
            lambda layer=layer, cache=cache: layer(self.hidden, cache, step)
            for layer, cache in zip(self.layers, self.caches, strict=True)
        ]

    def results(self, *, overlap: bool) -> list[Tensor]:
        """Outputs of all layers from a captured graph, and the rows that they stored."""
        calls = self.calls(overlap=overlap)
        for cache in self.caches:
            cache.view(-1, cache.shape[2])[self.step.slots] = 0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [call() for call in calls]
        graph.replay()
        rows = [cache.view(-1, cache.shape[2])[self.step.slots] for cache in self.caches]
        return [tensor.clone() for tensor in (*found, *rows)]


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """Both ways in turns; SystemExit where a bit differs."""
    serial, overlapped = (model.results(overlap=overlap) for overlap in (False, True))
    if not all(map(torch.equal, serial, overlapped)) or not all(bool(one.isfinite().all()) for one in serial):
        raise SystemExit("the overlapped layers' results differ from the serial ones'")
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for overlap, found in times.items():
            found.append(graph_us(model.calls(overlap=overlap)))
    one, two = (statistics.median(times[overlap]) for overlap in (False, True))
    spread = max(max(found) / min(found) for found in times.values())
    return {
        "serial us": round(one, 1), "overlapped us": round(two, 1), "times as fast": round(one / two, 4),
        "spread": round(spread, 3), "identical": True,
    }  # fmt: skip


def table(ranks: Sequence[int], batches: Sequence[int], context: int, rounds: int) -> list[dict[str, Any]]:
    """One row a rank count and batch."""
    rows = []
    for count in ranks:
        for batch in batches:
            model = Model.of(DEEPSEEK_V3, ranks=count, batch=batch, context=context, layers=4)
            row = {"ranks": count, "heads": DEEPSEEK_V3.heads // count, "batch": batch, "context": context}
            row |= {"backend": str(getattr(model.step.attention, "backend", "")), **measure(model, rounds)}
            print(row, flush=True)
            rows.append(row)
            del model
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Print each row as it is measured, and write all of them where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    measured["triton"] = triton.__version__
    print(measured, flush=True)
    measured["layer"] = table(options.ranks, options.batches, options.context, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
