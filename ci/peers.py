"""Peers: what this library's decode is compared with, over the problems of contenders.py.

planned: whether each call plans its step first, where a library has a plan that calls of a step can share.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ci.contenders import DEVICE, LATENT, PAGE_SIZE, ROPE, SCALE, Calls, Problem, rule_splits
from portable_mla import arch_of


def vllm(problem: Problem, splits: int | None = None) -> Calls:
    """vLLM's Triton MLA decode."""
    from vllm.v1.attention.ops import triton_decode_attention  # type: ignore[import-not-found]

    batch, heads, _ = problem.q.shape
    assert problem.batch.max_query_len == 1, "it takes one query token a request"
    splits = splits or rule_splits(max(problem.kv_lens), arch_of(DEVICE).units)
    out, lse = problem.outputs()
    lse = lse.to(torch.bfloat16)
    partial = torch.empty(batch, heads, splits, LATENT + 1, dtype=torch.float32, device=DEVICE)
    one = torch.ones((), device=DEVICE)

    def call(cache: Tensor) -> Tensor:
        rows = cache.view(-1, PAGE_SIZE, 1, LATENT + ROPE)
        triton_decode_attention.decode_attention_fwd(
            problem.q, rows, rows[..., :LATENT], out, lse, problem.batch.block_table, problem.batch.kv_lens, partial,
            splits, SCALE, PAGE_SIZE, k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out

    return [lambda c=c: call(c) for c in problem.caches]


def flash_mla(problem: Problem, *, planned: bool = False) -> Calls:
    """The flash_mla package (sgl-flash-mla), which plans in the first call of a schedule."""
    import flash_mla as library  # type: ignore[import-not-found]

    batch, queries = problem.batch, _by_request(problem)
    schedule = library.get_mla_metadata()[0]

    def call(cache: Tensor) -> Tensor:
        out: Tensor = library.flash_mla_with_kvcache(
            queries, cache[:, :, None], batch.block_table, batch.kv_lens, LATENT,
            library.get_mla_metadata()[0] if planned else schedule, None, SCALE, batch.max_query_len > 1,
            use_legacy=True,
        )[0]  # fmt: skip
        return out

    return [lambda c=c: call(c) for c in problem.caches]


def vllm_flash_mla(problem: Problem, *, planned: bool = False) -> Calls:
    """FlashMLA as vLLM builds it."""
    importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")  # registers the operator
    batch, queries = problem.batch, _by_request(problem)
    lens, table, causal = batch.kv_lens, batch.block_table, batch.max_query_len > 1

    def decode(cache: Tensor, *schedule: Tensor | None) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops._flashmla_C.dense_decode_fwd(
            queries, cache[:, :, None], LATENT, lens, table, SCALE, causal, *schedule, None
        )
        return found

    schedule = (None, None) if planned else decode(problem.caches[0], None, None)[2:4]
    return [lambda c=c: decode(c, *schedule)[0] for c in problem.caches]


def flash_attn3(problem: Problem, *, planned: bool = False) -> Calls:
    """FlashAttention-3 as vLLM builds it, the latent part of Q as its q_v; a call without a schedule makes its own."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata  # type: ignore[import-not-found]

    batch, heads = problem.batch, problem.q.shape[1]
    rope, latent = (part.contiguous() for part in (problem.q[..., LATENT:], problem.q[..., :LATENT]))
    query_len, longest = batch.max_query_len, max(problem.kv_lens)
    starts = torch.arange(0, problem.q.shape[0] + 1, query_len, dtype=torch.int32, device=DEVICE)

    schedule = None if planned else get_scheduler_metadata(
        len(problem.kv_lens), query_len, longest, heads, 1, ROPE, batch.kv_lens, problem.q.dtype, LATENT, starts,
        page_size=PAGE_SIZE, causal=True,
    )  # fmt: skip

    def call(cache: Tensor) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q=rope, k=cache[:, :, None, LATENT:], v=cache[:, :, None, :LATENT], q_v=latent, cu_seqlens_q=starts,
            max_seqlen_q=query_len, max_seqlen_k=longest, seqused_k=batch.kv_lens, block_table=batch.block_table,
            softmax_scale=SCALE, causal=True, scheduler_metadata=schedule, fa_version=3,
        )  # fmt: skip
        return out

    return [lambda c=c: call(c) for c in problem.caches]


def flashinfer(problem: Problem, *, planned: bool = False) -> Calls:
    """FlashInfer's MLA wrapper, whose plan is made on the host, which no graph can capture."""
    import flashinfer as library  # type: ignore[import-not-found]

    batch, (tokens, heads, _) = problem.batch, problem.q.shape
    pages = torch.tensor([-(-n // PAGE_SIZE) for n in problem.kv_lens], dtype=torch.int32, device=DEVICE)
    indptr = torch.zeros(len(problem.kv_lens) + 1, dtype=torch.int32, device=DEVICE)
    indptr[1:] = pages.cumsum(0)
    indices = torch.cat([row[:n] for row, n in zip(batch.block_table, pages.tolist(), strict=True)])
    starts = torch.arange(0, tokens + 1, batch.max_query_len, dtype=torch.int32, device=DEVICE)
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE), backend="fa3"
    )  # fmt: skip

    def plan() -> None:
        wrapper.plan(
            starts, indptr, indices, batch.kv_lens, heads, LATENT, ROPE, PAGE_SIZE, batch.max_query_len > 1, SCALE,
            torch.bfloat16, torch.bfloat16,
        )  # fmt: skip

    plan()
    latent, rope = (part.contiguous() for part in (problem.q[..., :LATENT], problem.q[..., LATENT:]))

    def call(cache: Tensor) -> Tensor:
        if planned:
            plan()
        out: Tensor = wrapper.run(latent, rope, cache[..., :LATENT], cache[..., LATENT:])
        return out

    return [lambda c=c: call(c) for c in problem.caches]


def _by_request(problem: Problem) -> Tensor:
    """q [requests, query tokens, heads, width]."""
    return problem.q.unflatten(0, (len(problem.kv_lens), problem.batch.max_query_len))
