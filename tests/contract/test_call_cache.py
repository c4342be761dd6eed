"""Which calls of an attention are alike, so that what was worked out for one serves the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from portable_mla import PlanMismatch
from portable_mla.decode.call_cache import PlannedCalls
from portable_mla.dispatch.interface import CallMemo
from tests.contract.test_attention import CAPACITY, attention
from tests.support.cases import Case, build

Q = torch.zeros(4, 4, 576, dtype=torch.bfloat16)
CACHE = torch.zeros(8, 16, 576, dtype=torch.bfloat16)
OUT, LSE = torch.zeros(4, 4, 512, dtype=torch.bfloat16), torch.zeros(4, 4)
WIDE_OUT, WIDE_LSE = torch.zeros(4, 5, 520, dtype=torch.bfloat16), torch.zeros(4, 5)
# Calls that differ from (Q, CACHE, OUT, LSE) in one thing.
OTHERS: dict[str, tuple[Tensor, ...]] = {
    "fewer tokens": (Q[:3], CACHE, OUT[:3], LSE[:3]),
    "queries elsewhere": (Q.clone(), CACHE, OUT, LSE),
    "strides of queries": (torch.zeros(4, 5, 576, dtype=torch.bfloat16)[:, :4], CACHE, OUT, LSE),
    "fewer pages": (Q, CACHE[:7], OUT, LSE),
    "a cache elsewhere": (Q, CACHE.clone(), OUT, LSE),
    "strides of pages": (Q, CACHE.as_strided((4, 16, 576), (2 * 16 * 576, 576, 1)), OUT, LSE),
    "strides of out": (Q, CACHE, WIDE_OUT[:, :4, :512], LSE),
    "alignment of out": (Q, CACHE, WIDE_OUT[:, :4, 1:513], LSE),
    "strides of lse": (Q, CACHE, OUT, WIDE_LSE[:, :4]),
    "alignment of lse": (Q, CACHE, OUT, WIDE_LSE[:, 1:]),
}


@pytest.fixture
def calls() -> PlannedCalls:
    """Calls of an attention."""
    return PlannedCalls(replace(attention().request, capacity=CAPACITY), lambda request: ())


def memo(calls: PlannedCalls, *tensors: Tensor, ours: bool = False) -> CallMemo:
    """Of one call."""
    q, kv_cache, out, lse = tensors
    return calls.memo(q, kv_cache, out, lse, ours=ours)


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_a_call_is_alike_itself_and_no_other(calls: PlannedCalls, tensors: tuple[Tensor, ...]) -> None:
    first = memo(calls, Q, CACHE, OUT, LSE)
    other = memo(calls, *tensors)
    assert other is not first
    assert memo(calls, *tensors) is other
    assert memo(calls, Q, CACHE, OUT, LSE) is first


def test_new_results_of_ours_are_alike_wherever_they_lie(calls: PlannedCalls) -> None:
    first = memo(calls, Q, CACHE, OUT, LSE, ours=True)
    assert memo(calls, Q, CACHE, OUT.clone(), LSE.clone(), ours=True) is first
    assert memo(calls, Q, CACHE, OUT, LSE) is not first, "a caller's may be anything"
    odd = torch.zeros(4 * 4 * 512 + 1, dtype=torch.bfloat16)[1:].view(4, 4, 512)
    assert memo(calls, Q, CACHE, odd, LSE, ours=True) is not first, "kernels are specialised on alignment"


def test_what_is_refused_is_refused_again(calls: PlannedCalls) -> None:
    for _ in range(2):
        with pytest.raises(PlanMismatch, match="page_size: planned 16, got 8"):
            memo(calls, Q, CACHE.view(16, 8, 576), OUT, LSE)


def test_an_attention_says_which_results_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def note(self: PlannedCalls, q: Tensor, kv_cache: Tensor, *_: Tensor, ours: bool) -> CallMemo:
        seen.append(ours)
        return CallMemo(q.shape[0], kv_cache.shape[0])

    monkeypatch.setattr(PlannedCalls, "memo", note)
    attend = attention()
    problem = build(Case((33, 5)))
    attend.plan(problem.batch)
    out, lse = attend(problem.q, problem.kv_cache, softmax_scale=0.1)
    attend(problem.q, problem.kv_cache, out, softmax_scale=0.1)
    attend(problem.q, problem.kv_cache, None, lse, softmax_scale=0.1)
    attend(problem.q, problem.kv_cache, out, lse, softmax_scale=0.1)
    with torch.autograd.profiler.profile():  # through the op
        attend(problem.q, problem.kv_cache, softmax_scale=0.1)
    assert seen == [True, False, False, False, False]
