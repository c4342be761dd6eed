"""write_latent: RMSNorm, RoPE, quantisation and the scatter of new rows to the paged cache, in one launch."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

from portable_mla.cache.write_arguments import WriteArguments, is_interleaved
from portable_mla.cache.write_launch import launch_write
from portable_mla.core.quantize import quantise_rows
from portable_mla.core.rope import RopeLayout, rotate
from portable_mla.decode.api import scale_tensor
from portable_mla.runtime.torch_ops import register_op


def write_latent(  # noqa: PLR0913 (the tensors and options of one write)
    kv_cache: Tensor,
    slots: Tensor,
    c_kv: Tensor,
    k_pe: Tensor | None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
    rope_layout: RopeLayout = "interleaved",
    kv_scale: float | Tensor | None = None,
    q_pe: Tensor | None = None,
    q_pe_out: Tensor | None = None,
    rows_out: Tensor | None = None,
    status: Tensor | None = None,
) -> None:
    """Normalise c_kv, rotate k_pe, quantise both where the cache is quantised, and store them: one launch.

    Everything is computed in float32 and rounded once, into the cache's dtype. Allocates nothing on a GPU, does not
    wait for the device, and may be captured in a graph (give kv_scale as a tensor there).

    Args:
        kv_cache: [pages, page_size, row] of a CacheFormat, any outer strides (multiples of 4 for fp8_656).
            latent and rope are c_kv's and k_pe's widths.
        slots: [tokens] int32 or int64, any stride: page * page_size + offset of each token's row. -1 stores nothing,
            which is also the way to pad; q_pe and rows_out are written all the same. Two tokens must not share a slot.
        c_kv: [tokens, latent] bfloat16, float16 or float32, rows dense in the last dimension.
        k_pe: [tokens, rope], as c_kv; None where the model has no rope.
        norm_weight: [latent], floating: c_kv * rsqrt(mean(c_kv**2) + eps) * norm_weight is stored. None: c_kv as it is.
        positions: [at least tokens] int32 or int64, any stride, such as `MLAAttention.positions`, which is read in
            place. Needed with cos_sin, and only then.
        cos_sin: [positions, rope] floating: rope / 2 cosines, then as many sines; see `rope_table`. None: k_pe (and
            q_pe) are stored as they are.
        rope_layout: which values turn together: "interleaved", 2 i and 2 i + 1 (DeepSeek's checkpoints), or "half", i
            and i + rope / 2. Values stay in their places, in the cache as in q_pe.
        kv_scale: one positive float32, required for per-tensor fp8 caches and refused elsewhere: row / kv_scale is
            stored, clamped to the format's range. fp8_656 computes its own scales, powers of two, 128 values each.
        q_pe: [tokens, heads, rope], any outer strides, rotated at the same positions, in place or into q_pe_out.
        q_pe_out: as q_pe, for instance the last columns of the absorbed query [tokens, heads, latent + rope].
        rows_out: [tokens, latent + rope], bfloat16, float16 or float32: also receives the rows, not quantised, such as
            a prefill expands into keys and values.
        status: `MLAAttention.status_words`. On a GPU, a slot outside the cache stores nothing, a kv_scale that is not
            positive and finite stores nothing either, and a position outside cos_sin makes NaN; given these words,
            `MLAAttention.check` reports the first of each.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what it got.
        IndexError: on a CPU, a slot or a position is outside the cache or the table; nothing was written.

    Inference only: the cache never enters autograd.
    """
    scale = scale_tensor(kv_scale, c_kv.device)
    source, target = (None, q_pe) if q_pe_out is None else (q_pe, q_pe_out)
    torch.ops.portable_mla.write_latent.default(
        kv_cache, slots, c_kv, k_pe, norm_weight, eps, positions, cos_sin, is_interleaved(rope_layout), scale,
        source, target, rows_out, status,
    )  # fmt: skip


def write_in_torch(call: WriteArguments) -> None:
    """What the kernel computes, bit for bit."""
    call.check_values()
    source = call.q_pe if call.q_source is None else call.q_source
    rope = (
        torch.empty(len(call.c_kv), 0, dtype=torch.float32, device=call.c_kv.device)
        if call.k_pe is None
        else call.k_pe.float()
    )
    if call.cos_sin is not None:
        assert call.positions is not None, "checked"
        table = call.cos_sin[call.positions[: len(call.slots)].long()]
        rope = rotate(rope, table, call.rope_layout)
        if call.q_pe is not None and source is not None:
            call.q_pe.copy_(rotate(source.float(), table[:, None], call.rope_layout))
    rows = torch.cat([_normalised(call), rope], dim=1)
    if call.rows is not None:
        call.rows.copy_(rows)
    stored = quantise_rows(rows, call.cache_format, call.kv_scale)
    kept = call.slots >= 0
    slots, page_size = call.slots[kept].long(), call.kv_cache.shape[1]
    call.kv_cache[slots // page_size, slots % page_size] = stored[kept]


def _normalised(call: WriteArguments) -> Tensor:
    """The factor is found in float64, where the order of the sum does not show in its float32."""
    latent = call.c_kv.float()
    if call.norm_weight is None:
        return latent
    mean = latent.double().square().mean(1, keepdim=True)
    factor = (1.0 / torch.sqrt(mean + call.eps)).float()
    return latent * factor * call.norm_weight.float()


def _write_latent(  # noqa: PLR0913 (the op's schema)
    kv_cache: Tensor,
    slots: Tensor,
    c_kv: Tensor,
    k_pe: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    interleaved: bool,
    kv_scale: Tensor | None,
    q_source: Tensor | None,
    q_pe: Tensor | None,
    rows: Tensor | None,
    status: Tensor | None,
) -> None:
    call = WriteArguments(
        kv_cache, slots, c_kv, k_pe, norm_weight, c_float(eps).value, positions, cos_sin, interleaved, kv_scale,
        q_source, q_pe, rows, status,
    )  # fmt: skip
    if len(slots) == 0:
        return
    write = write_in_torch if kv_cache.device.type == "cpu" else launch_write
    write(call)


register_op(
    "write_latent(Tensor(a!) kv_cache, Tensor slots, Tensor c_kv, Tensor? k_pe, Tensor? norm_weight, float eps, "
    "Tensor? positions, Tensor? cos_sin, bool interleaved, Tensor? kv_scale, Tensor? q_source, Tensor(b!)? q_pe, "
    "Tensor(c!)? rows, Tensor(d!)? status) -> ()",
    _write_latent,
    lambda *_, **__: None,
)
