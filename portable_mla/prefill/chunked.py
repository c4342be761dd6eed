"""mla_chunked_prefill: new tokens attend to themselves and to a cached context, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.device import arch_of
from portable_mla.decode.api import result_tensors
from portable_mla.dispatch.interface import PrefillInputs, PrefillRunner
from portable_mla.prefill.api import check_prefill_outputs, run_prefill, runner_for, serve_prefill
from portable_mla.prefill.arguments import PrefillArguments
from portable_mla.prefill.cached_context import FIXED_WINDOW, CachedContext, Window
from portable_mla.prefill.merge import State, merge_into
from portable_mla.runtime.torch_ops import without_gradients
from portable_mla.settings import Settings

_ROWS = 8  # rows of any even width fill whole 16 bytes, so that each part of a workspace is aligned
_TILE = 128  # query tokens of a row tile, about
_LEAST_WAVES = 3  # tiles of a launch for each compute unit
_MOST_IDLE = 0.05  # share of a launch in which units without a tile wait for its last ones


@without_gradients("out", "lse")
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
            MB are allocated, or less where the context needs less. Beside it the call holds a float32 result, the
            partial result of the heads that are worked on together, and the gathered rows of a window.
        deterministic: a row's bits do not depend on the rest of the batch: windows are cut sequence by sequence.
        backend, out, lse, softmax_scale: as in `mla_prefill`.

    Returns:
        out [tokens, heads, v_dim] in q's dtype (or out's) and lse [tokens, heads] float32, over context and new tokens.

    Raises: as `mla_prefill`; ValueError for a workspace too small for one token. Inference only: no gradient flows.
    """
    settings = Settings.from_env()
    deterministic = deterministic or settings.deterministic
    inputs = PrefillInputs(q, k_nope, k_pe, v, cu_seqlens_q, cu_seqlens_k)
    new = PrefillArguments(inputs, max_seqlen_q, max_seqlen_k, softmax_scale)
    values = q.device.type == "cpu" or settings.debug  # lengths over a bound are an error here, and NaN elsewhere
    context.check(inputs, values=values)
    out, lse = result_tensors(q, v.shape[2], out, lse)
    check_prefill_outputs(inputs, out, lse)
    if context.most_tokens and q.shape[0]:
        most = max(context.most_tokens, FIXED_WINDOW if deterministic else 0)
        default = min(settings.prefill_workspace, -(-most // _ROWS) * _ROWS * token_bytes(inputs, context))
        if workspace is None:
            workspace = torch.empty(default, dtype=torch.uint8, device=q.device)
        groups = 1 if deterministic else head_groups(inputs, context, workspace.nbytes, arch_of(q.device).units)
        room = _Room.carve(inputs, context, workspace, q.shape[1] // groups)
        _attend(new, context, room, (out, lse), settings, deterministic=deterministic, backend=backend)
    else:
        serve_prefill(new, out, lse, deterministic=deterministic, backend=backend)
    if not values:
        context.poison(cu_seqlens_q, out, lse)
    return out, lse


def _attend(
    new: PrefillArguments, context: CachedContext, room: _Room, result: State, settings: Settings, *,
    deterministic: bool, backend: str | None,
) -> None:  # fmt: skip
    """To the new tokens, then to the context window by window, some heads at a time."""
    out, lse = torch.empty_like(result[0], dtype=torch.float32), torch.empty_like(result[1])
    serve_prefill(new, out, lse, deterministic=deterministic, backend=backend)
    part = tuple(torch.empty_like(whole[:, : room.heads]) for whole in (out, lse))
    runner: PrefillRunner | None = None
    for window in context.windows(room.rows, fixed=deterministic):
        context.gather(window, room.latent[: window.rows])
        for first in range(0, lse.shape[1], room.heads):
            heads = slice(first, first + room.heads)
            some = room.expand(context, window, new.inputs, heads)
            if runner is None:  # the first window is the longest
                arguments = PrefillArguments(some, new.max_seqlen_q, window.longest, new.softmax_scale)
                wide = out.dtype != new.inputs.q.dtype
                runner = runner_for(arguments, settings, float32_out=wide, deterministic=deterministic, backend=backend)
            run_prefill(runner, some, *part, softmax_scale=new.softmax_scale)
            so_far = (out[:, heads], lse[:, heads])
            merge_into(so_far, (part[0][None], part[1][None]), *so_far)
    for final, running in zip(result, (out, lse), strict=True):
        final.copy_(running)


def head_groups(inputs: PrefillInputs, context: CachedContext, workspace: int, units: int) -> int:
    """In how many groups the heads are taken. Those of one share the workspace: with more groups it holds more tokens,
    and a result is merged less often. Each group still fills the device's compute units, and none is made in vain."""
    heads = inputs.q.shape[1]
    windows = -(-context.most_tokens * token_bytes(inputs, context) // workspace)
    tiles = -(-inputs.q.shape[0] // _TILE)

    def fills(groups: int) -> bool:
        waves = heads // groups * tiles / units
        return waves >= _LEAST_WAVES and math.ceil(waves) - waves <= _MOST_IDLE * math.ceil(waves)

    return max([1, *(n for n in range(2, min(windows, heads) + 1) if heads % n == 0 and fills(n))])


def token_bytes(inputs: PrefillInputs, context: CachedContext, heads: int | None = None) -> int:
    """Workspace of one context token: its latent row, and its keys and values for so many heads, or all."""
    widths = (heads or inputs.q.shape[1]) * (inputs.k_nope.shape[2] + inputs.v.shape[2])
    return (context.w_uk.shape[2] + inputs.k_pe.shape[1] + widths) * inputs.q.element_size()


@dataclass(frozen=True)
class _Room:
    """A workspace, as the tensors of one window and so many heads."""

    heads: int
    latent: Tensor  # [rows, latent + rope]
    k_nope: Tensor  # [rows, heads * nope]
    v: Tensor  # [rows, heads * v_dim]

    @classmethod
    def carve(cls, inputs: PrefillInputs, context: CachedContext, workspace: Tensor, heads: int) -> _Room:
        q, token = inputs.q, token_bytes(inputs, context, heads)
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
        latent = context.w_uk.shape[2] + inputs.k_pe.shape[1]
        widths = (latent, heads * inputs.k_nope.shape[2], heads * inputs.v.shape[2])
        parts = room.split([rows * width for width in widths])
        return cls(heads, *(part.view(rows, width) for part, width in zip(parts, widths, strict=True)))

    @property
    def rows(self) -> int:
        """Context tokens that fit."""
        return self.latent.shape[0]

    def expand(self, context: CachedContext, window: Window, inputs: PrefillInputs, heads: slice) -> PrefillInputs:
        """Up-project a gathered window for some heads: what their queries then attend to without a mask."""
        latent, k_nope, v = (part[: window.rows] for part in (self.latent, self.k_nope, self.v))
        latent_dim = context.w_uk.shape[2]
        for weight, result in ((context.w_uk[heads], k_nope), (context.w_uv[heads], v)):
            torch.matmul(latent[:, :latent_dim], weight.reshape(-1, latent_dim).T, out=result)
        return PrefillInputs(
            inputs.q[:, heads], k_nope.unflatten(1, (self.heads, -1)), latent[:, latent_dim:],
            v.unflatten(1, (self.heads, -1)),
            inputs.cu_seqlens_q, window.cu_seqlens, causal=False,
        )  # fmt: skip
