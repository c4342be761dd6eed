"""demo: the main job on real input. A serving trace is replayed with continuous batching and checked as it runs."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from portable_mla.cli.accuracy import Check, LayerCall
from portable_mla.cli.decode_loop import DecodeLoop, Workload
from portable_mla.cli.explain import DEFAULT_MODEL, Question
from portable_mla.cli.figures import Figures
from portable_mla.cli.replay import Scheduler
from portable_mla.cli.report import Section
from portable_mla.cli.trace import SHIPPED_TRACE, TraceRequest, read_trace
from portable_mla.core.device import LocalDevice, local_devices
from portable_mla.errors import UnsupportedDevice
from portable_mla.models import model_named

CHECKED_STEPS = 8  # about; the first and the last are always among them
CHECKED_REQUESTS = 8  # of a step: the longest and others at random


@dataclass(frozen=True)
class Size:
    """How much a device replays when nothing else is asked for; `seconds` cuts it short on a slow or busy machine."""

    concurrency: int
    layers: int
    steps: int
    pool_tokens: int
    seconds: float


# Each finishes well within a minute; the GPU's cache takes 2.4 GB with 576 bfloat16 values a row.
CPU_SIZE = Size(concurrency=16, layers=4, steps=300, pool_tokens=32768, seconds=25.0)
GPU_SIZE = Size(concurrency=128, layers=8, steps=200, pool_tokens=262144, seconds=60.0)


@dataclass(frozen=True)
class DemoOptions:
    """The demo in the words of the command line; None lets the device decide."""

    model: str = DEFAULT_MODEL
    tensor_parallel: int | None = None
    page_size: int = 64
    dtype: str = "bf16"
    trace: Path | None = None
    device: str | None = None
    backend: str | None = None
    concurrency: int | None = None
    layers: int | None = None
    steps: int | None = None
    pages: int | None = None
    seed: int = 0
    dense: bool = False


class Demo:
    """One replay, ready to run. Raises ValueError for wrong options or a malformed trace, and NoBackend."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        self.device = choose_device(options.device)
        self.trace_path = options.trace or SHIPPED_TRACE
        self.trace = read_trace(self.trace_path)
        size = CPU_SIZE if self.device.device == "cpu" else GPU_SIZE
        self.steps = options.steps or size.steps
        self.seconds = size.seconds if options.steps is None else math.inf
        self.workload = _workload(options, size, self.device, self.trace)
        check_memory(self.workload)
        self.loop = DecodeLoop(self.workload)
        self.scheduler = Scheduler(self.trace, self.loop.cache.pool, concurrency=self.workload.concurrency)
        self._random = random.Random(options.seed)

    @torch.inference_mode()
    def run(self, on_step: Callable[[], None] = lambda: None) -> Figures:
        """Replay and compare; `on_step` is called after every step. Runs once."""
        figures = Figures(self.workload)
        scheduler, interval = self.scheduler, max(1, self.steps // CHECKED_STEPS)
        stop, last = time.monotonic() + self.seconds, False
        while not last and (step := scheduler.next_step()) is not None:
            number = len(figures.steps)
            last = number == self.steps - 1 or scheduler.is_last or time.monotonic() > stop
            checked = last or number % interval == 0
            layer = self._random.randrange(self.workload.layers) if checked else None
            times, call = self.loop.run(step, layer)
            if call is not None and layer is not None:
                figures.checks.append(self._check(call, number, layer))
            figures.add(step, times)
            scheduler.complete()
            on_step()
        unfinished = scheduler.cancel()
        pool = self.loop.cache.pool
        figures.close(scheduler, unfinished=unfinished, pages_returned=pool.free_pages == pool.total)
        return figures

    def _check(self, call: LayerCall, step: int, layer: int) -> Check:
        size = call.batch.size
        longest = int(call.batch.kv_lens.argmax())
        others = self._random.sample(range(size), min(CHECKED_REQUESTS - 1, size))
        return call.check(sorted({longest, *others}), step=step, layer=layer)

    def facts(self) -> dict[str, object]:
        """What is replayed, by name."""
        workload, shape = self.workload, self.workload.shape
        arch = self.device.arch
        assert arch is not None
        return {
            "trace": str(self.trace_path),
            "trace_requests": len(self.trace),
            "device": self.device.device,
            "product": self.device.product,
            "arch": arch.name,
            "backend": self.loop.attention.backend,
            "model": model_named(self.options.model).title,
            "note": model_named(self.options.model).why_not_served,
            "heads": shape.heads,
            "latent_dim": shape.latent_dim,
            "rope_dim": shape.rope_dim,
            "dtype": self.options.dtype,
            "layers": workload.layers,
            "concurrency": workload.concurrency,
            "page_size": shape.page_size,
            "pages": workload.pages,
            "cache_bytes": workload.layer_bytes * workload.layers,
            "seed": workload.seed,
            "step_limit": self.steps,
            "seconds_limit": self.seconds if math.isfinite(self.seconds) else None,
        }

    def section(self) -> Section:
        """The same for a person."""
        rows = tuple((name.replace("_", " "), str(value)) for name, value in self.facts().items() if value is not None)
        return Section("Demo: continuous batching of a serving trace", ("fact", "value"), rows)


def choose_device(name: str | None) -> LocalDevice:
    """The device called `name` ("cuda" is the first GPU), or this machine's first supported one.

    Raises ValueError for a device that is not there and UnsupportedDevice for one that is refused.
    """
    devices = local_devices()
    if name is None:
        return next(device for device in devices if device.arch is not None)
    for device in devices:
        if name in (device.device, device.device.removesuffix(":0")):
            if device.arch is None:
                raise UnsupportedDevice(device.refusal)
            return device
    raise ValueError(f"device: expected one of {', '.join(device.device for device in devices)}, got {name!r}")


def check_memory(workload: Workload) -> None:
    """Raises ValueError if the cache would take more than nine tenths of the memory that the device can give."""
    needed, most = workload.layer_bytes * workload.layers, _memory(workload.device)
    if needed > 0.9 * most:
        raise ValueError(
            f"pages: {workload.pages} pages in {workload.layers} layers take {needed / 1e9:.1f} GB and "
            f"{workload.device} has {most / 1e9:.1f} GB; ask for fewer --pages or --layers"
        )


def _memory(device: str) -> float:
    """Free bytes of a GPU, all bytes of the host; infinite where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _workload(options: DemoOptions, size: Size, device: LocalDevice, trace: tuple[TraceRequest, ...]) -> Workload:
    question = Question(
        model=options.model,
        tensor_parallel=options.tensor_parallel,
        page_size=options.page_size,
        dtype=options.dtype,
        dense=options.dense,
    )
    largest = max(request.total_tokens for request in trace)
    pages = -(-max(size.pool_tokens, largest) // options.page_size)
    return Workload(
        shape=question.shape(),
        softmax_scale=model_named(options.model).softmax_scale,
        device=device.device,
        backend=options.backend,
        concurrency=options.concurrency or size.concurrency,
        layers=options.layers or size.layers,
        pages=options.pages or pages,
        max_context=largest,
        seed=options.seed,
    )
