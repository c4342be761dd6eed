"""A benchmark of kernels that fail is red, and nothing takes their place as what is right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ci import bench_decode, bench_prefill
from ci.card import Card
from portable_mla import MODELS

Contender = Callable[[Any], list[Callable[[], object]]]
CARD = Card(4.8, 4.0, 700.0, 1.0)
GEOMETRY = (128, 64, 128)


def answers(value: float) -> Contender:
    return lambda problem: [lambda: torch.full((2, 4), value)]


def fails(error: Exception) -> Contender:
    def build(problem: Any) -> list[Callable[[], object]]:
        raise error

    return build


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two tokens, beside contenders that no clock times."""
    monkeypatch.setattr(bench_decode, "apart", lambda calls: calls)
    monkeypatch.setattr(bench_decode, "graph_us", lambda calls: 5.0)
    monkeypatch.setattr(bench_decode, "PEERS", {"peer": answers(1.0), "absent": fails(ImportError("not installed"))})
    request = SimpleNamespace(shape=MODELS["deepseek-v3"].shape())
    return SimpleNamespace(
        q=torch.zeros(2, 4), kv_lens=[64, 64], batch=SimpleNamespace(max_query_len=1), request=lambda: request
    )


def with_ours(monkeypatch: pytest.MonkeyPatch, name: str, ours: Contender) -> None:
    kind = "PLANNED" if name.startswith("planned") else "OURS"
    monkeypatch.setattr(bench_decode, kind, {name: ours})


@pytest.mark.parametrize("name", bench_decode.OWN)
@pytest.mark.parametrize("error", [RuntimeError("no kernel"), AssertionError("a launch is wrong"), ImportError("gone")])
def test_a_decode_benchmark_ends_where_its_own_kernels_fail(
    problem: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    with_ours(monkeypatch, name, fails(error))
    with pytest.raises(SystemExit, match=f"{name} fails: {type(error).__name__}: {error}"):
        bench_decode.measure(problem, [name, "peer"], CARD)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_a_decode_benchmark_ends_where_results_differ(
    problem: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    with_ours(monkeypatch, "ours", answers(wrong))
    with pytest.raises(SystemExit, match="differs from"):
        bench_decode.measure(problem, ["ours", "peer"], CARD)  # type: ignore[arg-type]


def test_a_peer_that_is_absent_has_no_time(problem: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with_ours(monkeypatch, "ours", answers(1.0))
    found = bench_decode.measure(problem, ["ours", "peer", "absent"], CARD)  # type: ignore[arg-type]
    assert set(found) == {"floor", "ours", "peer"}


@pytest.mark.parametrize("name", ["gluon", "triton", "cudnn"])
def test_a_prefill_benchmark_ends_where_its_own_kernels_fail(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def call() -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench_prefill, "inputs_of", lambda *sizes: None)
    monkeypatch.setattr(bench_prefill, "contenders", lambda *sizes: {name: call})
    if name in bench_prefill.PEERS:
        assert "TFLOP/s" not in bench_prefill.measure(GEOMETRY, "1x64x16", 1, 1.0)
    else:
        with pytest.raises(SystemExit, match=f"{name} fails: no kernel"):
            bench_prefill.measure(GEOMETRY, "1x64x16", 1, 1.0)
