"""Scheduler: continuous batching of a trace over a page pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from portable_mla.cache.page_pool import PagePool
from portable_mla.cli.trace import TraceRequest
from portable_mla.errors import CacheFull


@dataclass(frozen=True)
class Step:
    """One decode step: every request in it has one new token, its last, and attends once a layer.

    requests: indices into the trace, oldest admission first; prefills: requests admitted just now with the number of
    tokens before the new one, which need their rows; kv_tokens: tokens attended to, over all requests.
    """

    requests: tuple[int, ...]
    prefills: tuple[tuple[int, int], ...]
    kv_tokens: int


class Scheduler:
    """Runs requests in trace order in at most `concurrency` slots, with pages from `pool`.

    A request is admitted when a slot and the pages of its prompt are free, and nothing overtakes the head of the
    queue. When a running request cannot grow, the youngest is preempted: its pages return to the pool and it waits
    again at the head of the queue, to be prefilled with what it had generated. The oldest is never preempted, so every
    request finishes.
    Raises ValueError for a request that the whole pool could not hold.
    """

    def __init__(self, trace: Sequence[TraceRequest], pool: PagePool, *, concurrency: int) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        for index, request in enumerate(trace):
            needed = -(-request.total_tokens // pool.page_size)
            if needed > pool.total:
                raise ValueError(
                    f"pages: request {index} of the trace grows to {request.total_tokens} tokens; expected at least "
                    f"{needed} pages of {pool.page_size}, got {pool.total}"
                )
        self._trace, self._pool, self._concurrency = trace, pool, concurrency
        self._waiting = deque(range(len(trace)))
        self._running: list[int] = []
        self._generated = [0] * len(trace)
        self.finished = 0
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> tuple[int, ...]:
        """Requests that own pages, oldest admission first."""
        return tuple(self._running)

    @property
    def is_last(self) -> bool:
        """Whether nothing is left to do after the current step."""
        return not self._waiting and all(self._left(index) == 1 for index in self._running)

    def next_step(self) -> Step | None:
        """Grow the running requests, admit waiting ones, and say what the step holds; None when all is done."""
        self._grow()
        prefills = tuple(self._admit())
        if not self._running:
            return None
        return Step(self.running, prefills, sum(self._pool.kv_len(index) for index in self._running))

    def complete(self) -> tuple[int, ...]:
        """Count the step's tokens as generated and return the pages of requests that have finished."""
        done = [index for index in self._running if self._left(index) == 1]
        for index in self._running:
            self._generated[index] += 1
        for index in done:
            self._running.remove(index)
            self._pool.free(index)
        self.finished += len(done)
        return tuple(done)

    def cancel(self) -> int:
        """Return the pages of requests that still run; how many there were."""
        for index in self._running:
            self._pool.free(index)
        cancelled = len(self._running)
        self._running.clear()
        return cancelled

    def _left(self, index: int) -> int:
        return self._trace[index].output_tokens - self._generated[index]

    def _grow(self) -> None:
        """One more token for each running request, oldest first, preempting from the young end."""
        grown = 0
        while grown < len(self._running):
            try:
                self._pool.extend(self._running[grown], 1)
            except CacheFull:
                self._preempt()
            else:
                grown += 1

    def _preempt(self) -> None:
        youngest = self._running.pop()
        self._pool.free(youngest)
        self._waiting.appendleft(youngest)
        self.preemptions += 1

    def _admit(self) -> list[tuple[int, int]]:
        admitted = []
        while self._waiting and len(self._running) < self._concurrency:
            index = self._waiting[0]
            known = self._trace[index].input_tokens + self._generated[index]
            try:
                self._pool.allocate(index, known + 1)
            except CacheFull:
                break
            self._running.append(self._waiting.popleft())
            admitted.append((index, known))
        return admitted
