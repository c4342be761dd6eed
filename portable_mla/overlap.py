"""Fork: two branches of a layer that do not need one another, on two streams of one GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@functools.cache
def side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """The one stream that runs beside the stream of handle `main`: a stream takes a workspace of cuBLAS's with it."""
    stream = torch.cuda.Stream(device)
    return stream if stream.cuda_stream != main else torch.cuda.Stream(device)


class Fork:
    """Runs part of what is asked of the current stream beside it, and joins at the end of the `with` block.

    Safe with the caching allocator as long as a part allocates nothing that outlives it: whatever it reads or writes
    belongs to the current stream, and stays until the join. A graph captures both branches. Off, or on a CPU, all runs
    in the order in which it is written, which gives the same bits.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self._main = torch.cuda.current_stream(device) if enabled and device.type == "cuda" else None
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
