"""MixedAttention: steps of decodes and prefills, each with a launch and tiles of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portable_mla.core.device import is_capturing, on_device_of
from portable_mla.core.scalars import check_bound
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.decode.api import result_tensors
from portable_mla.decode.attention import MLAAttention
from portable_mla.dispatch.interface import PrefillInputs, prefill_runner
from portable_mla.dispatch.select import Explanation, chosen_backend, explain
from portable_mla.errors import PlanMismatch
from portable_mla.metadata import DecodeBuffers, Limits, Needs, PagedBatch, Status
from portable_mla.mixed.split import MixedSplit, contexts_on_host
from portable_mla.prefill.api import check_prefill_outputs, run_prefill
from portable_mla.prefill.arguments import PrefillArguments
from portable_mla.prefill.cached_context import CachedContext
from portable_mla.prefill.chunked import mla_chunked_prefill
from portable_mla.prefill.context_bounds import poison_rows
from portable_mla.runtime.torch_ops import without_gradients
from portable_mla.settings import Settings


class MixedAttention:
    """Attention of steps that hold decodes and prefills, for any batch within a capacity.

        mixed = MixedAttention(shape, capacity, device="cuda", decode_threshold=1)
        mixed.plan(batch, query_lens)                           # once a step; the scheduler's lengths, on the host
        rows = mixed.split
        for layer in range(layers):                             # q[rows.decode_rows] absorbed, q[rows.prefill_rows] not
            out, lse = mixed.decode(q_absorbed, cache[layer], softmax_scale=scale)
            out, lse = mixed.prefill(q, k_nope, k_pe, v, softmax_scale=scale)

    Requests with at most decode_threshold query tokens are decodes and come first; the step is split once, in `plan`,
    and nothing is copied: both parts are slices. Each part has exactly the bits that it has in a step of its own.
    Offsets live at fixed addresses, and a captured prefill's grid follows from its tokens and sequences alone, so that
    a graph serves any lengths with at most as many of both, the other rows being padding.

    shape states nope_dim and v_dim; capacity covers both parts. absorbed: `prefill_absorbed` serves as well, for
    prefills whose W_UK and W_UV are not at hand. The other arguments and errors are MLAAttention's.
    """

    def __init__(
        self,
        shape: MLAShape,
        capacity: Capacity,
        *,
        device: torch.device | str,
        decode_threshold: int = 1,
        absorbed: bool = False,
        deterministic: bool = False,
        backend: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._settings = settings = Settings.from_env() if settings is None else settings
        if not 1 <= decode_threshold <= capacity.max_query_len:
            raise ValueError(
                f"decode_threshold: expected 1 to {capacity.max_query_len} (max_query_len), got {decode_threshold}"
            )
        self._threshold = decode_threshold
        few = min(capacity.max_query_tokens, capacity.max_batch * decode_threshold)
        attention = functools.partial(
            MLAAttention,
            shape,
            device=device,
            uniform_queries=False,
            deterministic=deterministic,
            backend=backend,
            settings=settings,
        )
        self.decodes = attention(replace(capacity, max_query_len=decode_threshold, max_query_tokens=few))
        self._absorbed = attention(capacity) if absorbed else None
        decode = self.decodes.request
        self.request = Request(
            decode.arch, shape, Phase.prefill, capacity.max_query_len, False, decode.deterministic, capacity
        )
        self._forced = backend or settings.backend
        self.explanation: Explanation = explain(self.request, self._forced, settings.disable)
        self._runner = prefill_runner(chosen_backend(self.explanation), self.request)
        self._status = Status.allocate(self.decodes.device)
        self._offsets = DecodeBuffers(capacity, shape.page_size, Needs(query_indptr=True), self._status)
        self._context_lens = torch.zeros(capacity.max_batch, dtype=torch.int32, device=self.decodes.device)
        self._planned: _Planned | None = None

    @property
    def split(self) -> MixedSplit:
        """Of the latest plan: requests, tokens and slices of both parts."""
        return self._latest().split

    def _latest(self) -> _Planned:
        if self._planned is None:
            raise PlanMismatch("plan", "nothing", "a call", "Call plan(batch, query_lens) first")
        return self._planned

    def memory(self) -> dict[str, int]:
        """Device bytes held from step to step, by part."""
        offsets = sum(tensor.nbytes for part in self._offsets.tensors().values() for tensor in part)
        absorbed = {} if self._absorbed is None else self._absorbed.memory()
        return (
            self.decodes.memory()
            | {f"absorbed prefill: {part}": size for part, size in absorbed.items()}
            | {"prefill offsets": offsets + self._context_lens.nbytes}
        )

    def check(self) -> None:
        """`MLAAttention.check` of both parts. A request of the prefills is counted from the first of them."""
        self.decodes.check()
        capacity, most = self.request.capacity, self.split.longest_prefill
        self._status.check(Limits(capacity.max_pages, capacity.max_context, most, capacity.max_query_tokens))

    def plan(self, batch: PagedBatch, query_lens: Sequence[int]) -> None:
        """Prepare a step whose decodes come first. query_lens: those of the batch, as the scheduler has them.

        Raises ValueError naming the request where a decode comes after a prefill, or where host memory shows a prefill
        of more new tokens than it has in all, and what MLAAttention.plan raises; the step before is then still planned.
        """
        split = MixedSplit.of(query_lens, self._threshold)
        decodes, prefills = split.parts(batch)
        self._check_capacity(batch, split)
        if batch.device.type == "cpu" or (self._settings.debug and not is_capturing(batch.kv_lens)):
            _check_values(batch, prefills, query_lens, self.request)
        contexts = contexts_on_host(prefills, query_lens[split.decode_requests :])
        if self._absorbed is not None:
            self._absorbed.check_batch(prefills)
        self.decodes.check_batch(decodes)
        if self._absorbed is not None:
            self._absorbed.plan_checked(prefills)
        self.decodes.plan_checked(decodes)  # a part without requests too: a captured graph may hold its launch
        with on_device_of(batch.kv_lens):
            ragged = self._offsets.update(prefills, self.request.capacity.max_pages).ragged
        assert ragged is not None and prefills.query_lens is not None
        torch.sub(prefills.kv_lens, prefills.query_lens, out=self._context_lens[: prefills.size])
        self._context_lens[prefills.size :].zero_()
        self._planned = _Planned(split, prefills.block_table, ragged.query_indptr, contexts)

    def _check_capacity(self, batch: PagedBatch, split: MixedSplit) -> None:
        capacity = self.request.capacity
        for field, planned, got in (
            ("max_batch", capacity.max_batch, batch.size),
            ("max_query_tokens", capacity.max_query_tokens, split.decode_tokens + split.prefill_tokens),
            ("max_query_len", capacity.max_query_len, split.longest_prefill),
        ):
            if got > planned:
                raise PlanMismatch(field, planned, got, "Build a MixedAttention with more capacity")

    def longest_context(self) -> int:
        """Upper bound of what a prefill of the latest plan has in the cache before its new tokens.

        Exact where lengths are on the host: in host memory, or as the batch's kv_lens_on_host. Else it waits for the
        device, once a step; while a graph is captured it is what the capacity allows, since a replay may have any.
        """
        planned = self._latest()
        requests = planned.split.prefill_requests
        if not requests:
            return 0
        if self._in_capture():
            table = planned.block_table.shape[1] * self.request.shape.page_size
            return max(min(self.request.capacity.max_context, table) - self._threshold - 1, 0)
        if planned.contexts is None:
            self._planned = planned = replace(planned, contexts=tuple(self._context_lens[:requests].tolist()))
        assert planned.contexts is not None
        return max(0, *planned.contexts)

    def _in_capture(self) -> bool:
        return is_capturing(self._context_lens)

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        softmax_scale: float,
        kv_scale: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The decodes of one layer: q [decode_tokens, heads, latent + rope] -> out [decode_tokens, heads, latent]."""
        return self.decodes(q, kv_cache, out, lse, softmax_scale=softmax_scale, kv_scale=kv_scale)

    @without_gradients("out", "lse")
    def prefill(
        self,
        q: Tensor,
        k_nope: Tensor,
        k_pe: Tensor,
        v: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        softmax_scale: float,
        context: CachedContext | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prefills of one layer: the new tokens' q [prefill_tokens, heads, nope + rope], k_nope, k_pe and v ->
        out [prefill_tokens, heads, v_dim] and lse, as in `mla_prefill`; over a cached `context` too where given."""
        planned = self._latest()
        offsets = planned.cu_seqlens[: planned.split.prefill_requests + 1]
        inputs = PrefillInputs(q, k_nope, k_pe, v, offsets, offsets)
        longest = self.request.capacity.max_query_len
        if context is not None:
            return mla_chunked_prefill(
                q, k_nope, k_pe, v, offsets, offsets, context,
                max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=softmax_scale, backend=self._forced,
                deterministic=self.request.deterministic, out=out, lse=lse,
            )  # fmt: skip
        arguments = PrefillArguments(inputs, longest, longest, softmax_scale)
        if not self._in_capture() and (cached := planned.longer_than(0)):
            raise ValueError(f"context: {cached}; expected MixedAttention.context(...), got None")
        out, lse = result_tensors(q, v.shape[2], out, lse)
        check_prefill_outputs(inputs, out, lse)
        run_prefill(self._runner, inputs, out, lse, softmax_scale=arguments.softmax_scale)
        if q.device.type != "cpu":  # the scheduler's lengths need not be the device's
            lens = self._context_lens[: planned.split.prefill_requests]
            poison_rows(lens, offsets, out, lse, max_len=0, max_tokens=0, status=self._status.words)
        return out, lse

    def prefill_absorbed(
        self,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        softmax_scale: float,
        kv_scale: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prefills of one layer against the latent cache, which holds their new tokens too: q [prefill_tokens,
        heads, latent + rope] -> out [prefill_tokens, heads, latent]. About 3.4 times the work of `prefill`."""
        if self._absorbed is None:
            raise ValueError("prefill_absorbed: expected a MixedAttention built with absorbed=True, got False")
        return self._absorbed(q, kv_cache, out, lse, softmax_scale=softmax_scale, kv_scale=kv_scale)

    def context(
        self,
        kv_cache: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        *,
        max_len: int | None = None,
        kv_scale: float | Tensor | None = None,
    ) -> CachedContext:
        """What the prefills of the latest plan have in a layer's cache before their new tokens. max_len: at most, if
        unsaid `longest_context`. Raises ValueError naming the request where lengths on the host are over it."""
        planned = self._latest()
        lens = self._context_lens[: planned.split.prefill_requests]
        max_len = self.longest_context() if max_len is None else check_bound("max_len", max_len)
        max_tokens = None
        if planned.contexts is not None and not self._in_capture():
            if over := planned.longer_than(max_len):
                raise ValueError(f"max_len: {over}, got {max_len}")
            max_tokens = sum(planned.contexts)
        return CachedContext(
            kv_cache, planned.block_table, lens, max_len, w_uk, w_uv, max_tokens, kv_scale, self._status.words
        )


@dataclass(frozen=True)
class _Planned:
    split: MixedSplit
    block_table: Tensor  # [prefills, width] int32
    cu_seqlens: Tensor  # [max_batch + 1] int32: where the new tokens of each prefill begin
    contexts: tuple[int, ...] | None  # of each prefill, where they are known on the host

    def longer_than(self, bound: int) -> str | None:
        """The first prefill whose context is known to be over the bound, in words; None where there is none."""
        for request, length in enumerate(self.contexts or (), self.split.decode_requests):
            if length > bound:
                return f"request {request} has {length} tokens in the cache before its new ones"
        return None


def _check_values(batch: PagedBatch, prefills: PagedBatch, query_lens: Sequence[int], request: Request) -> None:
    """Lengths and page ids by value, and that the host's lengths are the device's."""
    assert batch.query_lens is not None
    if batch.query_lens.tolist() != list(query_lens):
        raise ValueError(
            f"query_lens: expected those of the batch, {batch.query_lens.tolist()}, got {list(query_lens)}"
        )
    capacity = request.capacity
    prefills.check_values(request.shape.page_size, capacity.max_pages, capacity.max_query_tokens)
    first = batch.size - prefills.size
    for index, (kv_len, n) in enumerate(zip(prefills.kv_lens.tolist(), query_lens[first:], strict=True), first):
        if kv_len < n:
            raise ValueError(f"kv_lens: request {index}: expected at least its {n} new tokens, got {kv_len}")
