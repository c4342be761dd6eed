"""The reference: eager torch in float64, the definition of right that every backend is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from portable_mla.backend import DecodeInputs, Runner
from portable_mla.cache_format import cache_format_of, dequantise_rows
from portable_mla.metadata import DecodeMetadata, Needs, PagedBatch
from portable_mla.shape import Phase, Request


def attend(q: Tensor, rows: Tensor, latent_dim: int, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Absorbed attention of one request, in the dtype of its inputs.

    q: [n, heads, latent + rope], the last n tokens of the request; rows: [kv_len, latent + rope].
    Returns out [n, heads, latent] and lse [n, heads], natural log; rows with nothing to see give 0 and -inf.
    """
    scores = torch.einsum("nhd,kd->nhk", q, rows) * softmax_scale
    scores = scores.masked_fill(_hidden(q.shape[0], rows.shape[0], q.device)[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("nhk,kd->nhd", weights, rows[:, :latent_dim]), lse


def attend_unabsorbed(
    q: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The same attention in its expanded form (DeepSeek-V2, 2024): per-head keys and values, then ordinary MHA.

    q: [n, heads, nope + rope]; rows: [kv_len, latent + rope]; w_uk: [heads, nope, latent]; w_uv: [heads, v, latent].
    Returns out [n, heads, v] and lse [n, heads].
    """
    latent_dim, nope_dim = w_uk.shape[2], w_uk.shape[1]
    k_nope = torch.einsum("kl,hnl->khn", rows[:, :latent_dim], w_uk)
    value = torch.einsum("kl,hvl->khv", rows[:, :latent_dim], w_uv)
    scores = torch.einsum("nhd,khd->nhk", q[..., :nope_dim], k_nope)
    scores = (scores + torch.einsum("nhd,kd->nhk", q[..., nope_dim:], rows[:, latent_dim:])) * softmax_scale
    scores = scores.masked_fill(_hidden(q.shape[0], rows.shape[0], q.device)[:, None, :], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("nhk,khv->nhv", weights, value), lse


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


def _hidden(queries: int, keys: int, device: torch.device) -> Tensor:
    """[queries, keys] bool: True where a query token must not see a position (causal, aligned to the end)."""
    last_seen = keys - queries + torch.arange(queries, device=device)
    return torch.arange(keys, device=device)[None, :] > last_seen[:, None]


class _ReferenceBackend:
    def reasons_unavailable(self) -> tuple[str, ...]:
        return ()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        return () if request.phase is Phase.decode else (f"needs phase decode, got {request.phase.value}",)

    def needs(self, request: Request) -> Needs:
        return Needs()

    def bind(self, request: Request) -> Runner:
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


BACKEND = _ReferenceBackend()
