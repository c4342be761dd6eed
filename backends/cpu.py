"""The CPU backend: batched torch with an online softmax over chunks of keys, computed in float32.

In a decode, requests of similar length form a slab; a slab walks its context chunk by chunk, so that the gathered rows
stay in cache, nothing is padded to the longest request, and no partial result is rounded below float32. A prefill walks
blocks of one sequence's query tokens, for all heads at once. A hidden key weighs 0, but 0 * NaN is NaN: results that
are NaN though their sums are not are computed again, without hidden values that are not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.quantize import dequantise_rows
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import DecodeInputs, PrefillInputs, PrefillRunner, Runner
from portable_mla.metadata import DecodeMetadata, Needs, PagedBatch

# Measured on 2 cores (AVX-512), batch 8 x 16 heads x 4096, milliseconds for bf16 / fp16 / fp32: 13.3 / 12.4 / 14.0;
# the best of chunk {128, 256, 512} x slab {1, 2, 4, 8} is 13.3 / 11.7 / 13.0, and slab 1 takes 25 to 28.
CHUNK_TOKENS = 256
SLAB_REQUESTS = 8
PREFILL_TOKENS = 128  # query tokens of a block; chunks of keys are CHUNK_TOKENS


class _CpuBackend:
    def reasons_unavailable(self) -> tuple[str, ...]:
        return ()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        reasons = () if request.arch.vendor == "cpu" else (f"needs a CPU, got {request.arch.name}",)
        return reasons + request.unstated()

    def needs(self, request: Request) -> Needs:
        return Needs()

    def bind(self, request: Request) -> Runner | PrefillRunner:
        if request.phase is Phase.prefill:
            return CpuPrefill()
        # A request that is computed alone, in chunks of a fixed size, has the same bits in any batch.
        return CpuRunner(request, slab_requests=1 if request.deterministic else SLAB_REQUESTS)


class _Softmax:
    """An online softmax over chunks of keys, in float32. rows: leading dimensions of the scores; width: of a value."""

    def __init__(self, rows: tuple[int, int], width: int) -> None:
        self._maximum = torch.full(rows, -torch.inf, dtype=torch.float32, device="cpu")
        self._total = torch.zeros(rows, dtype=torch.float32, device="cpu")
        self._acc = torch.zeros(*rows, width, dtype=torch.float32, device="cpu")

    def fold(self, scores: Tensor, values: Tensor, seen: Tensor | None = None) -> None:
        """Take in one chunk for the first rows. scores: [n, rows, keys], overwritten; values: [n, keys, width]; seen:
        bool, broadcast to scores, where a value that is not finite may only reach the rows that see its key."""
        n = len(scores)
        if seen is not None:
            finite = values.isfinite()
            reached = torch.matmul(seen.float(), (~finite).float()) > 0
            self._acc[:n].masked_fill_(reached, torch.nan)
            values = values.masked_fill(~finite, 0.0)
        higher = torch.maximum(self._maximum[:n], scores.amax(dim=-1))
        finite = higher.masked_fill(higher == -torch.inf, 0.0)
        weights = scores.sub_(finite[..., None]).exp_()
        rescale = torch.exp(self._maximum[:n] - finite)
        self._maximum[:n] = higher
        self._total[:n].mul_(rescale).add_(weights.sum(dim=-1))
        self._acc[:n].mul_(rescale[..., None]).baddbmm_(weights, values)

    def results(self) -> tuple[Tensor, Tensor]:
        """out [*rows, width] and lse [*rows]."""
        out = self._acc.div_(self._total.masked_fill(self._total == 0, 1.0)[..., None])
        return out, self._maximum.add_(torch.log(self._total))


def _hidden_value_leaked(out: Tensor, lse: Tensor) -> bool:
    """Whether a row's output is NaN though its scores, those of the keys that it sees, are not."""
    return bool((out.isnan().any(dim=-1) & ~lse.isnan()).any())


