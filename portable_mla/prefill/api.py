"""mla_prefill and its ops: ragged attention over expanded keys and values, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from portable_mla.core.checks import check_outputs
from portable_mla.core.device import on_device_of
from portable_mla.core.scalars import check_scale
from portable_mla.decode.api import result_tensors
from portable_mla.dispatch.interface import PrefillInputs, PrefillRunner, prefill_runner
from portable_mla.dispatch.select import select
from portable_mla.prefill.arguments import PrefillArguments
from portable_mla.runtime.torch_ops import register_op
from portable_mla.settings import Settings

_INPUTS = "Tensor q, Tensor k_nope, Tensor k_pe, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_TAIL = (
    "int max_seqlen_q, int max_seqlen_k, float softmax_scale, bool causal=True, bool deterministic=False, "
    "str? backend=None"
)


def mla_prefill(  # noqa: PLR0913 (the tensors and options of one attention call)
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    backend: str | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ragged MLA prefill over expanded keys and values: one launch, lengths read on the device alone.

    Args:
        q: [tokens, heads, nope + rope] bfloat16, float16 or float32; the tokens of a sequence are adjacent. Rows past
            the last sequence are padding.
        k_nope: [keys, heads, nope], k_pe: [keys, rope], v: [keys, heads, v_dim], of q's dtype, any outer strides;
            k_pe is shared by all heads. Rows past the last sequence are never used.
        cu_seqlens_q, cu_seqlens_k: [sequences + 1] int32 offsets, from 0. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: upper bounds of a sequence's query tokens and keys.
        softmax_scale: (nope + rope)**-0.5 times YaRN's mscale**2 where the model has one.
        causal: query token i of n sees keys <= kv_len - n + i of its sequence; else all of them.
        backend: serve with this backend or raise NoBackend; never falls back.
        deterministic: a row's bits do not depend on the rest of the batch.
        out, lse: results to write into. A float32 out keeps the digits that a later `merge_state` needs.

    Returns:
        out [tokens, heads, v_dim] in q's dtype and lse [tokens, heads] float32, natural logarithm. Rows with nothing
        to see, and rows past the last query token, are 0 and -inf. A row depends on the keys and values that its token
        sees alone: NaN or infinity in a later one never reaches it (a vendor's library may let it).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it got. Offsets
            are checked by value in host memory and under PORTABLE_MLA_DEBUG=1; elsewhere wrong ones leave wrong rows,
            but no memory outside the tensors is touched.
        NoBackend: no backend can serve; the message lists every reason of every backend.

    Inference only: no gradient flows through it, and results never require grad.

    Source: DeepSeek-V2 (2024), section 2.1, in the expanded form.
    """
    inputs = (q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k)
    softmax_scale = check_scale("softmax_scale", softmax_scale)
    tail = (max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic, backend)
    for name, tensor in zip(("q", "k_nope", "k_pe", "v", "cu_seqlens_q", "cu_seqlens_k"), inputs, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if out is None and lse is None:
        result: tuple[Tensor, Tensor] = torch.ops.portable_mla.prefill.default(*inputs, *tail)
        return result
    out, lse = result_tensors(q, v.shape[2], out, lse)
    torch.ops.portable_mla.prefill_out.default(*inputs, out, lse, *tail)
    return out, lse


def serve_prefill(
    arguments: PrefillArguments, out: Tensor, lse: Tensor, *, deterministic: bool, backend: str | None
) -> None:
    """Dispatch and run one call."""
    inputs, settings = arguments.inputs, Settings.from_env()
    float32_out = out.dtype != inputs.q.dtype
    runner = runner_for(arguments, settings, float32_out=float32_out, deterministic=deterministic, backend=backend)
    if inputs.q.device.type == "cpu" or settings.debug:
        arguments.check_values()
    run_prefill(runner, inputs, out, lse, softmax_scale=arguments.softmax_scale)


def runner_for(
    arguments: PrefillArguments, settings: Settings, *, float32_out: bool, deterministic: bool, backend: str | None
) -> PrefillRunner:
    """The chosen backend, bound to calls that fit in this one."""
    request = arguments.request(deterministic=deterministic or settings.deterministic, float32_out=float32_out)
    return prefill_runner(select(request, backend or settings.backend, settings.disable), request)


def run_prefill(
    runner: PrefillRunner, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float
) -> None:
    """One launch, on the tensors' device, which need not be the current one; none where there is no query token."""
    if inputs.q.shape[0]:
        with on_device_of(inputs.q):
            runner.run(inputs, out, lse, softmax_scale=softmax_scale)


def check_prefill_outputs(inputs: PrefillInputs, out: Tensor, lse: Tensor) -> None:
    """out is in q's dtype or float32; both have the results' shapes and share no memory with an input."""
    tensors = {"q": inputs.q, "k_nope": inputs.k_nope, "k_pe": inputs.k_pe, "v": inputs.v}
    dtype = torch.float32 if isinstance(out, Tensor) and out.dtype == torch.float32 else inputs.q.dtype
    check_outputs(out, lse, inputs.v.shape[2], tensors, dtype)


def _prefill_out(  # noqa: PLR0913 (the op's schema)
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool = True,
    deterministic: bool = False,
    backend: str | None = None,
) -> None:
    inputs = PrefillInputs(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, causal)
    arguments = PrefillArguments(inputs, max_seqlen_q, max_seqlen_k, softmax_scale)
    check_prefill_outputs(inputs, out, lse)
    serve_prefill(arguments, out, lse, deterministic=deterministic, backend=backend)


def _prefill(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The six tensors and the tail, as the schema orders them."""
    results = _results(*arguments)
    schema_order: tuple[Any, ...] = (*arguments[:6], *results, *arguments[6:])
    _prefill_out(*schema_order)
    return results


def _results(q: Tensor, k_nope: Tensor, k_pe: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return result_tensors(q, v.shape[2])


register_op(f"prefill({_INPUTS}, {_TAIL}) -> (Tensor, Tensor)", _prefill, _results)
register_op(
    f"prefill_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse, {_TAIL}) -> ()", _prefill_out, lambda *_, **__: None
)
