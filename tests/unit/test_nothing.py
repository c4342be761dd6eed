"""Steps without pages, tokens, requests or sequences, through every entry point: defined results or a clear error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from portable_mla import (
    CachedContext,
    CacheFormat,
    Capacity,
    MixedAttention,
    MLAAttention,
    MLAShape,
    PagedBatch,
    PagedLatentCache,
    merge_states,
    mla_chunked_prefill,
    mla_decode,
    mla_prefill,
    rope_table,
    write_latent,
)
from tests.support.targets import Target, local_targets

HEADS, LATENT, ROPE, PAGE = 16, 512, 64, 64
NOPE, V_DIM = 128, 128
LANES = ["eager", "captured"]
DEVICES = sorted({target.device for target in local_targets()})


def ints(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def values(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def assert_nothing_seen(out: Tensor, lse: Tensor, shape: tuple[int, ...]) -> None:
    assert out.shape == shape
    assert lse.shape == shape[:2]
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())


# requests, width of the table, pages of the cache, query tokens
SIZES = [(0, 0, 0, 0), (0, 3, 2, 0), (3, 0, 2, 3), (3, 0, 0, 3), (3, 2, 0, 3), (3, 2, 2, 0), (3, 0, 0, 0), (0, 0, 2, 4)]


@pytest.mark.parametrize(("requests", "width", "pages", "tokens"), SIZES)
def test_a_decode_of_nothing(target: Target, requests: int, width: int, pages: int, tokens: int) -> None:
    device = target.device
    table = torch.full((requests, width), 2**31 - 1, dtype=torch.int32, device=device)
    lens = torch.zeros(requests, dtype=torch.int32, device=device)
    query_lens = None if tokens == requests else torch.zeros_like(lens)
    out, lse = mla_decode(
        values(device, tokens, HEADS, LATENT + ROPE), values(device, pages, PAGE, LATENT + ROPE), table, lens,
        softmax_scale=0.1, latent_dim=LATENT, query_lens=query_lens, backend=target.backend,
    )  # fmt: skip
    assert_nothing_seen(out, lse, (tokens, HEADS, LATENT))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("requests", "width", "pages", "tokens"), SIZES)
def test_a_planned_decode_of_nothing(
    target: Target, requests: int, width: int, pages: int, tokens: int, lane: str
) -> None:
    device, shape = target.device, MLAShape(HEADS, LATENT, ROPE, PAGE, torch.bfloat16, CacheFormat.bf16)
    attention = MLAAttention(
        shape, Capacity(4, 4, 1, 128, 8), device=device, backend=target.backend, uniform_queries=tokens == requests
    )
    if lane == "captured" and not (target.has_kernels and target.backend != "flashinfer"):
        pytest.skip(f"{target} is in no graph")
    table = torch.full((requests, width), 2**31 - 1, dtype=torch.int32, device=device)
    query_lens = None if tokens == requests else torch.zeros(requests, dtype=torch.int32, device=device)
    batch = PagedBatch(table, torch.zeros(requests, dtype=torch.int32, device=device), query_lens)
    q, cache = values(device, tokens, HEADS, LATENT + ROPE), values(device, pages, PAGE, LATENT + ROPE)
    out = torch.full((tokens, HEADS, LATENT), torch.nan, dtype=torch.bfloat16, device=device)
    lse = torch.full((tokens, HEADS), torch.nan, dtype=torch.float32, device=device)
    attention.plan(batch)
    attention(q, cache, out, lse, softmax_scale=0.1)
    if lane == "captured":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attention(q, cache, out, lse, softmax_scale=0.1)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
    assert_nothing_seen(out, lse, (tokens, HEADS, LATENT))


# query tokens and keys of each sequence
LENGTHS = [((), ()), ((0,), (0,)), ((0, 0), (3, 0)), ((2, 1), (0, 0)), ((0, 3), (70, 0))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_a_prefill_of_nothing(
    prefill_target: Target, queries: tuple[int, ...], keys: tuple[int, ...], causal: bool
) -> None:
    device, tokens, rows = prefill_target.device, sum(queries), sum(keys)
    out, lse = mla_prefill(
        values(device, tokens, HEADS, NOPE + ROPE), values(device, rows, HEADS, NOPE), values(device, rows, ROPE),
        values(device, rows, HEADS, V_DIM), offsets(device, queries), offsets(device, keys),
        max_seqlen_q=max(queries, default=0), max_seqlen_k=max(keys, default=0), softmax_scale=0.1, causal=causal,
        backend=prefill_target.backend,
    )  # fmt: skip
    assert_nothing_seen(out, lse, (tokens, HEADS, V_DIM))


@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("pages", [0, 2])
@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_chunked_prefill_without_context(
    prefill_target: Target, width: int, pages: int, sequences: int, tokens: int
) -> None:
    device = prefill_target.device
    lengths = (tokens, *[0] * (sequences - 1))[:sequences]
    tokens = sum(lengths)
    context = CachedContext(
        values(device, pages, PAGE, LATENT + ROPE),
        torch.full((sequences, width), 2**31 - 1, dtype=torch.int32, device=device),
        torch.zeros(sequences, dtype=torch.int32, device=device), 0,
        values(device, HEADS, NOPE, LATENT), values(device, HEADS, V_DIM, LATENT),
    )  # fmt: skip
    new = (
        values(device, tokens, HEADS, NOPE + ROPE), values(device, tokens, HEADS, NOPE), values(device, tokens, ROPE),
        values(device, tokens, HEADS, V_DIM), offsets(device, lengths), offsets(device, lengths),
    )  # fmt: skip
    options = {"max_seqlen_q": tokens, "max_seqlen_k": tokens, "softmax_scale": 0.1, "backend": prefill_target.backend}
    out, lse = mla_chunked_prefill(*new, context, **options)  # type: ignore[arg-type]
    plain, plain_lse = mla_prefill(*new, **options)  # type: ignore[arg-type]
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("cache_format", [CacheFormat.bf16, CacheFormat.fp8_656])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (0, 2), (3, 0)])
def test_a_write_of_nothing(device: str, tokens: int, pages: int, cache_format: CacheFormat) -> None:
    shape = MLAShape(HEADS, LATENT, ROPE, PAGE, torch.bfloat16, cache_format)
    cache = torch.full((pages, PAGE, shape.row_width), 7, device=device).to(cache_format.dtype)
    q_pe = values(device, tokens, HEADS, ROPE)
    rotated = torch.full_like(q_pe, torch.nan)
    write_latent(
        cache, torch.full((tokens,), -1, dtype=torch.int32, device=device), values(device, tokens, LATENT),
        values(device, tokens, ROPE), cos_sin=rope_table(8, ROPE, device=device),
        positions=torch.zeros(tokens, dtype=torch.int32, device=device), q_pe=q_pe, q_pe_out=rotated,
    )  # fmt: skip
    assert bool((cache == 7).all())
    assert torch.equal(rotated, q_pe)


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        PagedLatentCache(MLAShape(HEADS, LATENT, ROPE, PAGE, torch.bfloat16, CacheFormat.bf16), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_and_a_mixed_step_of_nothing(device: str) -> None:
    shape = MLAShape(HEADS, LATENT, ROPE, PAGE, torch.bfloat16, CacheFormat.bf16, NOPE, V_DIM)
    cache = PagedLatentCache(shape, 2, device=device)
    cache.storage.zero_()
    cache.write(0, ints(device), values(device, 0, LATENT + ROPE))
    cache.write(0, ints(device, -1), values(device, 1, LATENT + ROPE))
    assert not bool(cache.storage.any())
    mixed = MixedAttention(shape, Capacity(2, 8, 4, 64, 4), device=device)
    for requests in ([], ["idle"]):
        for one in requests:
            cache.allocate(one, 0)
        batch = cache.batch(requests, query_lens=[0] * len(requests), max_query_len=1)
        mixed.plan(batch, [0] * len(requests))
        assert mixed.longest_context() == 0
        assert (mixed.split.decode_requests, mixed.split.decode_tokens) == (len(requests), 0)
        out, lse = mixed.decode(values(device, 0, HEADS, LATENT + ROPE), cache[0], softmax_scale=0.1)
        assert_nothing_seen(out, lse, (0, HEADS, LATENT))


@pytest.mark.parametrize("device", DEVICES)
def test_a_merge_of_nothing(device: str) -> None:
    outs = torch.zeros(2, 0, HEADS, LATENT, dtype=torch.bfloat16, device=device)
    out, lse = merge_states(outs, torch.zeros(2, 0, HEADS, dtype=torch.float32, device=device))
    assert (out.shape, lse.shape) == ((0, HEADS, LATENT), (0, HEADS))


def offsets(device: str, lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