@dataclass(frozen=True)
class _Slab:
    """Requests computed together, longest first."""

    pages: Tensor  # [requests, width] int64, 0 where a request has no page
    kv_lens: Tensor  # [requests] int64
    tokens: Tensor  # [requests, query_len] int64: rows of q, 0 where a request has fewer
    has_token: Tensor  # [requests, query_len] bool
    last_seen: Tensor  # [requests, query_len] int64: last position that a query token sees

    def active(self, start: int) -> int:
        """Requests, a prefix, that have a token at or after `start`."""
        return int((self.kv_lens > start).sum())


class CpuRunner:
    """Decode on the CPU for one request shape; `chunk_tokens` is rounded to whole pages."""

    def __init__(
        self, request: Request, *, chunk_tokens: int = CHUNK_TOKENS, slab_requests: int = SLAB_REQUESTS
    ) -> None:
        self._shape, self._slab_requests = request.shape, slab_requests
        self._chunk_pages = max(1, chunk_tokens // request.shape.page_size)
        self._slabs: tuple[_Slab, ...] = ()

    @property
    def graph_safe(self) -> bool:
        return False

    def memory(self) -> dict[str, int]:
        return {}

    def plan(self, metadata: DecodeMetadata) -> None:
        batch = metadata.batch
        query_lens = batch.query_lens
        if query_lens is None:
            query_lens = torch.full_like(batch.kv_lens, batch.max_query_len)
        starts = torch.cumsum(query_lens, 0) - query_lens
        order = torch.argsort(batch.kv_lens, descending=True, stable=True)
        order = order[(batch.kv_lens[order] > 0) & (query_lens[order] > 0)]
        self._slabs = tuple(
            self._slab(batch, query_lens.long()[chosen], starts[chosen], chosen)
            for chosen in order.split(self._slab_requests)
            if len(chosen)
        )

    def _slab(self, batch: PagedBatch, query_lens: Tensor, starts: Tensor, chosen: Tensor) -> _Slab:
        kv_lens = batch.kv_lens[chosen].long()
        page_size = self._shape.page_size
        width = -(-int(kv_lens[0]) // page_size)
        has_page = torch.arange(width, dtype=torch.int64, device="cpu") * page_size < kv_lens[:, None]
        pages = batch.block_table[chosen, :width].long().masked_fill(~has_page, 0)
        step = torch.arange(int(query_lens.max()), dtype=torch.int64, device="cpu")
        has_token = step < query_lens[:, None]
        tokens = (starts[:, None] + step).masked_fill(~has_token, 0)
        last_seen = (kv_lens - query_lens)[:, None] + step
        return _Slab(pages, kv_lens, tokens, has_token, last_seen)

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        out.zero_()
        lse.fill_(-torch.inf)
        for slab in self._slabs:
            slab_out, slab_lse = self._attend(slab, inputs, softmax_scale, kv_scale)
            if slab.tokens.shape[1] > 1 and _hidden_value_leaked(slab_out, slab_lse):
                slab_out, slab_lse = self._attend(slab, inputs, softmax_scale, kv_scale, isolated=True)
            tokens = slab.tokens[slab.has_token]
            out[tokens] = slab_out[slab.has_token].to(out.dtype)
            lse[tokens] = slab_lse[slab.has_token]

    def _attend(
        self,
        slab: _Slab,
        inputs: DecodeInputs,
        softmax_scale: float,
        kv_scale: Tensor | None,
        *,
        isolated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """out [requests, query_len, heads, latent] and lse [requests, query_len, heads], both float32.

        isolated: hidden values may be NaN or infinite.
        """
        requests, query_len = slab.tokens.shape
        heads, latent_dim = self._shape.heads, self._shape.latent_dim
        q = inputs.q[slab.tokens].float().mul_(softmax_scale).view(requests, query_len * heads, -1)
        last_seen = slab.last_seen.repeat_interleave(heads, dim=1)
        softmax = _Softmax((requests, query_len * heads), latent_dim)
        chunk = self._chunk_pages * self._shape.page_size
        for start in range(0, int(slab.kv_lens[0]), chunk):
            n = slab.active(start)
            rows = self._gather(slab, inputs.kv_cache, kv_scale, start, n)
            scores = torch.bmm(q[:n], rows.transpose(1, 2))
            position = torch.arange(start, start + rows.shape[1], dtype=torch.int64, device="cpu")
            seen = None
            if start + rows.shape[1] > int(last_seen[:n].min()) + 1:
                seen = position <= last_seen[:n, :, None]
                scores.masked_fill_(~seen, -torch.inf)
            softmax.fold(scores, rows[..., :latent_dim], seen if isolated else None)
        out, lse = softmax.results()
        return out.view(requests, query_len, heads, latent_dim), lse.view(requests, query_len, heads)

    def _gather(self, slab: _Slab, cache: Tensor, kv_scale: Tensor | None, start: int, n: int) -> Tensor:
        """[n, tokens, latent + rope] float32: the chunk at `start` of the first n requests, zero past their ends."""
        first = start // self._shape.page_size
        pages = slab.pages[:n, first : first + self._chunk_pages]
        stored = cache.index_select(0, pages.reshape(-1))
        rows = dequantise_rows(stored, self._shape.cache_format, kv_scale, torch.float32)
        rows = rows.view(n, -1, self._shape.qk_dim)
        if start + rows.shape[1] > int(slab.kv_lens[n - 1]):
            position = torch.arange(start, start + rows.shape[1], dtype=torch.int64, device="cpu")
            rows.masked_fill_((position >= slab.kv_lens[:n, None])[..., None], 0.0)
        return rows


class CpuPrefill:
    """Prefill on the CPU. A sequence's bits do not depend on the others."""

    @property
    def graph_safe(self) -> bool:
        return False

    def memory(self) -> dict[str, int]:
        return {}

    def run(self, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float) -> None:
        out.zero_()
        lse.fill_(-torch.inf)
        offsets_q, offsets_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
        for index in range(inputs.sequences):
            keys = slice(offsets_k[index], offsets_k[index + 1])
            k_nope, k_pe, v = inputs.k_nope[keys], inputs.k_pe[keys], inputs.v[keys]
            end = offsets_q[index + 1]
            for start in range(offsets_q[index], end, PREFILL_TOKENS):
                tokens = slice(start, min(start + PREFILL_TOKENS, end))
                last_seen = torch.tensor(len(v) - 1, dtype=torch.int64, device="cpu")
                if inputs.causal:
                    last_seen = len(v) - end + torch.arange(tokens.start, tokens.stop, dtype=torch.int64, device="cpu")
                q = (inputs.q[tokens].float() * softmax_scale).transpose(0, 1)
                block, block_lse = self._attend(q, k_nope, k_pe, v, last_seen)
                if inputs.causal and _hidden_value_leaked(block, block_lse):
                    block, block_lse = self._attend(q, k_nope, k_pe, v, last_seen, isolated=True)
                out[tokens], lse[tokens] = block.transpose(0, 1).to(out.dtype), block_lse.T

    def _attend(
        self, q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, last_seen: Tensor, *, isolated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """out [heads, n, v_dim] and lse [heads, n] of scaled queries [heads, n, nope + rope]; last_seen: [n] or [].

        isolated: hidden values may be NaN or infinite.
        """
        nope_dim = k_nope.shape[2]
        softmax = _Softmax((q.shape[0], q.shape[1]), v.shape[2])
        for start in range(0, int(last_seen.max()) + 1, CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            scores = torch.bmm(q[..., :nope_dim], k_nope[chunk].float().permute(1, 2, 0))
            scores += q[..., nope_dim:] @ k_pe[chunk].float().T
            position = torch.arange(start, start + scores.shape[2], dtype=torch.int64, device="cpu")
            seen = position <= last_seen[..., None]
            scores.masked_fill_(~seen, -torch.inf)
            softmax.fold(scores, v[chunk].float().transpose(0, 1), seen if isolated else None)
        return softmax.results()


BACKEND = _CpuBackend()
