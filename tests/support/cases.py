"""Case: a small description of a decode problem (numbers and a seed, never tensor contents), and the Problem built
from it. Unread cache slots are poisoned, unread table cells hold 2**31 - 1, pages are shuffled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from portable_mla import PagedBatch
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.quantize import quantise_rows
from portable_mla.dispatch.interface import DecodeInputs

UNREAD_CELL = 2**31 - 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GARBAGE = ("nan", "inf", "hot", "zero")


@dataclass(frozen=True)
class Case:
    """One decode problem. query_lens None: uniform, max_query_len tokens a request; padding: query rows past the last
    request's; spare_columns: unread table columns."""

    kv_lens: tuple[int, ...]
    heads: int = 4
    latent_dim: int = 512
    rope_dim: int = 64
    page_size: int = 16
    dtype: str = "bf16"
    query_lens: tuple[int, ...] | None = None
    max_query_len: int = 1
    content: str = "iid"
    garbage: str = "nan"
    padding: int = 0
    spare_columns: int = 1
    seed: int = 0
    cache: str = ""  # name of a quantised CacheFormat; "": dtype's own

    def repro(self) -> str:
        """A command that runs this case alone."""
        return f"python -m tests.support.repro '{json.dumps(asdict(self))}'"

    @classmethod
    def of(cls, text: str) -> Case:
        """The case that `repro` printed."""
        values = json.loads(text)
        for name in ("kv_lens", "query_lens"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


@dataclass(frozen=True)
class Problem:
    """A case's tensors on a device, with its lengths as host values."""

    q: Tensor
    kv_cache: Tensor
    batch: PagedBatch
    latent_dim: int
    softmax_scale: float
    kv_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    kv_scale: Tensor | None = None
    allowance: float = 1.0  # times the errors that a backend is allowed

    @property
    def inputs(self) -> DecodeInputs:
        """What a runner takes."""
        return DecodeInputs(self.q, self.kv_cache)

    @property
    def tokens(self) -> int:
        """Query tokens that belong to a request."""
        return sum(self.query_lens)

    def with_cache(self, kv_cache: Tensor) -> Problem:
        """The same problem over another cache tensor."""
        return replace(self, kv_cache=kv_cache)

    def with_q(self, q: Tensor) -> Problem:
        """The same problem with other queries."""
        return replace(self, q=q)

    def with_table(self, block_table: Tensor) -> Problem:
        """The same problem with another page table."""
        return replace(self, batch=replace(self.batch, block_table=block_table))

    def first(self, requests: int) -> Problem:
        """The first requests of a problem with a uniform batch."""
        batch, tokens = self.batch, requests * self.batch.max_query_len
        fewer = PagedBatch(batch.block_table[:requests], batch.kv_lens[:requests], None, batch.max_query_len)
        lens = self.kv_lens[:requests], self.query_lens[:requests]
        return replace(self, q=self.q[:tokens], batch=fewer, kv_lens=lens[0], query_lens=lens[1])

    def only(self, request: int) -> Problem:
        """One request of the problem, alone."""
        start = sum(self.query_lens[:request])
        batch, n = self.batch, self.query_lens[request]
        one = slice(request, request + 1)
        query_lens = None if batch.query_lens is None else batch.query_lens[one]
        alone = PagedBatch(batch.block_table[one], batch.kv_lens[one], query_lens, batch.max_query_len)
        return replace(
            self, q=self.q[start : start + n], batch=alone, kv_lens=self.kv_lens[one], query_lens=self.query_lens[one]
        )


def build(case: Case, device: torch.device | str = "cpu") -> Problem:
    """The case's tensors."""
    rng = torch.Generator().manual_seed(case.seed)
    query_lens = case.query_lens or (case.max_query_len,) * len(case.kv_lens)
    width = max(1, *(math.ceil(n / case.page_size) for n in case.kv_lens)) if case.kv_lens else 1
    pages = sum(math.ceil(n / case.page_size) for n in case.kv_lens) + 2
    free = torch.randperm(pages, generator=rng).tolist()
    table = torch.full((len(case.kv_lens), width + case.spare_columns), UNREAD_CELL, dtype=torch.int32)
    dtype, dim = DTYPES[case.dtype], case.latent_dim + case.rope_dim
    q = torch.randn(sum(query_lens) + case.padding, case.heads, dim, generator=rng)
    cache = _garbage(case, (pages, case.page_size, dim))
    for request, kv_len in enumerate(case.kv_lens):
        start = sum(query_lens[:request])
        mine = slice(start, start + query_lens[request])
        rows = CONTENTS[case.content](case, kv_len, q[mine], rng)
        own = [free.pop() for _ in range(math.ceil(kv_len / case.page_size))]
        table[request, : len(own)] = torch.tensor(own, dtype=torch.int32)
        if case.garbage == "hot" and query_lens[request]:
            cache[own + free] = q[start, 0] * 2
        for index, page in enumerate(own):
            part = rows[index * case.page_size : (index + 1) * case.page_size]
            cache[page, : len(part)] = part
    lens = torch.tensor(case.kv_lens, dtype=torch.int32, device=device)
    ragged = None if case.query_lens is None else torch.tensor(query_lens, dtype=torch.int32, device=device)
    batch = PagedBatch(table.to(device), lens, ragged, case.max_query_len)
    scale = 0.125 if case.content in EXACT else dim**-0.5 * 1.35  # not 1/sqrt(d): a wrong default must show
    stored, kv_scale = cache.to(dtype), None
    if case.cache:
        kv_scale = torch.tensor((0.03, 1.0, 7.0)[case.seed % 3] / 64) if CacheFormat[case.cache].needs_scale else None
        stored = quantise_rows(cache, CacheFormat[case.cache], kv_scale)
    return Problem(
        q.to(device, dtype), stored.to(device), batch, case.latent_dim, scale, case.kv_lens, tuple(query_lens),
        None if kv_scale is None else kv_scale.to(device),
    )  # fmt: skip


def _garbage(case: Case, shape: tuple[int, ...]) -> Tensor:
    """Unread slots. "hot" is finite and has larger logits than any valid token; `build` points it along the query."""
    return torch.full(shape, {"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "hot": 50.0}[case.garbage])


Content = Callable[[Case, int, Tensor, torch.Generator], Tensor]


def _iid(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    sigma = (0.25, 1.0, 2.0)[case.seed % 3]
    return torch.randn(kv_len, case.latent_dim + case.rope_dim, generator=rng) * sigma


def _needle(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """A token at a boundary that the first query token's first head attends to almost alone."""
    rows = torch.randn(kv_len, case.latent_dim + case.rope_dim, generator=rng) * 0.1
    edges = [0, kv_len - 1, min(case.page_size, kv_len) - 1, min(64, kv_len - 1), max(0, kv_len - case.page_size)]
    if kv_len and len(q):
        q.copy_(q[:1, :1] + 0.1 * torch.randn(q.shape, generator=rng))
        rows[edges[case.seed % len(edges)]] += q[0, 0] * 0.5
    return rows


def _split_skew(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """All mass within one stretch of 64 tokens."""
    rows = torch.randn(kv_len, case.latent_dim + case.rope_dim, generator=rng) * 0.3
    if kv_len and len(q):
        q.copy_(q[:1, :1] + 0.1 * torch.randn(q.shape, generator=rng))
        first = (case.seed * 64) % kv_len
        rows[first : first + 64] += q[0, 0] * 0.2
    return rows


def _heavy(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """A token in the middle that outweighs those at both ends, and all others none."""
    dim = case.latent_dim + case.rope_dim
    rows = torch.randn(kv_len, dim, generator=rng)
    q.zero_()
    q[..., -2:] = 1
    rows[:, -2:] = torch.tensor([-200.0, 0.0])
    rows[:1, -2] = rows[-1:, -2] = 0
    rows[kv_len // 2 : kv_len // 2 + 1, -2:] = torch.tensor(heavy_logit(dim))
    return rows


def heavy_logit(dim: int) -> tuple[float, float]:
    """Two values of a key, multiplied with ones in q, whose token has 2**5 * 1.0035 times the weight of one with zeros:
    rounding that to bfloat16 loses nearly as much as it can. dim: what `build` makes its scale of."""
    wanted = math.log2(2**5 * 1.0035) * math.log(2) / (dim**-0.5 * 1.35)
    return float(int(wanted)), wanted - int(wanted)


def _extreme(sign: float) -> Content:
    """Logits near +-1e5, exact in float32, so that only a finite stand-in for infinity can go wrong."""

    def rows(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
        q.zero_()
        q[..., -1] = 1024
        rows = torch.randn(kv_len, case.latent_dim + case.rope_dim, generator=rng)
        rows[:, -1] = sign * 768
        return rows

    return rows


def _ties(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(1, case.latent_dim + case.rope_dim, generator=rng).expand(kv_len, -1)


def _fingerprint(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """Latents that differ between pages alone, so that a page read twice or not at all shows."""
    rows = _iid(case, kv_len, q, rng)
    pages = torch.arange(kv_len) // case.page_size
    rows[:, : case.latent_dim] = (pages % 61 - 30)[:, None] * torch.randn(case.latent_dim, generator=rng)
    return rows


def _exact_grid(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """Multiples of 1/8, whose sums are exact in bfloat16."""
    q.copy_((q * 8).round().clamp(-8, 8) / 8)
    return torch.randint(-8, 9, (kv_len, case.latent_dim + case.rope_dim), generator=rng) / 8


def _subnormal(case: Case, kv_len: int, q: Tensor, rng: torch.Generator) -> Tensor:
    """Rope values below the smallest normal number; they must neither trap nor become NaN."""
    rows = _iid(case, kv_len, q, rng)
    rows[:, case.latent_dim :] = torch.finfo(DTYPES[case.dtype]).tiny / 4
    return rows


CONTENTS: dict[str, Content] = {
    "iid": _iid,
    "needle": _needle,
    "split_skew": _split_skew,
    "heavy": _heavy,
    "neg_extreme": _extreme(-1.0),
    "pos_extreme": _extreme(1.0),
    "ties": _ties,
    "fingerprint": _fingerprint,
    "exact_grid": _exact_grid,
    "subnormal": _subnormal,
}
EXTREME = ("neg_extreme", "pos_extreme")
EXACT = (*EXTREME, "exact_grid")
