"""Contenders: this library's decode, and what it is compared with, over random paged problems, timed in CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ci.tile_override import arch_with_tiles_of
from portable_mla import Capacity, MLAAttention, MLAShape, PagedBatch, Phase, Request, arch_of
from portable_mla.backends.triton.backend import TritonBackend
from portable_mla.backends.triton.config.decode import Tile, row_tiles
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.cache_format import CacheFormat
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.dispatch.select import load
from portable_mla.metadata import DecodeBuffers, DecodeMetadata, Needs, Status

PAGE_SIZE, LATENT, ROPE = 64, 512, 64
SCALE = 192**-0.5
# Of the caches that calls go through in turn: what loads leave in L2, of some policies for long, must not serve a later
# call of the same contender.
COLD_BYTES = 3e9
MOST_CACHES = 128
REST = 0.3  # seconds before a contender is timed, so that it does not begin at a clock that the one before brought down
WARM = 0.03  # seconds of replays that do not count, so that it does not begin at an idle clock either
DEVICE = "cuda"


@dataclass(frozen=True)
class Problem:
    """Random queries, caches enough to be cold, and a batch with shuffled pages."""

    q: Tensor
    caches: list[Tensor]
    batch: PagedBatch
    kv_lens: list[int]

    @classmethod
    def of(cls, kv_lens: Sequence[int], heads: int, *, query_len: int = 1, caches: int | None = None) -> Problem:
        """query_len query tokens a request."""
        rng = torch.Generator(device=DEVICE).manual_seed(0)
        width = -(-max(kv_lens) // PAGE_SIZE)
        pages = sum(-(-n // PAGE_SIZE) for n in kv_lens)
        order = torch.randperm(pages, generator=rng, device=DEVICE).to(torch.int32)
        table = torch.zeros(len(kv_lens), width, dtype=torch.int32, device=DEVICE)
        start = 0
        for request, n in enumerate(kv_lens):
            count = -(-n // PAGE_SIZE)
            table[request, :count] = order[start : start + count]
            start += count
        copies = caches if caches is not None else max(2, min(MOST_CACHES, int(COLD_BYTES // (sum(kv_lens) * 1152))))
        row = (pages, PAGE_SIZE, LATENT + ROPE)
        stored = [torch.randn(row, generator=rng, device=DEVICE, dtype=torch.bfloat16) * 0.5 for _ in range(copies)]
        q_shape = (len(kv_lens) * query_len, heads, LATENT + ROPE)
        q = torch.randn(q_shape, generator=rng, device=DEVICE, dtype=torch.bfloat16)
        lens = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
        return cls(q, stored, PagedBatch(table, lens, None, query_len), list(kv_lens))

    def request(self) -> Request:
        """What dispatch would be asked."""
        shape = MLAShape(self.q.shape[1], LATENT, ROPE, PAGE_SIZE, torch.bfloat16, CacheFormat.bf16)
        pages, query_len = self.caches[0].shape[0], self.batch.max_query_len
        width = self.batch.block_table.shape[1] * PAGE_SIZE
        capacity = Capacity(
            len(self.kv_lens), self.q.shape[0], query_len, width, pages, self.caches[0].nbytes
        )  # fmt: skip
        return Request(arch_of(DEVICE), shape, Phase.decode, query_len, True, False, capacity)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """out and lse."""
        return self.q.new_empty(*self.q.shape[:2], LATENT), self.q.new_empty(self.q.shape[:2], dtype=torch.float32)


Calls = list[Callable[[], Tensor]]


def apart(calls: Calls) -> list[Callable[[], object]]:
    """The calls with a plain kernel after each, so that none overlaps the end of the one before."""
    one = torch.zeros(1, device=DEVICE)
    return [lambda call=call: (call(), one.add_(1)) for call in calls]


def graph_us(calls: Sequence[Callable[[], object]], *, least: int = 4, replays: int = 15) -> float:
    """Median microseconds of one call, of a graph that makes all of them at least `least` times, after a rest."""
    rounds = max(1, -(-least // len(calls)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    torch.cuda.synchronize()
    time.sleep(REST)
    begun = time.perf_counter()
    while time.perf_counter() < begun + WARM:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / (rounds * len(calls)))
    return statistics.median(times)


def host_us(calls: Sequence[Callable[[], object]], *, rounds: int = 15) -> float:
    """Median microseconds of one call, by the host's clock and without a graph, of rounds of all of them."""
    times = []
    for index in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        if index >= 2:
            times.append((time.perf_counter() - start) * 1e6 / len(calls))
    return statistics.median(times)


