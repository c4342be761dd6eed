"""mla_chunked_prefill: new tokens attend to themselves and to a cached context, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.backend import PrefillInputs, PrefillRunner
from portable_mla.context import FIXED_WINDOW, CachedContext, Window
from portable_mla.merge import State, merge_into
from portable_mla.ops import result_tensors
from portable_mla.prefill import check_prefill_outputs, run_prefill, runner_for, serve_prefill
from portable_mla.prefill_arguments import PrefillArguments
from portable_mla.settings import Settings

_ROWS = 8  # rows of any even width fill whole 16 bytes, so that each part of a workspace is aligned


def mla_chunked_prefill(  # noqa: PLR0913 (the tensors and options of one attention call)
    q: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    context: CachedContext,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    workspace: Tensor | None = None,
    backend: str | None = None,
    deterministic: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`mla_prefill` of sequences that have a context in the latent cache.

    The context is gathered and up-projected by w_uk and w_uv a window of bounded size at a time, attended to without a
    mask, and merged in float32 by its LSE: the result does not depend on the windows beyond rounding. Lengths are read
    on the device alone; the number of launches follows from context.max_len (better: max_tokens) and the workspace.

    Args:
        q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: the new tokens, which see each other
            causally, as in `mla_prefill`.
        context: what comes before them.
        workspace: a dense uint8 tensor on q's device for one window; without it, PORTABLE_MLA_PREFILL_WORKSPACE
            MB are allocated, or less where the context needs less. Beside it the call holds two float32 results and
            the gathered rows of a window.
        deterministic: a row's bits do not depend on the rest of the batch: windows are cut sequence by sequence.
        backend, out, lse, softmax_scale: as in `mla_prefill`.

    Returns:
        out [tokens, heads, v_dim] in q's dtype (or out's) and lse [tokens, heads] float32, over context and new tokens.

    Raises:
        As `mla_prefill`; ValueError for a workspace too small for one token.
    """
    settings = Settings.from_env()
    deterministic = deterministic or settings.deterministic
    inputs = PrefillInputs(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k)
    new = PrefillArguments(inputs, max_seqlen_q, max_seqlen_k, softmax_scale)
    context.check(inputs, values=q.device.type == "cpu" or settings.debug)
    out, lse = result_tensors(q, v.shape[2], out, lse)
    check_prefill_outputs(inputs, out, lse)
    if context.most_tokens and q.shape[0]:
        most = max(context.most_tokens, FIXED_WINDOW if deterministic else 0)
        default = min(settings.prefill_workspace, -(-most // _ROWS) * _ROWS * token_bytes(inputs, context))
        room = _Room.carve(inputs, context, workspace, default)
        _attend(new, context, room, (out, lse), settings, deterministic=deterministic, backend=backend)
    else:
        serve_prefill(new, out, lse, deterministic=deterministic, backend=backend)
    return out, lse


def _attend(
    new: PrefillArguments, context: CachedContext, room: _Room, result: State, settings: Settings, *,
    deterministic: bool, backend: str | None,
) -> None:  # fmt: skip
    """To the new tokens, then to the context window by window."""
    so_far, part = ((torch.empty_like(result[0], dtype=torch.float32), torch.empty_like(result[1])) for _ in range(2))
    serve_prefill(new, *so_far, deterministic=deterministic, backend=backend)
    runner: PrefillRunner | None = None
    for window in context.windows(room.rows, fixed=deterministic):
        some = room.expand(context, window, new.inputs)
        if runner is None:  # the first window is the longest
            arguments = PrefillArguments(some, new.max_seqlen_q, window.longest, new.softmax_scale)
            wide = part[0].dtype != new.inputs.q.dtype
            runner = runner_for(arguments, settings, float32_out=wide, deterministic=deterministic, backend=backend)
        run_prefill(runner, some, *part, softmax_scale=new.softmax_scale)
        merge_into(so_far, (part[0][None], part[1][None]), *so_far)
    for final, running in zip(result, so_far, strict=True):
        final.copy_(running)


def token_bytes(inputs: PrefillInputs, context: CachedContext) -> int:
    """Workspace of one context token: its latent row, and its keys and values."""
    widths = inputs.q.shape[1] * (inputs.k_nope.shape[2] + inputs.v.shape[2])
    return (context.w_uk.shape[2] + inputs.k_pe.shape[1] + widths) * inputs.q.element_size()


@dataclass(frozen=True)
class _Room:
    """A workspace, as the tensors of one window."""

    latent: Tensor  # [rows, latent + rope]
    k_nope: Tensor  # [rows, heads * nope]
    v: Tensor  # [rows, heads * v_dim]

    @classmethod
    def carve(cls, inputs: PrefillInputs, context: CachedContext, workspace: Tensor | None, default: int) -> _Room:
        q, token = inputs.q, token_bytes(inputs, context)
        if workspace is None:
            workspace = torch.empty(default, dtype=torch.uint8, device=q.device)
        if workspace.dtype != torch.uint8 or workspace.dim() != 1 or not workspace.is_contiguous():
            raise ValueError(
                f"workspace: expected a dense uint8 vector, got shape {tuple(workspace.shape)} of {workspace.dtype}"
            )
        if workspace.device != q.device or workspace.data_ptr() % 16:
            raise ValueError(f"workspace: expected an address on {q.device} that is a multiple of 16")
        rows = workspace.shape[0] // token
        if rows < 1:
            raise ValueError(f"workspace: expected at least {token} bytes, one context token, got {workspace.shape[0]}")
        rows = rows // _ROWS * _ROWS or rows
        room = workspace[: rows * token].view(q.dtype)
        heads, latent = q.shape[1], context.w_uk.shape[2] + inputs.k_pe.shape[1]
        widths = (latent, heads * inputs.k_nope.shape[2], heads * inputs.v.shape[2])
        parts = room.split([rows * width for width in widths])
        return cls(*(part.view(rows, width) for part, width in zip(parts, widths, strict=True)))

    @property
    def rows(self) -> int:
        """Context tokens that fit."""
        return self.latent.shape[0]

    def expand(self, context: CachedContext, window: Window, inputs: PrefillInputs) -> PrefillInputs:
        """Gather and up-project a window: what the queries then attend to without a mask."""
        latent, k_nope, v = (part[: window.rows] for part in (self.latent, self.k_nope, self.v))
        context.gather(window, latent)
        latent_dim = context.w_uk.shape[2]
        for weight, result in ((context.w_uk, k_nope), (context.w_uv, v)):
            torch.matmul(latent[:, :latent_dim], weight.reshape(-1, latent_dim).T, out=result)
        heads = inputs.q.shape[1]
        return PrefillInputs(
            inputs.q, k_nope.unflatten(1, (heads, -1)), latent[:, latent_dim:], v.unflatten(1, (heads, -1)),
            inputs.cu_seqlens_q, window.cu_seqlens, causal=False,
        )  # fmt: skip
