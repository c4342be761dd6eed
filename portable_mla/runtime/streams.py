"""Fork: two branches of a layer that do not need one another, on two streams of one GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from portable_mla.core.device import built_for_amd

FEW_TOKENS = 32


@functools.cache
def side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """The one stream that runs beside the stream of handle `main`: a stream takes a workspace of cuBLAS's with it."""
    stream = torch.cuda.Stream(device)
    return stream if stream.cuda_stream != main else torch.cuda.Stream(device)


def overlap_pays(hidden: Tensor) -> bool:
    """Whether a layer is faster on two streams: in a capture of few tokens on an NVIDIA GPU. Without a graph the host
    would launch more.

    A layer of DeepSeek-V3 on an H100, 4096 tokens of context, serial / overlapped us (`python -m ci.bench_overlap`): 16
    heads, batch 1 87.4 / 82.3, 32 149.1 / 147.0, 128 302.7 / 305.1; 128 heads 202.6 / 198.5, 275.7 / 274.7,
    486.0 / 482.9, where runs differ by as much.
    """
    few = hidden.is_cuda and hidden.shape[0] <= FEW_TOKENS and not built_for_amd()
    return few and torch.cuda.is_current_stream_capturing()


class Fork:
    """Runs part of what is asked of the current stream beside it, and joins at the end of the `with` block.

    Safe with the caching allocator as long as a part allocates nothing that outlives it: whatever it reads or writes
    belongs to the current stream, and stays until the join. A graph captures both branches. Off, or on a CPU, all runs
    in the order in which it is written, which gives the same bits.
    """

    def __init__(self, hidden: Tensor, *, enabled: bool | None) -> None:
        enabled = overlap_pays(hidden) if enabled is None else enabled
        self._main = torch.cuda.current_stream(hidden.device) if enabled and hidden.is_cuda else None
        self._side = None if self._main is None else side_stream(self._main.device, self._main.cuda_stream)

    def __enter__(self) -> Fork:
        return self

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched here waits for what was launched before, and for nothing after."""
        if self._main is None or self._side is None:
            yield
            return
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    def __exit__(self, *_: object) -> None:
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)
