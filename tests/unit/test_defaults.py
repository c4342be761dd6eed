"""torch's default dtype and default device: results have the same bits under any."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import (
    CacheFormat,
    Capacity,
    LayerGeometry,
    LayerStep,
    MixedAttention,
    MLAAttention,
    MLALayer,
    MLAShape,
    PagedLatentCache,
    merge_state,
    merge_states,
    mla_chunked_prefill,
    mla_decode,
    mla_prefill,
    rope_table,
    write_latent,
)
from portable_mla.core.rope import Yarn
from tests.contract.test_chunked_prefill import chunked
from tests.contract.test_layer import table
from tests.support.cases import Case, build
from tests.support.prefill_cases import PrefillCase
from tests.support.prefill_cases import build as build_prefill
from tests.support.write_cases import CASES

Results = tuple[Tensor, ...]
PROBLEM = build(Case((33, 5, 70), heads=5, query_lens=(1, 2, 3), max_query_len=4, padding=1))
PREFILL = build_prefill(PrefillCase((3, 1, 40), (8, 10, 300), 3, (8, 4, 6), padding=2))
CHUNKED = chunked(PrefillCase((3, 1, 2), (8, 10, 17), 3, (8, 4, 6), padding=0), "cpu")
PARTS = torch.randn(3, 4, 2, 6), torch.randn(3, 4, 2)
WRITES = [case.build() for case in CASES]
HIDDEN = torch.randn(9, 48)
PLAIN = LayerGeometry(48, 4, 32, 8, 16, 16, 0.2)


def decode(backend: str) -> Results:
    """One call."""
    p, b = PROBLEM, PROBLEM.batch
    options = {"query_lens": b.query_lens, "max_query_len": 4, "backend": backend}
    scale = p.softmax_scale
    return mla_decode(p.q, p.kv_cache, b.block_table, b.kv_lens, softmax_scale=scale, latent_dim=512, **options)  # type: ignore[arg-type]


def planned(backend: str) -> Results:
    """A plan and a call."""
    p = PROBLEM
    shape = MLAShape(5, 512, 64, 16, torch.bfloat16, CacheFormat.bf16)
    attention = MLAAttention(
        shape, Capacity(3, 9, 4, 128, 99), device="cpu", uniform_queries=False, backend=backend
    )  # fmt: skip
    attention.plan(p.batch)
    return (*attention(p.q, p.kv_cache, softmax_scale=p.softmax_scale), attention.positions.clone())


def prefill(backend: str) -> Results:
    """One call."""
    i = PREFILL.inputs
    return mla_prefill(
        i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k,
        max_seqlen_q=40, max_seqlen_k=300, softmax_scale=0.2, backend=backend,
    )  # fmt: skip


def context(backend: str) -> Results:
    """A prefill over a cached context."""
    i = CHUNKED.new.inputs
    return mla_chunked_prefill(
        i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k, CHUNKED.context,
        max_seqlen_q=3, max_seqlen_k=3, softmax_scale=0.2, backend=backend,
    )  # fmt: skip


def merged(_: str) -> Results:
    """Both merges."""
    outs, lses = PARTS
    return (*merge_states(outs, lses), *merge_state(outs[0], lses[0], outs[1], lses[1]))


def written(_: str) -> Results:
    """The caches of every kind of write."""
    calls = copy.deepcopy(WRITES)
    for call in calls:
        q = call.q_pe if call.q_source is None else call.q_source
        write_latent(
            call.kv_cache, call.slots, call.c_kv, call.k_pe, norm_weight=call.norm_weight, eps=call.eps,
            positions=call.positions, cos_sin=call.cos_sin, rope_layout=call.rope_layout, kv_scale=call.kv_scale,
            q_pe=q, q_pe_out=None if call.q_source is None else call.q_pe, rows_out=call.rows,
        )  # fmt: skip
    return tuple(call.kv_cache.view(torch.uint8) for call in calls)


def tables(_: str) -> Results:
    """RoPE's tables."""
    return rope_table(99, 16), rope_table(99, 16, yarn=Yarn(40.0, 32))


def layer(_: str) -> Results:
    """Two chunks through a layer and its cache."""
    torch.manual_seed(0)
    module = MLALayer(PLAIN, dtype=torch.float32, device="cpu")
    for parameter in module.parameters():
        values = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float32, device="cpu")
        parameter.data.copy_(values.view_as(parameter))
    shape = PLAIN.shape(torch.float32, CacheFormat.fp32, page_size=4)
    mixed, cache, rows = MixedAttention(shape, Capacity(2, 16, 16, 32, 8), device="cpu"), PagedLatentCache(shape, 8), []
    cache.allocate("r", 0)
    for start, stop in ((0, 5), (5, 9)):
        cache.extend("r", stop - start)
        batch = cache.batch(["r"], query_lens=[stop - start], max_query_len=stop - start)
        mixed.plan(batch, [stop - start])
        step = LayerStep.of(mixed, batch, stop - start, table(PLAIN, "cpu"))
        rows.append(module(HIDDEN[start:stop], cache[0], step))
    return (*rows, cache.slots("r", 0, 9))


ENTRIES: tuple[Callable[[str], Results], ...] = (decode, planned, prefill, context, merged, written, tables, layer)
DEFAULTS: tuple[Any, ...] = (torch.bfloat16, torch.float16, torch.float64, "meta")


@contextmanager
def default(value: Any) -> Iterator[None]:
    """A default dtype, or a default device."""
    if isinstance(value, str):
        with torch.device(value):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", DEFAULTS, ids=str)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_a_default_of_torchs_changes_no_bit(entry: Callable[[str], Results], value: Any, backend: str) -> None:
    expected = entry(backend)
    with default(value):
        got = entry(backend)
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
