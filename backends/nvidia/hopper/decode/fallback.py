"""PortablePath: how Hopper's runner serves a cache that TMA cannot see as rows of one matrix."""

from __future__ import annotations

from torch import Tensor

from portable_mla.backends.triton.config.decode import Tile
from portable_mla.backends.triton.decode.runner import TritonRunner
from portable_mla.core.device import is_capturing
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import DecodeInputs
from portable_mla.errors import GraphCaptureError
from portable_mla.metadata import DecodeMetadata
from portable_mla.metadata.split_plan.plan import SplitPlan


class PortablePath:
    """The portable Triton kernels, whose tiles are others, with a split plan of their own.

    Nothing is allocated or planned before the first call that needs it; from then on each step is planned here too, a
    launch more a step. A graph can capture such a call after one outside of it.
    """

    def __init__(self, request: Request, tile: Tile) -> None:
        self._request, self._tile = request, tile
        self._runner: TritonRunner | None = None
        self._plan: SplitPlan | None = None
        self._pages = request.capacity.max_pages  # of the smallest cache so far
        self._current = False

    def plan(self, metadata: DecodeMetadata) -> None:
        """Plan the step, if any step before needed it."""
        self._current = False
        if self._plan is not None:
            self._update(metadata)

    def run(
        self, metadata: DecodeMetadata, inputs: DecodeInputs, out: Tensor, lse: Tensor, softmax_scale: float
    ) -> None:
        """Attend once, and plan the step first where that was not done yet."""
        pages = inputs.kv_cache.shape[0]
        if not self._current or pages < self._pages:
            if is_capturing(inputs.q):
                raise GraphCaptureError(
                    f"kv_cache of {pages} pages with strides {inputs.kv_cache.stride()} at address "
                    f"{inputs.kv_cache.data_ptr():#x} needs the portable kernels, which were not planned for such a "
                    "cache before the capture: run one call outside of it"
                )
            self._pages = min(self._pages, pages)
            self._update(metadata)
        assert self._runner is not None, "made by the update"
        own = DecodeInputs(inputs.q, inputs.kv_cache)  # what is remembered of the call is the other runner's
        self._runner.run(own, out, lse, softmax_scale=softmax_scale)

    def memory(self) -> dict[str, int]:
        """Bytes of its plan and partial results, once there."""
        if self._runner is None or self._plan is None:
            return {}
        partials = sum(self._runner.memory().values())
        return {"portable kernels for odd caches": partials + sum(tensor.nbytes for tensor in self._plan.buffers)}

    def _update(self, metadata: DecodeMetadata) -> None:
        if self._runner is None or self._plan is None:
            self._runner = TritonRunner(self._request, self._tile)
            self._plan = SplitPlan.allocate(self._runner.plan_shape, metadata.batch.device)
        page_size = self._request.shape.page_size
        self._plan.update(metadata.batch, metadata.status, page_size=page_size, max_pages=self._pages)
        own = DecodeMetadata(metadata.batch, metadata.status, self._plan, debug=metadata.debug)
        self._runner.plan(own)
        self._current = True