def ours(problem: Problem, backend: str | None = None, *, deterministic: bool = False, planned: bool = False) -> Calls:
    """MLAAttention with a backend, or with the one that it chooses. planned: each call plans a step first."""
    request = problem.request()
    attention = MLAAttention(
        request.shape, request.capacity, device=DEVICE, backend=backend, deterministic=deterministic
    )  # fmt: skip
    attention.plan(problem.batch)
    out, lse = problem.outputs()

    def call(cache: Tensor) -> Tensor:
        if planned:
            attention.plan(problem.batch)
        return attention(problem.q, cache, out, lse, softmax_scale=SCALE)[0]

    return [lambda c=c: call(c) for c in problem.caches]


def ruled_tile(request: Request) -> Tile:
    """The portable kernel's tile by the rules of the request's architecture."""
    backend = load("triton", request.arch.vendor)
    assert isinstance(backend, TritonBackend)
    return backend.tile(request)


def with_tiles_of(name: str, problem: Problem) -> Calls:
    """The portable kernel with the tiles of another NVIDIA architecture."""
    local = problem.request()
    request = replace(local, arch=arch_with_tiles_of(name, local.arch))
    runner = TritonRunner(request, ruled_tile(request))
    status = Status.allocate(torch.device(DEVICE))
    buffers = DecodeBuffers(request.capacity, PAGE_SIZE, Needs(split_plan=runner.plan_shape), status)
    runner.plan(buffers.update(problem.batch, problem.caches[0].shape[0]))
    return _calls(problem, runner)


def split_rule(problem: Problem) -> Calls:
    """The same kernel and combine over pieces that the split rule makes, one program each."""
    request, batch = problem.request(), len(problem.kv_lens)
    tile = ruled_tile(request)
    splits = rule_splits(max(problem.kv_lens), request.arch.units)
    units = -(-batch * splits * row_tiles(problem.q.shape[1], tile) // tile.programs_per_unit)
    runner = TritonRunner(replace(request, arch=replace(request.arch, units=units)), tile)
    runner.combine = TritonRunner(request, tile).combine
    status = Status.allocate(torch.device(DEVICE))
    needs = Needs(split_plan=runner.plan_shape)
    metadata = DecodeBuffers(request.capacity, PAGE_SIZE, needs, status).update(
        problem.batch, problem.caches[0].shape[0]
    )
    _write_split_rule(metadata, problem.kv_lens, splits, tile.block_n)
    runner.plan(metadata)
    return _calls(problem, runner)


def _calls(problem: Problem, runner: TritonRunner) -> Calls:
    out, lse = problem.outputs()

    def call(cache: Tensor) -> Tensor:
        runner.run(DecodeInputs(problem.q, cache), out, lse, softmax_scale=SCALE)
        return out

    return [lambda c=c: call(c) for c in problem.caches]


def rule_splits(longest: int, units: int) -> int:
    """Pieces of every request: of vLLM 0.33.0's Triton MLA."""
    return min(1 << (max(1, longest // 512) - 1).bit_length(), 2 * units)


def _write_split_rule(metadata: DecodeMetadata, kv_lens: list[int], splits: int, block_n: int) -> None:
    plan = metadata.split_plan
    assert plan is not None
    items, tokens = [], []
    for request, kv_len in enumerate(kv_lens):
        tiles = -(-kv_len // block_n)
        each = -(-tiles // splits)
        for piece in range(splits):
            low, high = min(piece * each, tiles), min(piece * each + each, tiles)
            items.append([request, low, high, request * splits + piece, kv_len, request, 1, 0])
        tokens.append([request * splits, request * splits + splits, 0, kv_len - 1])
    part_indptr = [min(part, len(items)) for part in range(plan.shape.parts + 1)]
    for buffer, values in ((plan.items, items), (plan.token_slots, tokens), (plan.part_indptr, part_indptr)):
        buffer[: len(values)] = torch.tensor(values, dtype=torch.int32, device=DEVICE)
