"""torch custom ops of the namespace portable_mla, and mla_decode on top of them.

Ops take tensors and scalars only, work under torch.compile(fullgraph=True) and torch.export, and cost about 2 us a call
(Library.define; the decorator forms cost 12 to 28 us).
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

from portable_mla.core.checks import check_device, check_outputs
from portable_mla.core.device import is_capturing, on_device_of
from portable_mla.core.scalars import check_scale
from portable_mla.decode.arguments import DecodeArguments
from portable_mla.dispatch.interface import DecodeInputs, decode_runner
from portable_mla.dispatch.select import select
from portable_mla.errors import GraphCaptureError
from portable_mla.metadata import DecodeBuffers, PagedBatch, Status
from portable_mla.runtime.torch_ops import register_op
from portable_mla.settings import Settings

_BATCH = "Tensor block_table, Tensor kv_lens, Tensor? query_lens, int max_query_len"
_TAIL = "float softmax_scale, int latent_dim, Tensor? kv_scale=None, bool deterministic=False, str? backend=None"


def mla_decode(  # noqa: PLR0913 (the tensors and options of one attention call)
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    *,
    softmax_scale: float,
    latent_dim: int,
    query_lens: Tensor | None = None,
    max_query_len: int = 1,
    kv_scale: float | Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed MLA decode over a paged latent cache, in one call: dispatch, plan and run. `MLAAttention` plans once a
    step and captures in a graph.

    Args:
        q: [tokens, heads, latent + rope] bfloat16, float16 or float32; the tokens of a request are adjacent.
        kv_cache: [pages, page_size, latent + rope] of q's dtype or fp8, or uint8 [pages, page_size, 656]; any outer
            strides. float32 is served on CPUs and by the reference.
        block_table: [batch, width] int32 page ids. kv_lens: [batch] int32 tokens, this step's included.
        softmax_scale: (nope + rope)**-0.5 times YaRN's mscale**2 where the model has one. Never 576**-0.5.
        latent_dim: width of the latent part of a row; the rest is rope (there may be none).
        query_lens: [batch] int32 for ragged queries, None when each request has max_query_len tokens. Token i of n
            sees positions <= kv_len - n + i.
        kv_scale: per-tensor dequantisation scale of an fp8 cache, a float or a float32 tensor of one value.
        deterministic: a row's bits do not depend on the rest of the batch.
        backend: serve with this backend or raise NoBackend; never falls back.
        out, lse: results to write into.

    Returns:
        out [tokens, heads, latent] in q's dtype and lse [tokens, heads] float32, natural logarithm. Rows with nothing
        to see, and rows past the last query token, are 0 and -inf. A row depends on the keys that its token sees alone:
        NaN or infinity in a later key never reaches it (a vendor's library may let it).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it got.
        NoBackend: no backend can serve; the message lists every reason of every backend.

    Inference only: results never require grad. Source: DeepSeek-V2 (2024), section 2.1, in the absorbed form.
    """
    for name, tensor in (("q", q), ("kv_cache", kv_cache), ("block_table", block_table), ("kv_lens", kv_lens)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    for name, tensor in (("q", q), ("block_table", block_table), ("kv_lens", kv_lens)):
        check_device(name, tensor, kv_cache)
    softmax_scale = check_scale("softmax_scale", softmax_scale)
    scale = scale_tensor(kv_scale, q.device)
    batch = (block_table, kv_lens, query_lens, max_query_len)
    tail = (softmax_scale, latent_dim, scale, deterministic, backend)
    if out is None and lse is None:
        result: tuple[Tensor, Tensor] = torch.ops.portable_mla.decode.default(q, kv_cache, *batch, *tail)
        return result
    out, lse = result_tensors(q, latent_dim, out, lse)
    torch.ops.portable_mla.decode_out.default(q, kv_cache, *batch, out, lse, *tail)
    return out, lse


def result_tensors(
    q: Tensor, width: int, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The results to write into: those given, else new ones, [tokens, heads, width] in q's dtype and float32."""
    if out is not None and lse is not None:
        return out, lse
    tokens, heads, *_ = (*q.shape, 0, 0)  # of a q of fewer dimensions too: it is refused with its name
    out = q.new_empty(tokens, heads, width) if out is None else out
    lse = q.new_empty(tokens, heads, dtype=torch.float32) if lse is None else lse
    return out, lse


def scale_tensor(kv_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A per-tensor scale as a float32 tensor on `device`; a Python float is checked by value."""
    if kv_scale is None or isinstance(kv_scale, Tensor):
        return kv_scale
    return torch.full((), check_scale("kv_scale", kv_scale), dtype=torch.float32, device=device)


class Planned(Protocol):
    """What a plan handle stands for."""

    def run(
        self, q: Tensor, kv_cache: Tensor, out: Tensor, lse: Tensor, softmax_scale: float, kv_scale: Tensor | None
    ) -> None:
        """Attend once with the latest plan."""
        ...


# The only module state of the library: ops take ints, so a handle finds the attention that planned. Held weakly, and
# never given twice, so that a compiled graph cannot meet another attention under its old handle.
_PLANNED: weakref.WeakValueDictionary[int, Planned] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


def register_planned(planned: Planned) -> int:
    """A handle for `decode_planned`, valid while `planned` lives."""
    handle = next(_HANDLES)
    _PLANNED[handle] = planned
    return handle


def _decode_out(  # noqa: PLR0913 (the op's schema)
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    query_lens: Tensor | None,
    max_query_len: int,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    latent_dim: int,
    kv_scale: Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> None:
    batch = PagedBatch(block_table, kv_lens, query_lens, max_query_len)
    arguments = DecodeArguments(q, kv_cache, batch, latent_dim, softmax_scale, kv_scale)
    check_outputs(out, lse, latent_dim, {"q": q, "kv_cache": kv_cache})
    _serve(arguments, out, lse, deterministic, backend)


def _decode(  # noqa: PLR0913 (the op's schema)
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    query_lens: Tensor | None,
    max_query_len: int,
    softmax_scale: float,
    latent_dim: int,
    kv_scale: Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    batch = PagedBatch(block_table, kv_lens, query_lens, max_query_len)
    arguments = DecodeArguments(q, kv_cache, batch, latent_dim, softmax_scale, kv_scale)
    out, lse = result_tensors(q, latent_dim)
    _serve(arguments, out, lse, deterministic, backend)
    return out, lse


def _serve(arguments: DecodeArguments, out: Tensor, lse: Tensor, deterministic: bool, backend: str | None) -> None:
    """Dispatch, plan and run one call."""
    q, kv_cache, batch = arguments.q, arguments.kv_cache, arguments.batch
    if is_capturing(q):
        why = "mla_decode plans and allocates in every call, which a graph cannot repeat"
        raise GraphCaptureError(why, hint="Capture the calls of an MLAAttention: plan(batch) before the capture")
    settings = Settings.from_env()
    request = arguments.request(deterministic or settings.deterministic)
    chosen = select(request, backend or settings.backend, settings.disable)
    if q.shape[0] == 0:
        return
    if batch.size == 0:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    if batch.device.type == "cpu":
        batch.check_values(request.shape.page_size, kv_cache.shape[0], q.shape[0])
    with on_device_of(q):
        runner, status = decode_runner(chosen, request), Status.allocate(q.device)
        buffers = DecodeBuffers(request.capacity, request.shape.page_size, chosen.needs(request), status)
        runner.plan(buffers.update(batch, request.capacity.max_pages))
        inputs, scale = DecodeInputs(q, kv_cache), arguments.kv_scale
        runner.run(inputs, out, lse, softmax_scale=arguments.softmax_scale, kv_scale=scale)


def _results(  # noqa: PLR0913 (the op's schema)
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    query_lens: Tensor | None,
    max_query_len: int,
    softmax_scale: float,
    latent_dim: int,
    kv_scale: Tensor | None = None,
    deterministic: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    return result_tensors(q, latent_dim)


def _decode_planned(
    q: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: int,
    softmax_scale: float,
    kv_scale: Tensor | None = None,
) -> None:
    planned = _PLANNED.get(plan)
    if planned is None:
        raise ValueError(f"plan: expected the handle of a living MLAAttention, got {plan}")
    planned.run(q, kv_cache, out, lse, check_scale("softmax_scale", softmax_scale), kv_scale)


register_op(f"decode(Tensor q, Tensor kv_cache, {_BATCH}, {_TAIL}) -> (Tensor, Tensor)", _decode, _results)
register_op(
    f"decode_out(Tensor q, Tensor kv_cache, {_BATCH}, Tensor(a!) out, Tensor(b!) lse, {_TAIL}) -> ()",
    _decode_out,
    lambda *_, **__: None,
)
register_op(
    "decode_planned(Tensor q, Tensor kv_cache, Tensor(a!) out, Tensor(b!) lse, int plan, float softmax_scale, "
    "Tensor? kv_scale=None) -> ()",
    _decode_planned,
    lambda *_, **__: None,
)
