"""A serving engine in miniature: requests, their shuffled pages in a poisoned cache, and the tensors of each step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portable_mla import CacheFormat, Capacity, MLAShape, PagedBatch
from portable_mla.cache.page_pool import PagePool
from tests.support.cases import UNREAD_CELL, Case, Problem

MAX_BATCH, PAGES = 5, 400
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Model:
    """What an engine serves."""

    shape: MLAShape
    capacity: Capacity

    @classmethod
    def of(cls, heads: int, latent_dim: int, rope_dim: int, page_size: int, query_len: int, context: int) -> Model:
        """One of so many heads, whose requests have up to `query_len` query tokens."""
        shape = MLAShape(heads, latent_dim, rope_dim, page_size, torch.bfloat16, CacheFormat.bf16)
        return cls(shape, Capacity(MAX_BATCH, MAX_BATCH * query_len, query_len, context, PAGES))

    @property
    def scale(self) -> float:
        """Not 1/sqrt(d): a wrong default must show."""
        return float(1.35 * self.shape.qk_dim**-0.5)

    def case(self) -> Case:
        """A decode problem of its shape, with as many query tokens as there can be."""
        shape, query_len = self.shape, self.capacity.max_query_len
        return Case(
            (1,),
            shape.heads,
            shape.latent_dim,
            shape.rope_dim,
            shape.page_size,
            query_lens=(1,),
            max_query_len=query_len,
        )


# Each has a split plan of its own: with 20 heads, query tokens of a request are several units on most GPUs; 1200 tokens
# are three pieces of a context whose cuts are fixed; the second has steps of many tokens; the last is one of Gluon's.
MODELS = Model.of(20, 128, 32, 16, 4, 1200), Model.of(6, 128, 32, 16, 24, 700), Model.of(16, 512, 64, 64, 3, 600)
LONGEST = -1  # of Form.uniform: the most query tokens that a request can have


@dataclass(frozen=True)
class Form:
    """How a step is handed over.

    uniform: query tokens of every request, or LONGEST; 0 where each has its own number; tight: max_query_len is the
    longest there is, not the capacity's; padding: rows of q that belong to nobody; spare_columns: unread table columns,
    an odd number also moves the table off its alignment; positions: dtype of the caller's own, None for none.
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

    def __init__(self, model: Model, device: str, seed: int) -> None:
        self.model, self.device, self._rng = model, device, torch.Generator().manual_seed(seed)
        page = (model.shape.page_size, model.shape.row_width)
        self.cache = torch.full((PAGES, *page), torch.nan, dtype=model.shape.q_dtype, device=device)
        self._pool = PagePool(PAGES, model.shape.page_size)
        self._shuffled = torch.randperm(PAGES, generator=self._rng)
        self._born = 0
        self.query_lens: dict[int, int] = {}  # of each request's next step

    def add(self, kv_len: int, query_len: int) -> None:
        """A new request, last of the batch."""
        self._born += 1
        self._pool.allocate(self._born, min(kv_len, self.model.capacity.max_context))
        self.query_lens[self._born] = min(query_len, self.model.capacity.max_query_len)
        self._write(self._born, 0)

    def extend(self, index: int, tokens: int) -> None:
        """More tokens for a request, up to the longest context."""
        request = list(self.query_lens)[index]
        kv_len = self._pool.kv_len(request)
        self._pool.extend(request, min(tokens, self.model.capacity.max_context - kv_len))
        self._write(request, kv_len)

    def mix(self, query_lens: list[int]) -> None:
        """Other query tokens for each request's next step."""
        for request, query_len in zip(self.query_lens, query_lens, strict=False):
            self.query_lens[request] = min(query_len, self.model.capacity.max_query_len)

    def remove(self, index: int) -> None:
        """Free a request's pages and poison them."""
        request = list(self.query_lens)[index]
        self.cache[self._pages(request).to(self.device)] = torch.nan
        self._pool.free(request)
        del self.query_lens[request]

    def step(self, form: Form, most: int = MAX_BATCH) -> Step:
        """The next step of the first `most` requests."""
        shape, capacity = self.model.shape, self.model.capacity
        uniform = capacity.max_query_len if form.uniform == LONGEST else form.uniform
        requests = list(self.query_lens)[:most][:: -1 if form.backwards else 1]
        kv_lens = tuple(self._pool.kv_len(request) for request in requests)
        query_lens = tuple(uniform or self.query_lens[request] for request in requests)
        tokens = sum(query_lens)
        padding = 0 if uniform else min(form.padding, capacity.max_query_tokens - tokens)
        q = torch.randn(tokens + padding, shape.heads, shape.qk_dim, generator=self._rng)
        q[tokens:] = torch.nan
        natural = [max(n - m + i, 0) for n, m in zip(kv_lens, query_lens, strict=True) for i in range(m)]
        positions = torch.tensor(natural if form.positions is None else range(3, 3 + tokens)).long()
        batch = PagedBatch(
            self._table(requests, form.spare_columns),
            self.ints(kv_lens),
            None if uniform else self.ints(query_lens),
            uniform or (max((1, *query_lens)) if form.tight else capacity.max_query_len),
            None if form.positions is None else positions.to(self.device, form.positions),
        )
        expected = torch.zeros(capacity.max_query_tokens, dtype=torch.int32)
        expected[:tokens] = positions
        problem = Problem(
            q.to(self.device, shape.q_dtype), self.cache, batch, shape.latent_dim, self.model.scale, kv_lens, query_lens
        )
        return Step(problem, expected.to(self.device))

    def frame(self, requests: int) -> Problem:
        """Tensors of a captured graph, at fixed addresses, for so many requests: yet without a token."""
        shape, capacity = self.model.shape, self.model.capacity
        width = -(-capacity.max_context // shape.page_size)
        table = torch.full((requests, width), UNREAD_CELL, dtype=torch.int32, device=self.device)
        none = (0,) * requests
        batch = PagedBatch(table, self.ints(none), self.ints(none), capacity.max_query_len)
        q = self.cache.new_full((requests * capacity.max_query_len, shape.heads, shape.qk_dim), torch.nan)
        return Problem(q, self.cache, batch, shape.latent_dim, self.model.scale, none, none)

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
        rows = torch.randn(len(token), self.model.shape.row_width, generator=self._rng).to(self.cache)
        page_size = self.model.shape.page_size
        slots = pages[token // page_size] * page_size + token % page_size
        self.cache.view(-1, self.model.shape.row_width)[slots.to(self.device)] = rows
