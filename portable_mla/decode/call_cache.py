"""PlannedCalls: whether the tensors of a layer's call fit what was planned, and what is remembered of such calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from portable_mla.core.checks import check_cache_row, check_outputs, check_tensors, span_bytes
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import CallMemo
from portable_mla.errors import PlanMismatch
from portable_mla.runtime.kernel_launch import WIDEST

_REMEMBERED = 4096


class PlannedCalls:
    """Calls that fit a request. Tensors whose addresses, shapes and strides were checked need no second check: the
    layers of a model repeat them."""

    def __init__(self, request: Request, refuses: Callable[[Request], tuple[str, ...]]) -> None:
        """refuses: the backend's reasons against a request."""
        self._request, self._refuses = request, refuses
        self._memos: dict[tuple[object, ...], CallMemo] = {}

    def memo(self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, *, ours: bool) -> CallMemo:
        """What is remembered of such calls. ours: out and lse are `result_tensors`' own, which fit any q that does.

        Raises PlanMismatch, TypeError or ValueError for tensors of another model, beyond the capacity, or that a
        kernel could not read or write.
        """
        call = (
            q.shape, q.stride(), q.dtype, q.get_device(), q.data_ptr(),
            kv_cache.shape, kv_cache.stride(), kv_cache.dtype, kv_cache.get_device(), kv_cache.data_ptr(),
            (out.data_ptr() | lse.data_ptr()) % WIDEST if ours else _laid_out(out, lse),
        )  # fmt: skip
        memo = self._memos.get(call)
        if memo is None:
            self._check(q, kv_cache, out, lse)
            if len(self._memos) >= _REMEMBERED:
                self._memos.clear()
            memo = self._memos[call] = CallMemo(q.shape[0], kv_cache.shape[0])
        return memo

    def _check(self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor) -> None:
        shape, capacity = self._request.shape, self._request.capacity
        check_tensors(q, kv_cache)
        for field, planned, got in (
            ("heads", shape.heads, q.shape[1]),
            ("latent + rope", shape.qk_dim, q.shape[2]),
            ("q dtype", shape.q_dtype, q.dtype),
            ("page_size", shape.page_size, kv_cache.shape[1]),
            ("cache dtype", shape.cache_format.dtype, kv_cache.dtype),
        ):
            if planned != got:
                raise PlanMismatch(field, planned, got, "Build an MLAAttention for this shape")
        check_cache_row(kv_cache, shape)
        for field, planned, got in (
            ("max_query_tokens", capacity.max_query_tokens, q.shape[0]),
            ("max_pages", capacity.max_pages, kv_cache.shape[0]),
        ):
            if got > planned:
                raise PlanMismatch(field, planned, got, "Build an MLAAttention with more capacity")
        self._check_span(span_bytes(kv_cache))
        check_outputs(out, lse, shape.latent_dim, {"q": q, "kv_cache": kv_cache})

    def _check_span(self, span: int) -> None:
        """A stated bound holds; without one, a cache whose pages are apart is fine where the backend serves it too."""
        request, capacity = self._request, self._request.capacity
        if span <= request.cache_bytes:
            return
        wider = replace(request, capacity=replace(capacity, cache_bytes=span))
        if capacity.cache_bytes is not None or self._refuses(wider):
            hint = "Build an MLAAttention whose Capacity states cache_bytes"
            raise PlanMismatch("cache_bytes", request.cache_bytes, span, hint)


def _laid_out(out: Tensor, lse: Tensor) -> tuple[object, ...]:
    return (
        out.shape, out.stride(), out.dtype, out.get_device(), out.data_ptr(),
        lse.shape, lse.stride(), lse.dtype, lse.get_device(), lse.data_ptr(),
    )  # fmt: skip
