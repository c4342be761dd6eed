"""AiterRunner: calls mla_decode_fwd over token indices, with a split table of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.library.batch import Step
from portable_mla.backends.library.calls import call, keywords, result
from portable_mla.backends.library.library import Loaded
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.errors import NoBackend
from portable_mla.metadata import DecodeMetadata

NAME = "aiter"
DECODE = "mla_decode_fwd"
METADATA_INFO, METADATA = "aiter.get_mla_metadata_info_v1", "aiter.get_mla_metadata_v1"
LEAST_SPLITS, MOST_SPLITS = 2, 16  # one split takes a shortcut that leaves LSE unwritten
GRANULARITY = 16  # keys by which the persistent kernels' work is cut
WORK = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")


class AiterRunner:
    """Decode with AITER. Never reads the first value that it returns, which is another thing in each of its branches.

    Queries and results are copied where they are not dense or their heads must be padded. One launch of ours copies the
    results and defines rows of requests without keys, where the library leaves NaN.
    """

    def __init__(self, request: Request, loaded: Loaded, heads: int, *, persistent: bool) -> None:
        self._request, self._shape, self._loaded, self._heads = request, request.shape, loaded, heads
        self._decode, self._persistent = loaded.functions[DECODE], persistent
        self._step = Step(request, table=False)
        batch = max(request.capacity.max_batch, 1)
        self._splits = min(max(-(-request.arch.units // batch), LEAST_SPLITS), MOST_SPLITS)
        self._metadata: DecodeMetadata | None = None
        self._buffers: dict[str, Tensor] = {}

    @property
    def graph_safe(self) -> bool:
        """The split table is ours, so the library's cached one is not captured; the persistent kernels have open
        reports of faults in graphs (vllm#47196)."""
        return not self._persistent

    def plan(self, metadata: DecodeMetadata) -> None:
        """Copy lengths to where they stay and, for the persistent kernels, have the library cut the work."""
        if not self._buffers:
            self._buffers = self._allocate(metadata.batch.device)
        self._step.plan(metadata)
        self._metadata = metadata
        if self._persistent:
            self._plan_work(metadata)

    def memory(self) -> dict[str, int]:
        """Bytes of lengths, padded queries and results, and the work; the library allocates partial results itself."""
        return self._step.memory() | {name: tensor.nbytes for name, tensor in self._buffers.items()}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """The library's launches, and one of ours."""
        assert self._metadata is not None and self._metadata.ragged is not None, "run before plan"
        assert kv_scale is None, "refused by dispatch"
        q, cache, heads = inputs.q, inputs.kv_cache, self._shape.heads
        if not cache.is_contiguous():
            raise NoBackend(f"{NAME}: needs a dense kv_cache, got strides {cache.stride()}; triton takes any")
        finish = self._step.finishing(self._heads != heads or not out.is_contiguous(), out, lse)
        if self._step.fit(q) and self._persistent:
            self._plan_work(self._metadata)
        tokens, ragged = q.shape[0], self._metadata.ragged
        batch = tokens // self._request.max_query_len
        queries, rows = self._rows(q, out)
        arguments: dict[str, Any] = {
            "q": queries, "kv_buffer": cache.view(-1, 1, 1, cache.shape[2]), "o": rows,
            "qo_indptr": self._step.of(batch).query_indptr, "kv_indptr": ragged.kv_indptr[: batch + 1],  # type: ignore[index]
            "kv_indices": ragged.kv_indices, "kv_last_page_lens": self._buffers["page lengths"][:batch],
            "max_seqlen_q": self._request.max_query_len, "sm_scale": softmax_scale, "return_lse": True,
        }  # fmt: skip
        if self._persistent:
            arguments |= {name: self._buffers[name] for name in WORK}
        else:
            splits = self._buffers["num_kv_splits_indptr"][: batch + 1]
            arguments |= {"num_kv_splits": self._splits, "num_kv_splits_indptr": splits}
        returned = call(NAME, self._decode, **arguments)
        theirs = result(NAME, "lse", returned[1], (tokens, self._heads), torch.float32)
        copied = None if rows is out else rows[:, :heads].contiguous()
        finish(theirs, (theirs.stride(0), 0, theirs.stride(1)), copied, out, lse)

    def _rows(self, q: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and results as the kernels take them: dense, with the heads that they have."""
        if self._heads == self._shape.heads:
            rows = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
            return q.contiguous(), rows
        queries = self._buffers["padded queries"][: q.shape[0]]
        queries[:, : self._shape.heads].copy_(q)
        return queries, self._buffers["results"][: q.shape[0]]

    def _allocate(self, device: torch.device) -> dict[str, Tensor]:
        """Buffers for any batch of the capacity. Heads that only pad are 0 and stay so."""
        capacity, shape = self._request.capacity, self._shape
        batch, tokens = capacity.max_batch, capacity.max_query_tokens if self._heads != shape.heads else 0
        buffers = {
            "padded queries": torch.zeros(tokens, self._heads, shape.qk_dim, dtype=shape.q_dtype, device=device),
            "results": torch.empty(tokens, self._heads, shape.latent_dim, dtype=shape.q_dtype, device=device),
            "page lengths": torch.ones(batch, dtype=torch.int32, device=device),
            "num_kv_splits_indptr": torch.arange(batch + 1, dtype=torch.int32, device=device) * self._splits,
        }
        if not self._persistent:
            return buffers
        sizes = call(
            NAME, self._loaded.functions[METADATA_INFO], batch_size=batch, max_seqlen_qo=self._request.max_query_len,
            num_head_qo=self._heads, q_dtype=shape.q_dtype, kv_dtype=shape.cache_format.dtype, is_sparse=False,
            fast_mode=True,
        )  # fmt: skip
        work = (torch.empty(size, dtype=dtype, device=device) for size, dtype in sizes)
        return buffers | dict(zip(WORK, work, strict=True))

    def _plan_work(self, metadata: DecodeMetadata) -> None:
        """Cut the work for the query length that the kernels are called with."""
        assert metadata.ragged is not None and metadata.ragged.kv_indptr is not None, "asked for in needs()"
        batch, query_len, shape = metadata.batch.size, self._request.max_query_len, self._shape
        buffers = {("work_metadata_ptrs" if n == "work_meta_data" else n): self._buffers[n] for n in WORK}
        arguments: dict[str, Any] = {
            "seqlens_qo_indptr": self._step.of(batch).query_indptr,
            "seqlens_kv_indptr": metadata.ragged.kv_indptr[: batch + 1],
            "kv_last_page_lens": self._buffers["page lengths"][:batch], "num_heads_per_head_k": self._heads,
            "num_heads_k": 1, "is_causal": True, "kv_granularity": GRANULARITY, "max_seqlen_qo": query_len,
            "uni_seqlen_qo": query_len, "fast_mode": True, "dtype_q": shape.q_dtype,
            "dtype_kv": shape.cache_format.dtype, **buffers,
        }  # fmt: skip
        function = self._loaded.functions[METADATA]
        # Releases differ in these: none of them changes what bfloat16 at one token a page means.
        optional = ("kv_last_page_lens", "dtype_q", "dtype_kv")
        chosen = keywords(NAME, function, arguments, optional=optional, renamed={"work_info_set": "work_info"})
        call(NAME, function, **chosen)
