"""Softmax scales, scales of fp8 caches and bounds in bytes: checked the same way on every path."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from portable_mla import (
    CachedContext,
    CacheFormat,
    Capacity,
    LayerGeometry,
    MixedAttention,
    MLAAttention,
    MLALayer,
    MLAShape,
    PagedBatch,
    PlanMismatch,
    mla_chunked_prefill,
    mla_decode,
    mla_prefill,
    write_latent,
)
from portable_mla.backends import cpu
from portable_mla.dispatch.interface import PrefillInputs

WRONG = (0.0, -1.0, math.nan, math.inf, True, None, "0.1")
BF16 = MLAShape(2, 8, 4, 4, torch.float32, CacheFormat.fp32, 6, 5)
FP8 = MLAShape(2, 8, 4, 4, torch.float32, CacheFormat.fp8_e4m3, 6, 5)
Q = torch.linspace(-1, 1, 24).view(1, 2, 12)
ROWS = torch.linspace(-2, 2, 96).view(2, 4, 12)
EXPANDED = torch.randn(3, 2, 10), torch.randn(3, 2, 6), torch.randn(3, 4), torch.randn(3, 2, 5)


def ints(*values: int) -> Tensor:
    """int32."""
    return torch.tensor(values, dtype=torch.int32)


def batch(query_len: int = 1) -> PagedBatch:
    """One request of 8 tokens."""
    return PagedBatch(ints(0, 1)[None], ints(8), ints(query_len), query_len)


def planned(shape: MLAShape) -> MLAAttention:
    """An attention with a plan."""
    attention = MLAAttention(shape, Capacity(1, 1, 1, 16, 4), device="cpu", uniform_queries=False)
    attention.plan(batch())
    return attention


def mixed(shape: MLAShape, query_len: int) -> MixedAttention:
    """A mixed attention with a plan."""
    attention = MixedAttention(shape, Capacity(1, 4, 4, 16, 4), device="cpu", absorbed=True)
    attention.plan(batch(query_len), [query_len])
    return attention


def fresh() -> MixedAttention:
    """A mixed attention with a plan of three new tokens and none before."""
    attention = MixedAttention(BF16, Capacity(1, 4, 4, 16, 4), device="cpu")
    attention.plan(PagedBatch(ints(0, 1)[None], ints(3), ints(3), 3), [3])
    return attention


def context(**changes: object) -> CachedContext:
    """Five cached tokens of one sequence."""
    known = {"kv_cache": ROWS, "block_table": ints(0, 1)[None], "lens": ints(5), "max_len": 5}
    weights = {"w_uk": torch.randn(2, 6, 8), "w_uv": torch.randn(2, 5, 8)}
    return CachedContext(**(known | weights | changes))  # type: ignore[arg-type]


def chunked(context: CachedContext, softmax_scale: object = 0.3) -> object:
    """A chunked prefill of three tokens."""
    cu, bounds = ints(0, 3), {"max_seqlen_q": 3, "max_seqlen_k": 3}
    return mla_chunked_prefill(*EXPANDED, cu, cu, context, softmax_scale=softmax_scale, **bounds)  # type: ignore[arg-type]


SOFTMAX: dict[str, Callable[..., object]] = {
    "mla_decode": lambda s: mla_decode(Q, ROWS, ints(0, 1)[None], ints(8), softmax_scale=s, latent_dim=8),
    "planned": lambda s: planned(BF16)(Q, ROWS, softmax_scale=s),
    "mixed decode": lambda s: mixed(BF16, 1).decode(Q, ROWS, softmax_scale=s),
    "mixed prefill": lambda s: fresh().prefill(*EXPANDED, softmax_scale=s),
    "mixed context": lambda s: mixed(BF16, 3).prefill(*EXPANDED, softmax_scale=s, context=context()),
    "mixed absorbed": lambda s: mixed(BF16, 3).prefill_absorbed(Q.expand(3, 2, 12), ROWS, softmax_scale=s),
    "mla_prefill": lambda s: mla_prefill(
        *EXPANDED, ints(0, 3), ints(0, 3), max_seqlen_q=3, max_seqlen_k=3, softmax_scale=s
    ),
    "chunked": lambda s: chunked(context(), s),
    "geometry": lambda s: LayerGeometry(32, 2, 8, 4, 6, 5, s),
}


@pytest.mark.parametrize("scale", WRONG, ids=repr)
@pytest.mark.parametrize("entry", SOFTMAX)
def test_a_softmax_scale_that_is_no_positive_number_is_refused_by_every_entry_point(entry: str, scale: object) -> None:
    with pytest.raises(ValueError, match="softmax_scale: expected a positive finite float, got"):
        SOFTMAX[entry](scale)


@pytest.mark.parametrize("entry", SOFTMAX)
def test_a_scale_of_another_number_type_is_a_float_before_a_backend_sees_it(
    entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    decode, prefill = cpu.CpuRunner.run, cpu.CpuPrefill.run

    def note_decode(self: cpu.CpuRunner, *given: object, softmax_scale: float, kv_scale: Tensor | None = None) -> None:
        seen.append(softmax_scale)
        decode(self, *given, softmax_scale=softmax_scale, kv_scale=kv_scale)  # type: ignore[arg-type]

    def note_prefill(self: cpu.CpuPrefill, inputs: PrefillInputs, *given: Tensor, softmax_scale: float) -> None:
        seen.append(softmax_scale)
        prefill(self, inputs, *given, softmax_scale=softmax_scale)

    monkeypatch.setattr(cpu.CpuRunner, "run", note_decode)
    monkeypatch.setattr(cpu.CpuPrefill, "run", note_prefill)
    for scale in (1, np.float32(1), np.int64(1)):
        result = SOFTMAX[entry](scale)
        seen += [result.softmax_scale] if isinstance(result, LayerGeometry) else []
    assert len(seen) >= 3 and all(type(value) is float and value == 1.0 for value in seen)


def fp8() -> Tensor:
    """ROWS as an fp8 cache."""
    return ROWS.to(torch.float8_e4m3fn)


def written(scale: object) -> Tensor:
    """A cache after a write of one row."""
    cache = fp8()
    write_latent(cache, ints(0), torch.ones(1, 8), torch.ones(1, 4), kv_scale=scale)  # type: ignore[arg-type]
    return cache


def layer(scale: object) -> object:
    """A layer's decode over an fp8 cache."""
    from portable_mla import LayerStep

    module = MLALayer(LayerGeometry(32, 2, 8, 4, 6, 5, 0.3, q_lora_rank=8), dtype=torch.float32)
    step = LayerStep.of(planned(FP8), batch(), 1, torch.ones(16, 4))
    return module(torch.randn(1, 32), fp8(), step, kv_scale=scale)


