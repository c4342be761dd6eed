"""A serving engine in miniature: requests, their shuffled pages in a poisoned cache, and the tensors of each step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from portable_mla import CacheFormat, Capacity, MLAAttention, MLAShape, PagedBatch, Settings
from portable_mla.pages import PagePool
from tests import acceptance
from tests.cases import UNREAD_CELL, Problem
from tests.targets import Target
from tests.test_graph import no_sync

# 20 heads: on most GPUs the query tokens of a request are then several units of the split plan. 1200 tokens are three
# pieces of a context whose cuts are fixed.
SHAPE = MLAShape(20, 128, 32, 16, torch.bfloat16, CacheFormat.bf16)
PAGES = 400
CAPACITY = Capacity(
    max_batch=5,
    max_query_tokens=20,
    max_query_len=4,
    max_context=1200,
    max_pages=PAGES,
    cache_bytes=PAGES * SHAPE.page_size * SHAPE.row_width * 2,
)
SCALE = 1.35 * SHAPE.qk_dim**-0.5  # not 1/sqrt(d): a wrong default must show

Result = tuple[Tensor, Tensor]

kv_lens = st.one_of(st.sampled_from((0, 1, 15, 16, 17, 64, 65, 129, 513, 1100)), st.integers(0, 150))
query_lens = st.integers(0, CAPACITY.max_query_len)
picks = st.integers(0, 2**16)


@dataclass(frozen=True)
class Form:
    """How a step is handed over.

    uniform: query tokens of every request, 0 where each has its own number; tight: max_query_len is the longest there
    is, not the capacity's; padding: rows of q that belong to nobody; spare_columns: unread table columns, an odd number
    also moves the table off its alignment; positions: dtype of the caller's own, None for none.
    """

    uniform: int = 0
    tight: bool = False
    padding: int = 0
    spare_columns: int = 0
    positions: torch.dtype | None = None
    backwards: bool = False


@dataclass(frozen=True)
class Step:
    """A step's tensors, and the positions that an attention which planned it must hold."""

    problem: Problem
    positions: Tensor  # [max_query_tokens] int32

    @property
    def batch(self) -> PagedBatch:
        """What is planned."""
        return self.problem.batch

    def start(self, request: int) -> int:
        """First query token of a request."""
        return sum(self.problem.query_lens[:request])

    def rows(self, request: int) -> slice:
        """Query tokens of a request."""
        return slice(self.start(request), self.start(request + 1))

    def with_page(self, request: int, page: int) -> PagedBatch:
        """The batch with another first page for one request."""
        table = self.batch.block_table.clone()
        table[request, 0] = page
        return replace(self.batch, block_table=table)

    def with_kv_len(self, request: int, kv_len: int) -> PagedBatch:
        """The batch with another length for one request."""
        lens = self.batch.kv_lens.clone()
        lens[request] = kv_len
        return replace(self.batch, kv_lens=lens)


