"""A planned call skips the dispatcher where nobody would see it there, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from portable_mla import MLAAttention
from portable_mla.runtime import fast_path as unobserved
from tests.contract.test_ops import planned
from tests.support.cases import Case, build

OP = torch.ops.portable_mla.decode_planned.default
PROBLEM = build(Case((33, 5, 17), dtype="fp32", garbage="zero"))


def call(attention: MLAAttention, q: Tensor = PROBLEM.q, **options: Any) -> tuple[Tensor, Tensor]:
    """One layer's call."""
    return attention(q, PROBLEM.kv_cache, **{"softmax_scale": 0.1, **options})


@pytest.fixture
def attention() -> MLAAttention:
    """One that serves `PROBLEM`."""
    return planned(PROBLEM)


@pytest.fixture
def direct(attention: MLAAttention) -> MLAAttention:
    """One that the dispatcher does not find."""
    attention._handle = -1
    return attention


def test_a_plain_call_skips_the_dispatcher_and_gives_the_same(attention: MLAAttention) -> None:
    out, lse = torch.empty(3, 4, 512), torch.empty(3, 4)
    OP(PROBLEM.q, PROBLEM.kv_cache, out, lse, attention._handle, 0.1)
    attention._handle = -1
    for got, expected in zip(call(attention), (out, lse), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode])
def test_so_does_a_call_that_records_no_gradients(direct: MLAAttention, scope: Callable[[], Any]) -> None:
    with scope():
        call(direct, PROBLEM.q.clone().requires_grad_())


class _Subclass(Tensor):
    pass


SEEN: dict[str, dict[str, Any]] = {
    "a subclass": {"q": PROBLEM.q.as_subclass(_Subclass)},
    "a parameter": {"q": torch.nn.Parameter(PROBLEM.q, requires_grad=False)},
    "gradients of an input": {"q": PROBLEM.q.clone().requires_grad_()},
    "a subclass of a result": {"out": torch.zeros(3, 4, 512).as_subclass(_Subclass), "lse": torch.zeros(3, 4)},
    "negated in name alone": {"q": torch._neg_view(PROBLEM.q)},
}


@pytest.mark.parametrize("options", SEEN.values(), ids=SEEN)
def test_what_the_dispatcher_may_treat_apart_reaches_it(direct: MLAAttention, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="handle of a living MLAAttention, got -1"):
        call(direct, **options)


def test_a_negation_in_name_alone_is_computed(attention: MLAAttention) -> None:
    assert torch.equal(call(attention, torch._neg_view(PROBLEM.q))[0], call(attention, -PROBLEM.q)[0])


def test_a_result_that_requires_grad_is_refused(direct: MLAAttention) -> None:
    with pytest.raises(ValueError, match="out: requires grad"):
        call(direct, out=torch.zeros(3, 4, 512).requires_grad_().clone(), lse=torch.zeros(3, 4))


def test_a_result_that_is_no_tensor_gets_the_error_of_the_op(attention: MLAAttention) -> None:
    with pytest.raises(RuntimeError, match="value of type 'Tensor' for argument 'lse' but instead found type 'list'"):
        call(attention, lse=[1])


def test_meta_tensors_give_meta_results(attention: MLAAttention) -> None:
    out, _ = attention(PROBLEM.q.to("meta"), PROBLEM.kv_cache.to("meta"), softmax_scale=0.1)
    assert out.is_meta and out.shape == (3, 4, 512)


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Dispatched, _Functions])
def test_a_mode_sees_the_op(attention: MLAAttention, mode: type[_Dispatched] | type[_Functions]) -> None:
    with mode() as entered:
        call(attention)
    assert OP in entered.seen


def test_a_profile_names_the_op(attention: MLAAttention) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(attention)
    assert "portable_mla::decode_planned" in {event.name for event in profile.events() or ()}


def test_tracers_record_the_op(attention: MLAAttention) -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return call(attention, q)[0]

    traced: Any = torch.jit.trace(Layer(), PROBLEM.q, check_trace=False)
    assert "decode_planned" in str(traced.graph)
    assert "decode_planned" in str(make_fx(Layer())(PROBLEM.q).graph)
    for strict in (False, True):
        assert "decode_planned" in str(torch.export.export(Layer(), (PROBLEM.q,), strict=strict).graph)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_a_transform_meets_the_op(direct: MLAAttention, transform: Callable[..., Any]) -> None:
    q = PROBLEM.q[None] if transform is torch.func.vmap else PROBLEM.q
    with pytest.raises((RuntimeError, ValueError), match=r"portable_mla::decode_planned|got -1"):
        transform(lambda q: call(direct, q)[0].sum())(q)


def test_a_torch_without_one_of_the_probes_dispatches_every_call(
    direct: MLAAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unobserved._found((*unobserved._OBSERVERS, "_C._no_such_probe")) is None
    monkeypatch.setattr(unobserved, "_ASKED", None)
    with pytest.raises(ValueError, match="got -1"):
        call(direct)
