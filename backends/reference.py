"""The reference: eager torch in float64, the definition of right that every backend is held to."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from portable_mla.core.cache_format import cache_format_of
from portable_mla.core.quantize import dequantise_rows
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import DecodeInputs, PrefillInputs, PrefillRunner, Runner
from portable_mla.metadata import DecodeMetadata, Needs, PagedBatch


def attend(q: Tensor, rows: Tensor, latent_dim: int, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Absorbed attention of one request, in the dtype of its inputs.

    q: [n, heads, latent + rope], the last n tokens of the request; rows: [kv_len, latent + rope].
    Returns out [n, heads, latent] and lse [n, heads], natural log; rows with nothing to see give 0 and -inf.
    """
    scores = torch.einsum("nhd,kd->nhk", q, rows) * softmax_scale
    hidden = _causal_mask(scores)
    weights, lse = _softmax(scores, hidden)
    return _weighted_sum("nhk,kd->nhd", weights, rows[:, :latent_dim], hidden), lse


def attend_unabsorbed(
    q: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The same attention in its expanded form (DeepSeek-V2, 2024): per-head keys and values, then ordinary MHA.

    q: [n, heads, nope + rope]; rows: [kv_len, latent + rope]; w_uk: [heads, nope, latent]; w_uv: [heads, v, latent].
    Returns out [n, heads, v] and lse [n, heads].
    """
    latent_dim = w_uk.shape[2]
    k_nope = torch.einsum("kl,hnl->khn", rows[:, :latent_dim], w_uk)
    value = torch.einsum("kl,hvl->khv", rows[:, :latent_dim], w_uv)
    return attend_expanded(q, k_nope, rows[:, latent_dim:], value, softmax_scale, causal=True)


def attend_expanded(
    q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, softmax_scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence over per-head keys and values, in the dtype of its inputs.

    q: [n, heads, nope + rope], the last n tokens of the sequence; k_nope: [kv_len, heads, nope]; k_pe: [kv_len, rope];
    v: [kv_len, heads, v_dim]. Returns out [n, heads, v_dim] and lse [n, heads].
    """
    nope_dim = k_nope.shape[2]
    scores = torch.einsum("nhd,khd->nhk", q[..., :nope_dim], k_nope)
    scores = (scores + torch.einsum("nhd,kd->nhk", q[..., nope_dim:], k_pe)) * softmax_scale
    hidden = _causal_mask(scores) if causal else None
    weights, lse = _softmax(scores, hidden)
    return _weighted_sum("nhk,khv->nhv", weights, v, hidden), lse


def prefill(
    inputs: PrefillInputs, *, softmax_scale: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Ragged prefill, sequence by sequence, computed in `dtype` from the exact stored values.

    Returns out [tokens, heads, v_dim] and lse [tokens, heads] in `dtype`; rows past the last query token give 0 and
    -inf. Reads lengths on the host.
    """
    q = inputs.q
    out = torch.zeros(*q.shape[:2], inputs.v.shape[2], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    for tokens, keys in zip(_spans(inputs.cu_seqlens_q), _spans(inputs.cu_seqlens_k), strict=True):
        k_nope, k_pe, v = (t[keys].to(dtype) for t in (inputs.k_nope, inputs.k_pe, inputs.v))
        if len(v):
            out[tokens], lse[tokens] = attend_expanded(
                q[tokens].to(dtype), k_nope, k_pe, v, softmax_scale, causal=inputs.causal
            )
    return out, lse


def decode(
    inputs: DecodeInputs,
    batch: PagedBatch,
    *,
    latent_dim: int,
    softmax_scale: float,
    kv_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Paged decode, request by request, computed in `dtype` from the exact stored values.

    Returns out [tokens, heads, latent] and lse [tokens, heads] in `dtype`; rows past the last query token give 0 and
    -inf. Reads lengths on the host.
    """
    q, cache = inputs.q, inputs.kv_cache
    cache_format, page_size = cache_format_of(cache.dtype), cache.shape[1]
    out = torch.zeros(*q.shape[:2], latent_dim, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    kv_lens = batch.kv_lens.tolist()
    query_lens = [batch.max_query_len] * batch.size if batch.query_lens is None else batch.query_lens.tolist()
    start = 0
    for request, (kv_len, query_len) in enumerate(zip(kv_lens, query_lens, strict=True)):
        tokens = slice(start, start + query_len)
        start += query_len
        if kv_len == 0 or query_len == 0:
            continue
        pages = batch.block_table[request, : -(-kv_len // page_size)].long()
        rows = cache[pages].reshape(-1, cache.shape[2])[:kv_len]
        rows = dequantise_rows(rows, cache_format, kv_scale, dtype)
        out[tokens], lse[tokens] = attend(q[tokens].to(dtype), rows, latent_dim, softmax_scale)
    return out, lse


def _causal_mask(scores: Tensor) -> Tensor:
    """[n, keys]: the keys that each query token may not see, of scores [n, heads, keys]; token i of n sees keys <= keys
    - n + i."""
    queries, keys = scores.shape[0], scores.shape[2]
    last_seen = keys - queries + torch.arange(queries, device=scores.device, dtype=torch.int64)
    return torch.arange(keys, device=scores.device, dtype=torch.int64) > last_seen[:, None]


def _softmax(scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and lse [n, heads] of scores [n, heads, keys] without the hidden keys."""
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), lse


def _weighted_sum(equation: str, weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """The sum of each query token over the values that it sees. A hidden value weighs 0, but 0 * NaN is NaN: where a
    value is not finite, the sum of each token is over its own keys alone."""
    if hidden is None or bool(values.isfinite().all()):
        return torch.einsum(equation, weights, values)
    rows = [
        torch.einsum(equation, one[None, :, seen], values[seen]) for one, seen in zip(weights, ~hidden, strict=True)
    ]
    return torch.cat(rows)


def _spans(cu_seqlens: Tensor) -> list[slice]:
    offsets = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(offsets)]


class _ReferenceBackend:
    def reasons_unavailable(self) -> tuple[str, ...]:
        return ()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        return request.unstated()

    def needs(self, request: Request) -> Needs:
        return Needs()

    def bind(self, request: Request) -> Runner | PrefillRunner:
        if request.phase is Phase.prefill:
            return _ReferencePrefill()
        return _ReferenceRunner(request.shape.latent_dim)


class _ReferenceRunner:
    def __init__(self, latent_dim: int) -> None:
        self._latent_dim = latent_dim
        self._batch: PagedBatch | None = None

    @property
    def graph_safe(self) -> bool:
        return False

    def plan(self, metadata: DecodeMetadata) -> None:
        self._batch = metadata.batch

    def memory(self) -> dict[str, int]:
        return {}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        assert self._batch is not None, "run before plan"
        result = decode(
            inputs, self._batch, latent_dim=self._latent_dim, softmax_scale=softmax_scale, kv_scale=kv_scale
        )
        out.copy_(result[0])
        lse.copy_(result[1])


class _ReferencePrefill:
    @property
    def graph_safe(self) -> bool:
        return False

    def memory(self) -> dict[str, int]:
        return {}

    def run(self, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float) -> None:
        result = prefill(inputs, softmax_scale=softmax_scale)
        out.copy_(result[0])
        lse.copy_(result[1])


BACKEND = _ReferenceBackend()
