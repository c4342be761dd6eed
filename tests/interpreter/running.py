"""Decode a case with the Triton backend in the interpreter: with a forced tile, or with an architecture's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Capacity, Request
from portable_mla.decode.arguments import DecodeArguments
from portable_mla.dispatch.select import load
from portable_mla.metadata import DecodeBuffers, Needs, Status
from tests.support.acceptance import Errors, check
from tests.support.cases import Case, Problem, build

SMALL: dict[str, Any] = {"latent_dim": 128, "rope_dim": 32}
MIDDLE: dict[str, Any] = {"latent_dim": 256, "rope_dim": 32}
TILE = Tile(block_h=16, block_n=16, num_warps=4, num_stages=2, min_tokens=32)
DESCRIPTOR = replace(TILE, loads="descriptor")
WIDE = replace(TILE, block_h=64, block_n=32)
MANY_PARTS = replace(WIDE, programs_per_unit=8)  # many splits on the few units that combine as for many rows


def request_of(problem: Problem, arch: str, units: int) -> Request:
    """The tightest request that the problem fits, on an architecture with so many SMs or CUs."""
    arguments = DecodeArguments(
        problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale, problem.kv_scale
    )  # fmt: skip
    return replace(arguments.request(deterministic=False), arch=replace(ARCHS[arch], units=units))


def decode(problem: Problem, runner: TritonRunner, status: Status | None = None) -> tuple[Tensor, Tensor]:
    """Plan and run, into results full of NaN."""
    q = problem.q
    out = torch.full((*q.shape[:2], problem.latent_dim), torch.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:2], torch.nan)
    shape, pages = runner.plan_shape, problem.kv_cache.shape[0]
    capacity = Capacity(
        shape.max_batch, shape.max_tokens, shape.max_query_len, shape.max_context, pages, cache_bytes=0
    )  # fmt: skip
    status = status or Status.allocate(q.device)
    buffers = DecodeBuffers(capacity, problem.kv_cache.shape[1], Needs(split_plan=shape), status)
    runner.plan(buffers.update(problem.batch, pages))
    runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale, kv_scale=problem.kv_scale)
    return out, lse


def solve_with_tile(case: Case, tile: Tile, units: int, arch: str = "sm90") -> Errors:
    """Decode with this tile and hold the result to the acceptance rule."""
    problem = build(case)
    return check(problem, *decode(problem, TritonRunner(request_of(problem, arch, units), tile)))


def solve_as(arch: str, case: Case, units: int) -> Errors:
    """Decode with the tile that the backend chooses for this architecture, and hold the result to the rule."""
    problem = build(case)
    request = request_of(problem, arch, units)
    backend = load("triton", request.arch.vendor)
    assert not backend.reasons_unsupported(request)
    runner = backend.bind(request)
    assert isinstance(runner, TritonRunner)
    assert backend.needs(request) == Needs(split_plan=runner.plan_shape)
    return check(problem, *decode(problem, runner))