SCALED: dict[str, Callable[..., object]] = {
    "mla_decode": lambda s: mla_decode(
        Q, fp8(), ints(0, 1)[None], ints(8), softmax_scale=0.3, latent_dim=8, kv_scale=s
    ),
    "planned": lambda s: planned(FP8)(Q, fp8(), softmax_scale=0.3, kv_scale=s),
    "mixed decode": lambda s: mixed(FP8, 1).decode(Q, fp8(), softmax_scale=0.3, kv_scale=s),
    "mixed absorbed": lambda s: mixed(FP8, 3).prefill_absorbed(
        Q.expand(3, 2, 12), fp8(), softmax_scale=0.3, kv_scale=s
    ),
    "chunked": lambda s: chunked(context(kv_cache=fp8(), kv_scale=s)),
    "write_latent": written,
    "layer": layer,
}


@pytest.mark.parametrize("scale", WRONG[:4], ids=repr)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("entry", SCALED)
def test_a_scale_of_an_fp8_cache_is_checked_by_value(entry: str, as_tensor: bool, scale: float) -> None:
    with pytest.raises(ValueError, match="kv_scale: expected a positive finite float, got"):
        SCALED[entry](torch.tensor(scale) if as_tensor else scale)


@pytest.mark.parametrize("entry", SCALED)
def test_a_scale_may_be_a_float_or_a_tensor(entry: str) -> None:
    torch.manual_seed(0)
    one = SCALED[entry](0.5)
    torch.manual_seed(0)
    other = SCALED[entry](torch.tensor(0.5))
    for left, right in zip(*((r if isinstance(r, tuple) else (r,)) for r in (one, other)), strict=True):
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        assert torch.equal(left.float(), right.float())


def test_a_stated_bound_in_bytes_is_compared_with_the_cache() -> None:
    attention = MLAAttention(BF16, Capacity(1, 1, 1, 16, 8, cache_bytes=64), device="cpu", uniform_queries=False)
    attention.plan(batch())
    with pytest.raises(PlanMismatch, match="cache_bytes: planned 64, got 384"):
        attention(Q, ROWS, softmax_scale=0.3)


def test_without_a_bound_the_pages_say_it_and_pages_that_are_apart_are_served_where_the_backend_can() -> None:
    assert planned(BF16).request.cache_bytes == 4 * 4 * 12 * 4
    layers = torch.zeros(2, 50, 4, 12)
    layers[:, 7] = ROWS
    expected, _ = planned(BF16)(Q, ROWS, softmax_scale=0.3)
    out, _ = planned(BF16)(Q, layers[:, 7], softmax_scale=0.3)
    assert torch.equal(out, expected)
