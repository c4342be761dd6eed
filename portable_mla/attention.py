"""MLAAttention: plan once a step, call once a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from portable_mla.arguments import check_cache_row, check_kv_scale, check_outputs, check_q_dtype, check_tensors
from portable_mla.backend import DecodeInputs
from portable_mla.device import arch_of
from portable_mla.dispatch import Explanation, explain, select
from portable_mla.errors import PlanMismatch
from portable_mla.metadata import DecodeMetadata, PagedBatch
from portable_mla.ops import register_planned, result_tensors, scale_tensor
from portable_mla.settings import Settings
from portable_mla.shape import Capacity, MLAShape, Phase, Request

_REMEMBERED_CALLS = 4096


class MLAAttention:
    """Decode attention of one model shape on one device, for any batch within a capacity.

        attention = MLAAttention(shape, capacity, device="cuda")
        attention.plan(PagedBatch(block_table, kv_lens))                      # once a step
        for layer in range(layers):
            out, lse = attention(q[layer], cache[layer], softmax_scale=scale)  # once a layer

    uniform_queries says that every batch has exactly max_query_len query tokens a request; without it batches may be
    ragged. backend and deterministic default to the environment's settings, read here, once.
    Raises NoBackend, with every reason, when nothing can serve.
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
        settings = Settings.from_env() if settings is None else settings
        self._device = torch.device(device)
        arch = arch_of(self._device)
        deterministic = deterministic or settings.deterministic
        self.request = Request(
            arch, shape, Phase.decode, capacity.max_query_len, uniform_queries, deterministic, capacity
        )
        check_q_dtype(shape.q_dtype, shape.cache_format)
        forced = backend or settings.backend
        self.explanation: Explanation = explain(self.request, forced)
        self._backend = select(self.request, forced)
        self._forms = self._backend.needs(self.request)
        self._runner = self._backend.bind(self.request)
        self._batch: PagedBatch | None = None
        self._generation: tuple[int, ...] = ()
        self._checked: set[tuple[object, ...]] = set()
        self._handle = register_planned(self)

    @property
    def backend(self) -> str:
        """Name of the backend that serves."""
        assert self.explanation.chosen is not None
        return self.explanation.chosen

    def plan(self, batch: PagedBatch) -> None:
        """Prepare a step. The batch's tensors must stay as they are until the next plan.

        Raises PlanMismatch for a batch beyond the capacity, and ValueError or IndexError, naming the request, for
        lengths or page ids that host memory shows to be wrong.
        """
        capacity = self.request.capacity
        page_size = self.request.shape.page_size
        uniform_tokens = batch.size * batch.max_query_len if batch.query_lens is None else 0
        for field, planned, got in (
            ("max_batch", capacity.max_batch, batch.size),
            ("max_query_len", capacity.max_query_len, batch.max_query_len),
            ("max_query_tokens", capacity.max_query_tokens, uniform_tokens),
        ):
            if got > planned:
                raise PlanMismatch(field, planned, got, "Build an MLAAttention with more capacity")
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
        if batch.device.type == "cpu":
            batch.check_values(page_size, capacity.max_pages, capacity.max_query_tokens)
            longest = int(batch.kv_lens.max()) if batch.size else 0
            if longest > capacity.max_context:
                raise PlanMismatch("max_context", capacity.max_context, longest, "Build with more capacity")
        if batch.size:
            with torch.cuda.device_of(batch.kv_lens):
                self._runner.plan(DecodeMetadata.build(batch, self._forms))
        self._batch, self._generation = batch, _generation(batch)

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
        out, lse = result_tensors(q, self.request.shape.latent_dim, out, lse)
        scale = scale_tensor(kv_scale, q.device)
        torch.ops.portable_mla.decode_planned.default(q, kv_cache, out, lse, self._handle, softmax_scale, scale)
        return out, lse

    def run(
        self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, kv_scale: Tensor | None
    ) -> None:
        """What the op `decode_planned` does."""
        batch = self._planned_batch()
        call = tuple((t.shape, t.stride(), t.dtype, t.device, t.data_ptr()) for t in (q, kv_cache, out, lse))
        if call not in self._checked:
            self._check_call(q, kv_cache, out, lse)
            self._remember(call)
        tokens = batch.size * batch.max_query_len
        if batch.query_lens is None and q.shape[0] != tokens:
            raise PlanMismatch("query tokens", tokens, q.shape[0], "A uniform batch has max_query_len a request")
        check_kv_scale(kv_scale, self.request.shape.cache_format, self.request.arch)
        if batch.size == 0:
            out.zero_()
            lse.fill_(-torch.inf)
        elif q.shape[0]:
            with torch.cuda.device_of(q):  # kernels launch on the current device, which need not be the tensors'
                self._runner.run(DecodeInputs(q, kv_cache), out, lse, softmax_scale=softmax_scale, kv_scale=kv_scale)

    def _planned_batch(self) -> PagedBatch:
        if self._batch is None:
            raise PlanMismatch("plan", "nothing", "a call", "Call plan(batch) first")
        if _generation(self._batch) != self._generation:
            hint = "Call plan(batch) after changing lengths or tables in place"
            raise PlanMismatch("batch", "the tensors as they were", "changed tensors", hint)
        return self._batch

    def _remember(self, call: tuple[object, ...]) -> None:
        """Addresses, shapes and strides that were checked need no second check: the layers of a model repeat them."""
        if len(self._checked) >= _REMEMBERED_CALLS:
            self._checked.clear()
        self._checked.add(call)

    def _check_call(self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor) -> None:
        shape, capacity = self.request.shape, self.request.capacity
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
        check_outputs(q, kv_cache, shape.latent_dim, out, lse)


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (None in (one.index, other.index) or one.index == other.index)


def _generation(batch: PagedBatch) -> tuple[int, ...]:
    """Versions of the batch's tensors: they move when one is written in place (inference tensors carry none)."""
    tensors = (batch.block_table, batch.kv_lens, batch.query_lens)
    return tuple(-1 if t is None or t.is_inference() else t._version for t in tensors)
