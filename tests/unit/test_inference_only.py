"""For inference alone: results never require grad, caches never enter autograd, and who asks for more is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from portable_mla import (
    CacheFormat,
    MLAShape,
    PagedLatentCache,
    merge_state,
    merge_states,
    mla_chunked_prefill,
    mla_decode,
    write_latent,
)
from tests.unit.test_scales import BF16, EXPANDED, ROWS, Q, chunked, context, fresh, ints, mixed, planned

Outputs = tuple[Tensor, ...]
GRADIENT = [tensor.clone().requires_grad_() for tensor in EXPANDED]
ASKING = Q.clone().requires_grad_()


def prefilled() -> Outputs:
    """mla_prefill of queries and keys that require grad."""
    from portable_mla import mla_prefill

    cu = ints(0, 3)
    q, k_nope, k_pe, v = GRADIENT
    return mla_prefill(q, k_nope, k_pe, v, cu, cu, max_seqlen_q=3, max_seqlen_k=3, softmax_scale=0.3)


def into_given() -> Outputs:
    """mla_decode into results of the caller's."""
    out, lse = torch.empty(1, 2, 8), torch.empty(1, 2)
    return mla_decode(
        ASKING, ROWS, ints(0, 1)[None], ints(8), softmax_scale=0.3, latent_dim=8, out=out, lse=lse
    )  # fmt: skip


def over_context() -> Outputs:
    """mla_chunked_prefill with weights that require grad."""
    known = context()
    weights = {"w_uk": known.w_uk.requires_grad_(), "w_uv": known.w_uv.requires_grad_()}
    result = chunked(context(**weights))
    assert isinstance(result, tuple)
    return result


def chunked_into(**given: Any) -> object:
    """mla_chunked_prefill into results of the caller's."""
    cu = ints(0, 3)
    return mla_chunked_prefill(
        *EXPANDED, cu, cu, context(), max_seqlen_q=3, max_seqlen_k=3, softmax_scale=0.3, **given
    )  # fmt: skip


def mixed_into(**given: Any) -> object:
    """MixedAttention.prefill into results of the caller's."""
    return fresh().prefill(*EXPANDED, softmax_scale=0.3, **given)


ENTRIES: dict[str, Callable[[], Outputs]] = {
    "mla_decode": lambda: mla_decode(ASKING, ROWS, ints(0, 1)[None], ints(8), softmax_scale=0.3, latent_dim=8),
    "mla_decode into": into_given,
    "planned": lambda: planned(BF16)(ASKING, ROWS, softmax_scale=0.3),
    "mixed decode": lambda: mixed(BF16, 1).decode(ASKING, ROWS, softmax_scale=0.3),
    "mixed prefill": lambda: fresh().prefill(*GRADIENT, softmax_scale=0.3),
    "mla_prefill": prefilled,
    "chunked": over_context,
    "merge_state": lambda: merge_state(ASKING, ASKING[..., 0].float(), Q, Q[..., 0]),
    "merge_states": lambda: merge_states(ASKING[None], ASKING[None, ..., 0]),
}


@pytest.mark.filterwarnings("ignore:portable_mla is for inference")
@pytest.mark.parametrize("entry", ENTRIES)
def test_results_never_require_grad(entry: str) -> None:
    for result in ENTRIES[entry]():
        assert not result.requires_grad and result.grad_fn is None and result.isfinite().all()


@pytest.mark.parametrize("entry", ENTRIES)
def test_who_could_ask_for_a_gradient_is_told_that_there_is_none(entry: str) -> None:
    with pytest.warns(UserWarning, match=r"portable_mla is for inference: [\w.]+ was given \w+, which requires grad"):
        ENTRIES[entry]()


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_gradients_nobody_is_told_anything(entry: str) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        ENTRIES[entry]()


@pytest.mark.filterwarnings("ignore:portable_mla is for inference")
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiled_results_do_not_require_grad_and_what_is_around_them_trains(mode: str) -> None:
    torch._dynamo.reset()
    weight = torch.ones(12, requires_grad=True)

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        q = q * weight
        out, _ = mla_decode(q, ROWS, ints_0, eight, softmax_scale=0.3, latent_dim=8)
        return out, q.sum()

    ints_0, eight = ints(0, 1)[None], ints(8)
    out, total = torch.compile(step, fullgraph=True, backend=mode)(Q)
    assert not out.requires_grad
    total.backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_a_cache_never_enters_autograd() -> None:
    cache, linear = PagedLatentCache(MLAShape(2, 8, 4, 4, torch.float32, CacheFormat.fp32), 4), nn.Linear(5, 12)
    cache.allocate("r", 8)
    rows = linear(torch.randn(4, 5))
    with pytest.warns(UserWarning, match="write_latent was given c_kv"):
        write_latent(cache[0], cache.slots("r", 0, 4), rows[:, :8], rows[:, 8:])
    with pytest.warns(UserWarning, match="PagedLatentCache.write was given rows"):
        cache.write(0, cache.slots("r", 4, 8), rows)
    assert not cache.storage.requires_grad and torch.equal(cache.storage.view(-1, 12)[:4], rows)


def test_a_result_that_requires_grad_is_not_written_to() -> None:
    out, lse = torch.empty(1, 2, 8, requires_grad=True), torch.empty(1, 2)
    with pytest.raises(ValueError, match="out: requires grad, and portable_mla is for inference"):
        mla_decode(Q, ROWS, ints(0, 1)[None], ints(8), softmax_scale=0.3, latent_dim=8, out=out, lse=lse)


@pytest.mark.parametrize("name", ["out", "lse"])
@pytest.mark.parametrize("entry", [chunked_into, mixed_into])
def test_nor_is_one_of_an_entry_point_that_is_no_op(entry: Callable[..., object], name: str) -> None:
    given = {"out": torch.empty(3, 2, 5), "lse": torch.empty(3, 2)}
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad, and portable_mla is for inference"):
        entry(**given)


def test_a_graph_that_writes_to_a_cache_says_so_while_it_is_traced() -> None:
    torch._dynamo.reset()
    cache, linear = PagedLatentCache(MLAShape(2, 8, 4, 4, torch.float32, CacheFormat.fp32), 4), nn.Linear(5, 12)
    cache.allocate("r", 4)
    slots = cache.slots("r", 0, 4)
    write = torch.compile(lambda x: cache.write(0, slots, linear(x)), backend="eager")
    with pytest.warns(UserWarning, match="PagedLatentCache.write was given rows"):
        write(torch.randn(4, 5))
    assert not cache.storage.requires_grad
