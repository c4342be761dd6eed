"""Target: one backend on one device of this machine; every contract test runs on all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from portable_mla import Request, UnsupportedDevice, arch_of, explain, mla_decode, select
from portable_mla.backends import reference
from portable_mla.core.arch import Arch
from portable_mla.decode.arguments import DecodeArguments
from portable_mla.dispatch.interface import LibraryBackend, decode_runner
from portable_mla.dispatch.registry import ORDER
from portable_mla.dispatch.select import load
from portable_mla.metadata import DecodeBuffers, Status
from tests.support import acceptance
from tests.support.cases import EXTREME, Case, Problem, build
from tests.support.environment import TILES, asked

# Vendors' libraries, measured on an H100: those that the acceptance rule finds worse than a good kernel, and by how
# much. Of logits near 1e5 all three lose up to 2**-7 of a row, since they scale scores and subtract the maximum in one
# operation, and FlashInfer gives -inf as the LSE of those below -5e4: such data is not asked of them.
LIBRARY_ALLOWANCE = {"flashinfer": 1.4}


@dataclass(frozen=True)
class Target:
    """A backend and the device that it runs on. tiles: another architecture's, in place of the device's."""

    device: str
    backend: str
    tiles: str = ""

    def __str__(self) -> str:
        tiles = f"-with-{self.tiles}-tiles" if self.tiles else ""
        return f"{self.backend}{tiles}-on-{self.device}"

    @property
    def arch(self) -> Arch:
        """What dispatch is asked for."""
        local = arch_of(self.device)
        if not self.tiles:
            return local
        from ci.tile_override import arch_with_tiles_of

        return arch_with_tiles_of(self.tiles, local)

    @property
    def of_a_library(self) -> bool:
        """Whether a vendor's library computes, whose refusals are many."""
        return isinstance(load(self.backend, arch_of(self.device).vendor), LibraryBackend)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels on a GPU compute: neither a CPU nor the reference."""
        return self.device != "cpu" and self.backend != "reference"

    def accepts(self, case: Case, *, deterministic: bool = False) -> bool:
        """Whether the backend serves the case, by its own word, and keeps to the rule over such data."""
        if case.content in EXTREME and self.of_a_library:
            return False
        problem = build(Case(**{**vars(case), "kv_lens": (0,) * len(case.kv_lens)}), self.device)
        return explain(self.request(problem, deterministic=deterministic), self.backend).chosen is not None

    def request(self, problem: Problem, *, deterministic: bool = False) -> Request:
        """What dispatch is asked."""
        arguments = DecodeArguments(
            problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale, problem.kv_scale
        )
        return replace(arguments.request(deterministic), arch=self.arch)

    def build(self, case: Case) -> Problem:
        """The case on the target's device, with what the backend is allowed."""
        return replace(build(case, self.device), allowance=LIBRARY_ALLOWANCE.get(self.backend, 1.0))

    def run(self, problem: Problem, *, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Decode into results full of NaN."""
        q = problem.q
        out = torch.full((*q.shape[:2], problem.latent_dim), torch.nan, dtype=q.dtype, device=q.device)
        lse = torch.full(q.shape[:2], torch.nan, dtype=torch.float32, device=q.device)
        return self.run_into(problem, out, lse, deterministic=deterministic)

    def run_into(
        self, problem: Problem, out: Tensor, lse: Tensor, *, deterministic: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Decode into the given results."""
        if self.tiles:
            return run_bound(self.backend, self.request(problem, deterministic=deterministic), problem, out, lse)
        batch = problem.batch
        return mla_decode(
            problem.q,
            problem.kv_cache,
            batch.block_table,
            batch.kv_lens,
            softmax_scale=problem.softmax_scale,
            latent_dim=problem.latent_dim,
            kv_scale=problem.kv_scale,
            query_lens=batch.query_lens,
            max_query_len=batch.max_query_len,
            deterministic=deterministic,
            backend=self.backend,
            out=out,
            lse=lse,
        )

    def run_as(self, problem: Problem, **changes: Any) -> tuple[Tensor, Tensor]:
        """Decode with a runner bound to the problem's request, changed: another `arch`, say."""
        request = replace(self.request(problem), **changes)
        out = torch.full_like(problem.q[..., : problem.latent_dim], torch.nan)
        lse = torch.full(problem.q.shape[:2], torch.nan, device=problem.q.device)
        return run_bound(self.backend, request, problem, out, lse)

    def solve(self, case: Case) -> tuple[Problem, Tensor, Tensor]:
        """Build the case, decode it and hold the result to the acceptance rule."""
        problem = self.build(case)
        out, lse = self.run(problem)
        acceptance.check(problem, out, lse)
        return problem, out, lse

    def golden(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The reference's float64 answer."""
        return reference.decode(
            problem.inputs, problem.batch, latent_dim=problem.latent_dim, softmax_scale=problem.softmax_scale,
            kv_scale=problem.kv_scale,
        )  # fmt: skip


def run_bound(backend_name: str, request: Request, problem: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Decode with a runner bound to the request."""
    backend = select(request, backend_name)
    runner = decode_runner(backend, request)
    capacity = request.capacity
    buffers = DecodeBuffers(
        capacity, request.shape.page_size, backend.needs(request), Status.allocate(problem.q.device)
    )  # fmt: skip
    runner.plan(buffers.update(problem.batch, capacity.max_pages))
    runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale, kv_scale=problem.kv_scale)
    return out, lse


def is_here(backend: str, device: str) -> bool:
    """Whether this machine's software can run a backend; only libraries may be missing."""
    found = load(backend, arch_of(device).vendor)
    return not isinstance(found, LibraryBackend) or not (found.reasons_unavailable() or found.reasons_not_loadable())


def local_targets() -> tuple[Target, ...]:
    """Every registered backend on every kind of device of this machine, without libraries that are not installed; or
    the portable kernels with the tiles that PORTABLE_MLA_TEST_TILES names."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if tiles := asked(TILES):
        return (Target(devices[-1], "triton", tiles),)
    found = []
    for device in devices:
        try:
            order = ORDER[arch_of(device).name]
            found += [Target(device, backend) for backend in order if is_here(backend, device)]
        except UnsupportedDevice:
            continue
    return tuple(found)