class Engine:
    """Requests in the order of the batch, and what the cache holds of them. Slots that nobody owns are NaN."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self._rng = device, torch.Generator().manual_seed(seed)
        shape = (PAGES, SHAPE.page_size, SHAPE.row_width)
        self.cache = torch.full(shape, torch.nan, dtype=SHAPE.q_dtype, device=device)
        self._pool = PagePool(PAGES, SHAPE.page_size)
        self._shuffled = torch.randperm(PAGES, generator=self._rng)
        self._born = 0
        self.query_lens: dict[int, int] = {}  # of each request's next step

    def add(self, kv_len: int, query_len: int) -> None:
        """A new request, last of the batch."""
        self._born += 1
        self._pool.allocate(self._born, kv_len)
        self.query_lens[self._born] = query_len
        self._write(self._born, 0)

    def extend(self, index: int, tokens: int) -> None:
        """More tokens for a request, up to the longest context."""
        request = list(self.query_lens)[index]
        kv_len = self._pool.kv_len(request)
        self._pool.extend(request, min(tokens, CAPACITY.max_context - kv_len))
        self._write(request, kv_len)

    def remove(self, index: int) -> None:
        """Free a request's pages and poison them."""
        request = list(self.query_lens)[index]
        self.cache[self._pages(request).to(self.device)] = torch.nan
        self._pool.free(request)
        del self.query_lens[request]

    def step(self, form: Form, most: int = CAPACITY.max_batch) -> Step:
        """The next step of the first `most` requests."""
        requests = list(self.query_lens)[:most][:: -1 if form.backwards else 1]
        kv_lens = tuple(self._pool.kv_len(request) for request in requests)
        query_lens = tuple(form.uniform or self.query_lens[request] for request in requests)
        tokens = sum(query_lens)
        padding = 0 if form.uniform else min(form.padding, CAPACITY.max_query_tokens - tokens)
        q = torch.randn(tokens + padding, SHAPE.heads, SHAPE.qk_dim, generator=self._rng)
        q[tokens:] = torch.nan
        natural = [n - m + i for n, m in zip(kv_lens, query_lens, strict=True) for i in range(m)]
        positions = torch.tensor(natural if form.positions is None else range(3, 3 + tokens)).long()
        batch = PagedBatch(
            self._table(requests, form.spare_columns),
            self.ints(kv_lens),
            None if form.uniform else self.ints(query_lens),
            form.uniform or (max((1, *query_lens)) if form.tight else CAPACITY.max_query_len),
            None if form.positions is None else positions.to(self.device, form.positions),
        )
        expected = torch.zeros(CAPACITY.max_query_tokens, dtype=torch.int32)
        expected[:tokens] = positions
        problem = Problem(
            q.to(self.device, SHAPE.q_dtype), self.cache, batch, SHAPE.latent_dim, SCALE, kv_lens, query_lens
        )
        return Step(problem, expected.to(self.device))

    def frame(self, requests: int) -> Problem:
        """Tensors of a captured graph, at fixed addresses, for so many requests: yet without a token."""
        width = -(-CAPACITY.max_context // SHAPE.page_size)
        table = torch.full((requests, width), UNREAD_CELL, dtype=torch.int32, device=self.device)
        none = (0,) * requests
        batch = PagedBatch(table, self.ints(none), self.ints(none), CAPACITY.max_query_len)
        q = self.cache.new_full((requests * CAPACITY.max_query_len, SHAPE.heads, SHAPE.qk_dim), torch.nan)
        return Problem(q, self.cache, batch, SHAPE.latent_dim, SCALE, none, none)

    def fill(self, frame: Problem, step: Step) -> Problem:
        """Put a step of as many requests or fewer into a frame's tensors; the step's problem over the frame's q."""
        table, batch, size = frame.batch.block_table, frame.batch, step.batch.size
        frame.q.fill_(torch.nan)
        frame.q[: step.problem.tokens] = step.problem.q[: step.problem.tokens]
        columns = min(table.shape[1], step.batch.block_table.shape[1])
        table.fill_(UNREAD_CELL)
        table[:size, :columns] = step.batch.block_table[:, :columns]
        for lens, values in ((batch.kv_lens, step.problem.kv_lens), (batch.query_lens, step.problem.query_lens)):
            assert lens is not None, "frames are ragged"
            lens.zero_()
            lens[:size] = self.ints(values)
        return step.problem.with_q(frame.q)

    def ints(self, values: tuple[int, ...]) -> Tensor:
        """[n] int32 on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _table(self, requests: list[int], spare_columns: int) -> Tensor:
        width = max([1, *(len(self._pages(request)) for request in requests)]) + spare_columns
        shift = spare_columns % 2
        table = torch.full((len(requests), shift + width), UNREAD_CELL, dtype=torch.int32)
        for row, request in enumerate(requests):
            pages = self._pages(request)
            table[row, shift : shift + len(pages)] = pages
        return table.to(self.device)[:, shift:]

    def _pages(self, request: int) -> Tensor:
        return self._shuffled[list(self._pool.pages(request))]

    def _write(self, request: int, start: int) -> None:
        """Random rows from `start` to the request's end."""
        token = torch.arange(start, self._pool.kv_len(request))
        pages = self._pages(request)
        rows = torch.randn(len(token), SHAPE.row_width, generator=self._rng).to(self.cache)
        slots = pages[token // SHAPE.page_size] * SHAPE.page_size + token % SHAPE.page_size
        self.cache.view(-1, SHAPE.row_width)[slots.to(self.device)] = rows


def held_by(attention: MLAAttention) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Where an attention's buffers are, and its memory."""
    tensors = attention._buffers.tensors()
    return {part: [t.data_ptr() for t in own] for part, own in tensors.items()}, attention.memory()


def empty_result(q: Tensor) -> Result:
    """out and lse full of NaN."""
    out = torch.full((*q.shape[:2], SHAPE.latent_dim), torch.nan, dtype=q.dtype, device=q.device)
    return out, torch.full(q.shape[:2], torch.nan, dtype=torch.float32, device=q.device)


class Serving(RuleBasedStateMachine):
    """An engine with its attentions, the rules by which requests change, and what must hold after every rule. `step` is
    what the active attention planned last, None where requests have changed since."""

    target: ClassVar[Target]
    attention: ClassVar[type[MLAAttention]] = MLAAttention
    covered: ClassVar[set[str]]
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu = self.target.device != "cpu"
        self.in_graphs = self.on_gpu and self.target.backend != "reference"
        self.usual, self.deterministic = self.build(), self.build(deterministic=True)
        self.fresh = self.build(persistent_metadata=False)
        self.held = {attention: held_by(attention) for attention in (self.usual, self.deterministic)}
        self.active = self.usual
        self.step: Step | None = None

    def build(self, *, deterministic: bool = False, persistent_metadata: bool = True) -> MLAAttention:
        """An attention of the target."""
        return self.attention(
            SHAPE,
            CAPACITY,
            device=self.target.device,
            uniform_queries=False,
            deterministic=deterministic,
            backend=self.target.backend,
            settings=Settings(persistent_metadata=persistent_metadata),
        )

    def teardown(self) -> None:
        """Leave the device as it was."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())

    def no_wait(self) -> AbstractContextManager[None]:
        """Where the target promises so, any wait for the device is an error."""
        return no_sync() if self.in_graphs else nullcontext()

    def plan(self, attention: MLAAttention, batch: PagedBatch) -> None:
        """Plan without a wait."""
        with self.no_wait():
            attention.plan(batch)

    def call(self, attention: MLAAttention, problem: Problem) -> Result:
        """Run the planned step into results full of NaN."""
        out, lse = empty_result(problem.q)
        with self.no_wait():
            attention(problem.q, problem.kv_cache, out, lse, softmax_scale=problem.softmax_scale)
        return out, lse

    def serve(self, attention: MLAAttention, step: Step) -> Result:
        """Plan and run."""
        self.plan(attention, step.batch)
        return self.call(attention, step.problem)

    def check(self, problem: Problem, result: Result) -> None:
        """Hold real rows to the acceptance rule, and rows of nobody to 0 and -inf."""
        out, lse = (tensor[problem.tokens :] for tensor in result)
        assert not out.any() and bool((lse == -torch.inf).all()), "rows of padding are not 0 and -inf"
        acceptance.check(problem, *result)

    def planned(self) -> Step:
        """The step of the active attention, planned now where there is none."""
        if self.step is None:
            self.step = self.engine.step(Form())
            self.plan(self.active, self.step.batch)
        return self.step

    # Requests

    @initialize(
        seed=st.integers(0, 2**32), requests=st.lists(st.tuples(kv_lens, query_lens), max_size=CAPACITY.max_batch)
    )
    def the_engine_starts(self, seed: int, requests: list[tuple[int, int]]) -> None:
        self.engine = Engine(self.target.device, seed)
        for kv_len, query_len in requests:
            self.engine.add(kv_len, query_len)

    @precondition(lambda self: len(self.engine.query_lens) < CAPACITY.max_batch)
    @rule(kv_len=kv_lens, query_len=query_lens)
    def a_request_arrives(self, kv_len: int, query_len: int) -> None:
        self.engine.add(kv_len, query_len)
        self.step = None

    @precondition(lambda self: self.engine.query_lens)
    @rule(pick=picks)
    def a_request_leaves(self, pick: int) -> None:
        self.engine.remove(pick % len(self.engine.query_lens))
        self.step = None

    @precondition(lambda self: self.engine.query_lens)
    @rule(pick=picks, tokens=st.sampled_from((1, 2, 3, 4, 16, 100)))
    def a_request_grows(self, pick: int, tokens: int) -> None:
        self.engine.extend(pick % len(self.engine.query_lens), tokens)
        self.step = None

    @rule(lens=st.lists(query_lens, min_size=CAPACITY.max_batch, max_size=CAPACITY.max_batch))
    def the_mix_of_query_lengths_changes(self, lens: list[int]) -> None:
        self.engine.query_lens.update(zip(self.engine.query_lens, lens, strict=False))
        self.step = None

    # What holds after each rule

    @invariant()
    def buffers_stay_where_they_are_and_as_large(self) -> None:
        for attention, (addresses, memory) in self.held.items():
            now = held_by(attention)
            assert now[0] == addresses, "buffers moved"
            assert now[1] == memory, f"memory was {memory}, is {now[1]}"

    @invariant()
    def positions_are_those_of_the_planned_batch(self) -> None:
        if self.step is not None:
            held, right = self.active.positions, self.step.positions
            assert torch.equal(held, right), f"positions are {held.tolist()}, expected {right.tolist()}"

    @invariant()
    def nothing_is_reported_that_is_not_wrong(self) -> None:
        for attention in self.held:
            attention.check()
