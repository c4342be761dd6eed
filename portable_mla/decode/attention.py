"""MLAAttention: plan once a step, call once a layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from portable_mla.core.checks import check_kv_scale, check_q_dtype
from portable_mla.core.device import arch_of, on_device_of
from portable_mla.core.scalars import check_scale
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.decode.api import register_planned, result_tensors, scale_tensor
from portable_mla.decode.call_cache import PlannedCalls
from portable_mla.dispatch.interface import DecodeInputs, decode_runner
from portable_mla.dispatch.select import Explanation, chosen_backend, explain
from portable_mla.errors import GraphCaptureError, PlanMismatch
from portable_mla.metadata import DecodeBuffers, Limits, PagedBatch, Status
from portable_mla.metadata.batch_snapshot import BatchSnapshot
from portable_mla.runtime.fast_path import unobserved
from portable_mla.settings import Settings


class MLAAttention:
    """Decode attention of one model shape on one device, for any batch within a capacity.

        attention = MLAAttention(shape, capacity, device="cuda")
        attention.plan(PagedBatch(block_table, kv_lens))                      # once a step
        for layer in range(layers):
            out, lse = attention(q[layer], cache[layer], softmax_scale=scale)  # once a layer

    Metadata lives in buffers of fixed addresses that `plan` writes on the device without a sync. A graph that captured
    the calls of a step, and its plan too if wanted, stays right at any lengths and any batch up to what it captured:
    plan(batch) outside the graph, then replay. An attention belongs to one stream at a time.

    uniform_queries says that every batch has exactly max_query_len query tokens a request; without it batches may be
    ragged. backend, deterministic and persistent_metadata default to the environment's settings, read here, once.
    Inference only: no gradient flows through it. It and the tensors of its batches must outlive every graph that
    captured them, which reads them by address. Raises NoBackend, with every reason, when nothing can serve.
    """

    def __init__(
        self,
        shape: MLAShape,
        capacity: Capacity,
        *,
        device: torch.device | str,
        uniform_queries: bool = True,
        deterministic: bool = False,
        backend: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._settings = settings = Settings.from_env() if settings is None else settings
        self._device = _indexed(torch.device(device))
        self._on_gpu = self._device.type == "cuda"
        arch = arch_of(self._device)
        deterministic = deterministic or settings.deterministic
        self.request = Request(
            arch, shape, Phase.decode, capacity.max_query_len, uniform_queries, deterministic, capacity
        )
        check_q_dtype(shape.q_dtype, shape.cache_format)
        forced = backend or settings.backend
        self.explanation: Explanation = explain(self.request, forced, settings.disable)
        self._backend = chosen_backend(self.explanation)
        self._runner = decode_runner(self._backend, self.request)
        self._status = Status.allocate(self._device)
        self._buffers = self._new_buffers()
        self._most_pages = self._planned_pages = capacity.max_pages  # that page ids may name; those of this plan
        self._batch: PagedBatch | None = None
        self._tokens: int | None = None  # that q must have: of a uniform batch
        self._snapshot: BatchSnapshot | None = None
        self._known_batch: tuple[object, ...] = ()  # what passed the latest check of a batch
        self._calls = PlannedCalls(self.request, self._backend.reasons_unsupported)
        self._scaled = shape.cache_format.needs_scale
        self._captured = False
        self._handle = register_planned(self)

    @property
    def backend(self) -> str:
        """Name of the backend that serves."""
        assert self.explanation.chosen is not None
        return self.explanation.chosen

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def positions(self) -> Tensor:
        """[max_query_tokens] int32, any stride: RoPE position of each query token of the latest plan, the batch's own
        where it gave them, else kv_len - query_len + i; 0 for padding. Its address never changes: kernels, captured
        ones too, read it in place."""
        return self._buffers.positions

    @property
    def status_words(self) -> Tensor:
        """What kernels met, for `check`; `write_latent` reports in them too. Their address never changes."""
        return self._status.words

    def memory(self) -> dict[str, int]:
        """Device bytes held from step to step, by part. They depend on the capacity alone, never on the lengths."""
        parts = {part: sum(t.nbytes for t in tensors) for part, tensors in self._buffers.tensors().items()}
        return {"status": self._status.words.nbytes} | parts | self._runner.memory()

    def check(self) -> None:
        """Wait for the device and raise what it met since the last check: an IndexError naming the request, the value
        and what is allowed, for page ids outside the cache, lengths over the capacity, more query tokens than
        max_query_len or than q has. Rows that need them are NaN. Not for captures."""
        capacity = self.request.capacity
        context, tokens = capacity.max_context, capacity.max_query_tokens
        if self._batch is not None:
            context = min(context, self._batch.block_table.shape[1] * self.request.shape.page_size)
        self._status.check(Limits(self._planned_pages, context, capacity.max_query_len, tokens))

    def plan(self, batch: PagedBatch) -> None:
        """Prepare a step. The batch's tensors must stay as they are until the next plan: a call notices where they did
        not, but for tensors that were made on a GPU under torch.inference_mode, which count no writes.

        Raises PlanMismatch for a batch beyond the capacity, GraphCaptureError where a capture could not repeat it, and
        ValueError or IndexError, naming the request, for lengths or page ids that host memory shows to be wrong; on a
        GPU those set the status words for `check`, or raise here under PORTABLE_MLA_DEBUG=1.
        """
        self.check_batch(batch)
        self.plan_checked(batch)

    def plan_checked(self, batch: PagedBatch) -> None:
        """`plan` of a batch that `check_batch` just passed."""
        self._describe(batch, self._most_pages)
        self._batch, self._snapshot = batch, BatchSnapshot(batch)
        self._tokens = batch.size * batch.max_query_len if batch.query_lens is None else None

    def check_batch(self, batch: PagedBatch) -> None:
        """Raise what `plan` raises for this batch, and change nothing."""
        self._check_fit(batch)
        self._check_step(batch, self._most_pages)

    def _check_step(self, batch: PagedBatch, pages: int) -> None:
        capturing = self._note_capture()
        if batch.device.type == "cpu" or (self._settings.debug and not capturing):
            self._check_values(batch, pages)

    def _describe(self, batch: PagedBatch, pages: int) -> None:
        """Write the metadata, for page ids below `pages`."""
        if not self._settings.persistent_metadata:
            self._buffers = self._new_buffers()
        with on_device_of(batch.kv_lens):
            self._runner.plan(self._buffers.update(batch, pages))
        self._planned_pages = pages

    def _new_buffers(self) -> DecodeBuffers:
        request, debug = self.request, self._settings.debug
        needs = replace(self._backend.needs(request), positions=True)
        return DecodeBuffers(request.capacity, request.shape.page_size, needs, self._status, debug=debug)

    def _check_fit(self, batch: PagedBatch) -> None:
        known = (batch.kv_lens.shape, batch.max_query_len, batch.query_lens is None, batch.device)
        if known != self._known_batch:
            self._check_new_batch(batch)
            self._known_batch = known

    def _check_new_batch(self, batch: PagedBatch) -> None:
        capacity = self.request.capacity
        uniform_tokens = batch.size * batch.max_query_len if batch.query_lens is None else 0
        for field, planned, got in (
            ("max_batch", capacity.max_batch, batch.size),
            ("max_query_len", capacity.max_query_len, batch.max_query_len),
            ("max_query_tokens", capacity.max_query_tokens, uniform_tokens),
        ):
            if got > planned:
                raise PlanMismatch(field, planned, got, self._more_capacity())
        if self.request.uniform_queries:
            if batch.query_lens is not None:
                raise PlanMismatch(
                    "query_lens", None, "a tensor", "Build with uniform_queries=False for ragged queries"
                )
            if batch.max_query_len != capacity.max_query_len:
                hint = "Build with uniform_queries=False for query lengths that change"
                raise PlanMismatch("max_query_len", capacity.max_query_len, batch.max_query_len, hint)
        if not _same_device(batch.device, self._device):
            raise ValueError(f"block_table: is on {batch.device}, this attention is on {self._device}")

    def _check_values(self, batch: PagedBatch, pages: int) -> None:
        capacity = self.request.capacity
        batch.check_values(self.request.shape.page_size, pages, capacity.max_query_tokens)
        longest = int(batch.kv_lens.max()) if batch.size else 0
        if longest > capacity.max_context:
            raise PlanMismatch("max_context", capacity.max_context, longest, self._more_capacity())

    def _more_capacity(self) -> str:
        if self._captured:
            return "Build a new MLAAttention with more capacity: captured graphs hold the buffers of this one"
        return "Build an MLAAttention with more capacity"

    def _note_capture(self) -> bool:
        """Whether the current stream is being captured; raises GraphCaptureError where that could not be replayed."""
        if not self._on_gpu or not torch.cuda.is_current_stream_capturing():
            return False
        if not self._settings.persistent_metadata:
            raise GraphCaptureError(
                "PORTABLE_MLA_PERSISTENT_METADATA=0 allocates the metadata of each step anew, where a captured graph "
                "would not look for it"
            )
        if not self._runner.graph_safe:
            raise GraphCaptureError(f"the backend {self.backend} reads lengths on the host")
        if self._batch is None:
            raise GraphCaptureError("nothing was planned yet, so buffers would be allocated inside the capture")
        return True

    def __call__(
        self,
        q: Tensor,
        kv_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        softmax_scale: float,
        kv_scale: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend for one layer with the latest plan; arguments and results as in `mla_decode`.

        Raises PlanMismatch when the tensors, or lengths changed since, do not fit the plan.
        """
        ours = out is None and lse is None
        softmax_scale = check_scale("softmax_scale", softmax_scale)
        direct = unobserved(q, kv_cache, out, lse, kv_scale)
        out, lse = result_tensors(q, self.request.shape.latent_dim, out, lse)
        scale = None if kv_scale is None else scale_tensor(kv_scale, q.device)
        if direct:
            self.run(q, kv_cache, out, lse, softmax_scale, scale, ours=ours)
        else:
            torch.ops.portable_mla.decode_planned.default(q, kv_cache, out, lse, self._handle, softmax_scale, scale)
        return out, lse

    def run(
        self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, kv_scale: Tensor | None,
        *, ours: bool = False,
    ) -> None:  # fmt: skip
        """What the op `decode_planned` does. ours: out and lse are `result_tensors`' own."""
        self._check_planned()
        capturing = self._note_capture()
        memo = self._calls.memo(q, kv_cache, out, lse, ours=ours)
        tokens, pages = memo.tokens, memo.pages
        if pages < self._planned_pages:
            self._plan_for_pages(pages, capturing)
        if tokens != self._tokens and self._tokens is not None:
            raise PlanMismatch("query tokens", self._tokens, tokens, "A uniform batch has max_query_len a request")
        if kv_scale is not None or self._scaled:
            values = self._settings.debug and not capturing
            check_kv_scale(kv_scale, self.request.shape.cache_format, self.request.arch, kv_cache, values=values)
        if tokens:
            with on_device_of(q):
                inputs = DecodeInputs(q, kv_cache, memo, capturing)
                self._runner.run(inputs, out, lse, softmax_scale=softmax_scale, kv_scale=kv_scale)
        if capturing:
            self._captured, self._most_pages = True, min(self._most_pages, pages)
        elif self._settings.debug:
            self.check()

    def _plan_for_pages(self, pages: int, capturing: bool) -> None:
        """Page ids must be right for the smallest cache of a step: the first smaller one has it planned anew."""
        assert self._batch is not None, "planned"
        if capturing:
            raise GraphCaptureError(
                f"the step was planned for a cache of {self._planned_pages} pages, this has {pages}"
            )
        self._check_step(self._batch, pages)
        self._describe(self._batch, pages)

    def _check_planned(self) -> None:
        if self._batch is None:
            raise PlanMismatch("plan", "nothing", "a call", "Call plan(batch) first")
        if self._snapshot is not None and self._snapshot.has_changed():
            hint = "Call plan(batch) after changing lengths or tables in place"
            raise PlanMismatch("batch", "the tensors as they were", "changed tensors", hint)


def _indexed(device: torch.device) -> torch.device:
    """ "cuda" names whatever GPU is current; buffers need to stay on one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)
