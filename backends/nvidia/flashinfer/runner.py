"""Runners over FlashInfer: its planned wrapper over page indices, and its single call over a page table."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends.library.batch import Step
from portable_mla.backends.library.calls import call, call_with, result, wide, wide_cache
from portable_mla.backends.library.library import Loaded
from portable_mla.core.checks import span_bytes
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.errors import BackendError, NoBackend
from portable_mla.metadata import DecodeMetadata

NAME = "flashinfer"
WRAPPER = "BatchMLAPagedAttentionWrapper"
TABLE_CALL = "trtllm_batch_decode_with_kv_cache_mla"
WORKSPACE_BYTES = 128 << 20
MOST_OFFSET = 2**32  # elements. 0.6.14's fa3 on an H100: rows beyond were wrong, rows beyond 2**31 right
NOPE_DIM = 128  # of the models that the geometry belongs to; the call asks for it and does not use it


class WrapperRunner:
    """Decode with the wrapper and its kernel fa2 or fa3, over our page indices, which it reads in place.

    Its plan copies row pointers and lengths to the host and waits for them, so that neither a graph nor an overlap
    survives a step; it also wants the softmax scale, so the first step is planned in its first call. Having waited, the
    plan also reads which rows see keys: where all do and lse is dense, the library writes all results. Elsewhere there
    is one launch beside the library's, which defines rows that it does not write.
    """

    def __init__(self, request: Request, loaded: Loaded, kernel: str) -> None:
        self._shape, self._kernel, self._loaded = request.shape, kernel, loaded
        self._tokens, self._causal = request.capacity.max_query_tokens, request.max_query_len > 1
        self._structured = loaded.takes(f"{WRAPPER}.plan", "metadata")  # 0.7; 0.6 has flat arguments
        self._step = Step(request, table=False)
        self._metadata: DecodeMetadata | None = None
        self._wrapper: Any = None
        self._workspace: Tensor | None = None
        self._lse: Tensor | None = None
        self._widths = [request.shape.latent_dim, request.shape.rope_dim]
        self._attend: Callable[..., Any]
        self._scale: float | None = None
        self._stale = True
        self._seeing = 0  # leading rows of the step that see keys

    @property
    def graph_safe(self) -> bool:
        """The library's plan reads lengths on the host."""
        return False

    def plan(self, metadata: DecodeMetadata) -> None:
        """Describe the step, and have the library plan it, which waits for the device."""
        if self._wrapper is None:
            device = metadata.batch.device
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._lse = torch.empty(self._tokens, self._shape.heads, dtype=torch.float32, device=device)
            self._wrapper = call(
                NAME, self._loaded.functions[WRAPPER], float_workspace_buffer=self._workspace, backend=self._kernel
            )
            self._attend = functools.partial(self._wrapper.run, return_lse=True, return_lse_base_on_e=True)
        self._step.plan(metadata)
        self._metadata, self._stale = metadata, True
        if self._scale is not None:
            self._plan(self._scale)

    def memory(self) -> dict[str, int]:
        """Bytes of the workspace, the lengths and LSE."""
        own = sum(tensor.nbytes for tensor in (self._workspace, self._lse) if tensor is not None)
        return self._step.memory() | {"library workspace": own}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """The library's launches, and one of ours where they leave rows unwritten."""
        assert self._metadata is not None and self._lse is not None, "run before plan"
        assert kv_scale is None, "refused by dispatch"
        copied_q = inputs.remembered
        if copied_q is None:
            copied_q = self._checked(inputs, out)
        cache, q = inputs.kv_cache, inputs.q.contiguous() if copied_q else inputs.q
        if self._step.fit(q) or self._stale or softmax_scale != self._scale:
            self._plan(softmax_scale)
        tokens = q.shape[0]
        done = tokens <= self._seeing and lse.is_contiguous()  # by the library alone
        finish = None if done else self._step.finishing(False, out, lse)
        theirs = lse if done else self._lse[:tokens]
        queries, keys = torch.split_with_sizes(q, self._widths, -1), torch.split_with_sizes(cache, self._widths, -1)
        arguments: dict[str, Any] = {"out": out, "lse": theirs}
        if self._structured:
            arguments["query"], arguments["kv_cache"] = queries, keys
        else:
            arguments["q_nope"], arguments["q_pe"] = queries
            arguments["ckv_cache"], arguments["kpe_cache"] = keys
        returned = call_with(NAME, self._attend, arguments)
        if returned[0] is not out:
            rows = result(NAME, "out", returned[0], out.shape, q.dtype)
            if rows.data_ptr() != out.data_ptr():
                raise BackendError(f"{NAME}: returned another tensor than the out that it was given")
        result(NAME, "lse", returned[1], lse.shape, torch.float32)
        if finish is not None:
            finish(theirs, (theirs.stride(0), 0, 1), None, out, lse)

    def _checked(self, inputs: DecodeInputs, out: Tensor) -> bool:
        """Whether q must be copied, remembered for calls that are alike; NoBackend for tensors that are not read
        right."""
        cache, copied_q = wide_cache(NAME, inputs.kv_cache), not wide(inputs.q)
        for name, tensor in (("kv_cache", cache), ("q", inputs.q), ("out", out)):
            reach = tensor.nbytes if copied_q and name == "q" else span_bytes(tensor)
            if reach > MOST_OFFSET * tensor.element_size():
                raise NoBackend(
                    f"{NAME}: needs all of {name} within {MOST_OFFSET} elements of its first, got strides "
                    f"{tensor.stride()} of shape {tuple(tensor.shape)}; triton takes any"
                )
        inputs.remember(copied_q)
        return copied_q

    def _plan(self, softmax_scale: float) -> None:
        metadata, shape = self._metadata, self._shape
        assert metadata is not None and metadata.ragged is not None, "asked for in needs()"
        batch, ragged = metadata.batch.size, metadata.ragged
        assert ragged.kv_indptr is not None and ragged.kv_indices is not None, "asked for in needs()"
        form = {
            "qo_indptr": self._step.of(batch).query_indptr, "kv_indptr": ragged.kv_indptr[: batch + 1],
            "kv_indices": ragged.kv_indices, "kv_len_arr": self._step.of(batch).kv_lens,
        }  # fmt: skip
        arguments: dict[str, Any] = {
            "num_heads": shape.heads, "head_dim_ckv": shape.latent_dim, "head_dim_kpe": shape.rope_dim,
            "page_size": shape.page_size, "causal": self._causal, "sm_scale": softmax_scale,
            "q_data_type": shape.q_dtype, "kv_data_type": shape.cache_format.dtype,
        }  # fmt: skip
        if self._structured:
            arguments |= {"query_layout": "split", "kv_cache_layout": "split", "lse_mode": "basee"}
            arguments["metadata"] = call(NAME, _structured_metadata(), **form)
        else:
            arguments |= form
        call(NAME, self._wrapper.plan, **arguments)
        self._seeing = self._step.rows_that_see()
        self._scale, self._stale = softmax_scale, False


