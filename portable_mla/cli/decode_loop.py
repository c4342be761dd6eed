"""DecodeLoop: the device side of a replay. Random rows into the cache, one plan a step, one call a layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from portable_mla.cache.paged_cache import PagedLatentCache
from portable_mla.cli.accuracy import LayerCall
from portable_mla.cli.replay import Step
from portable_mla.core.shape import Capacity, MLAShape
from portable_mla.decode.attention import MLAAttention
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.metadata import PagedBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Workload:
    """What is replayed where: one rank's shape and the size of its cache. backend None lets dispatch choose."""

    shape: MLAShape
    softmax_scale: float
    device: str
    backend: str | None
    concurrency: int
    layers: int
    pages: int
    max_context: int
    seed: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self.shape.row_width * self.shape.cache_format.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's cache."""
        return self.pages * self.shape.page_size * self.row_bytes

    @property
    def capacity(self) -> Capacity:
        """Bounds of every step."""
        return Capacity(
            max_batch=self.concurrency,
            max_query_tokens=self.concurrency,
            max_query_len=1,
            max_context=self.max_context,
            max_pages=self.pages,
        )


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step; making random rows is in none of them."""

    plan: float
    attention: float

    @property
    def total(self) -> float:
        """Plan and attention."""
        return self.plan + self.attention


class DecodeLoop:
    """Cache, attention and random data of one replay. Raises NoBackend where nothing can serve."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.attention = MLAAttention(
            workload.shape, workload.capacity, device=workload.device, backend=workload.backend
        )
        self.cache = PagedLatentCache(workload.shape, workload.pages, layers=workload.layers, device=workload.device)
        # A kernel that reads a slot nobody wrote shows it in the checks.
        self.cache.storage.fill_(torch.nan)
        self._random = torch.Generator(device=workload.device).manual_seed(workload.seed)
        self._warm = False  # the first step also runs once untimed, for compilation and first-touch costs

    def run(self, step: Step, checked_layer: int | None = None) -> tuple[StepTimes, LayerCall | None]:
        """Decode one step over all layers; the call of `checked_layer` comes back for comparison."""
        for request, tokens in step.prefills:
            self._write(self.cache.slots(request, 0, tokens))
        batch = self.cache.batch(step.requests)
        shape, layers = self.workload.shape, self.workload.layers
        self._write(_newest_slots(batch, shape.page_size))
        q = self._normal(layers, batch.size, shape.heads, shape.qk_dim)
        if not self._warm:
            self.attention.plan(batch)
            self._attend(q, batch, None)
            self._warm = True
        plan, _ = self._timed(lambda: self.attention.plan(batch))
        attention, call = self._timed(lambda: self._attend(q, batch, checked_layer))
        return StepTimes(plan, attention), call

    def _attend(self, q: Tensor, batch: PagedBatch, checked_layer: int | None) -> LayerCall | None:
        """Every layer once. q: [layers, batch, heads, latent + rope]."""
        scale, kept = self.workload.softmax_scale, None
        for layer in range(q.shape[0]):
            out, lse = self.attention(q[layer], self.cache[layer], softmax_scale=scale)
            if layer == checked_layer:
                kept = LayerCall(DecodeInputs(q[layer], self.cache[layer]), batch, scale, out, lse)
        return kept

    def _write(self, slots: Tensor) -> None:
        """New random rows at `slots` of every layer."""
        for layer in range(self.workload.layers):
            self.cache.write(layer, slots, self._normal(slots.shape[0], self.workload.shape.row_width))

    def _normal(self, *size: int) -> Tensor:
        dtype, device = self.workload.shape.q_dtype, self.workload.device
        return torch.randn(size, generator=self._random, dtype=dtype, device=device)

    def _timed(self, work: Callable[[], T]) -> tuple[float, T]:
        """Wall seconds of `work`, the device's included, and its result."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.cache.storage.is_cuda:
            torch.cuda.synchronize(self.cache.storage.device)


def _newest_slots(batch: PagedBatch, page_size: int) -> Tensor:
    """[batch] int64: the flat slot of each request's last token, computed on the batch's device."""
    position = batch.kv_lens.long() - 1
    page = batch.block_table.long().gather(1, (position // page_size)[:, None])[:, 0]
    return page * page_size + position % page_size