class TableRunner:
    """Decode with the kernels that read a page table; nothing is planned on the host.

    LSE comes in base 2 and is converted by our launch.
    """

    def __init__(self, request: Request, loaded: Loaded, kernel: str) -> None:
        self._shape, self._query_len = request.shape, request.max_query_len
        self._tokens = request.capacity.max_query_tokens
        self._step = Step(request, table=True, natural_per_unit=math.log(2))
        self._decode = functools.partial(
            loaded.functions[TABLE_CALL], qk_nope_head_dim=NOPE_DIM, kv_lora_rank=request.shape.latent_dim,
            qk_rope_head_dim=request.shape.rope_dim, max_seq_len=self._step.width * request.shape.page_size,
            bmm2_scale=1.0, backend=kernel, return_lse=True,
        )  # fmt: skip
        self._workspace: Tensor | None = None
        self._lse: Tensor | None = None
        self._lse_rows: dict[int, Tensor] = {}  # views of it

    @property
    def graph_safe(self) -> bool:
        """Lengths and the page table are read on the device alone."""
        return True

    def plan(self, metadata: DecodeMetadata) -> None:
        """Copy table and lengths to where they stay."""
        if self._workspace is None:
            device = metadata.batch.device
            # Its semaphores must be 0 at first.
            self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._lse = torch.empty(self._tokens, self._shape.heads, dtype=torch.float32, device=device)
        self._step.plan(metadata)

    def memory(self) -> dict[str, int]:
        """Bytes of the workspace, the table, the lengths and LSE."""
        own = sum(tensor.nbytes for tensor in (self._workspace, self._lse) if tensor is not None)
        return self._step.memory() | {"library workspace": own}

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """The library's launches, and one of ours."""
        assert self._lse is not None, "run before plan"
        assert kv_scale is None, "refused by dispatch"
        query_len = self._query_len
        cache, q = wide_cache(NAME, inputs.kv_cache), inputs.q.contiguous()
        in_place = out.is_contiguous()
        finish = self._step.finishing(not in_place, out, lse)
        self._step.fit(q)
        tokens, heads, latent_dim = out.shape
        if tokens not in self._lse_rows:
            self._lse_rows[tokens] = self._lse[:tokens]
        batch, theirs = tokens // query_len, self._lse_rows[tokens]
        step = self._step.of(batch)
        own = out if in_place else torch.empty_like(out, memory_format=torch.contiguous_format)
        arguments = {
            "query": q.view(batch, query_len, heads, -1), "kv_cache": cache, "workspace_buffer": self._workspace,
            "block_tables": step.table, "seq_lens": step.kv_lens, "out": own.view(batch, query_len, heads, latent_dim),
            "bmm1_scale": softmax_scale, "lse": theirs,
        }  # fmt: skip
        returned = call_with(NAME, self._decode, arguments)
        result(NAME, "lse", returned[1], lse.shape, torch.float32)
        finish(theirs, (heads, 0, 1), None if in_place else own, out, lse)


def _structured_metadata() -> Any:
    """The constructor of 0.7's plan metadata from row pointers and indices."""
    for module in ("flashinfer.mla", "flashinfer.mla._batch_mla"):
        found = getattr(importlib.import_module(module), "MLAPlanMetadata", None)
        if found is not None:
            return found.csr
    raise BackendError(f"{NAME}: its plan takes metadata, but flashinfer.mla has no MLAPlanMetadata")
