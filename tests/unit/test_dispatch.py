"""Dispatch: asked for any architecture from any machine, every reason kept, nothing falls back unasked."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from portable_mla import CacheFormat, Capacity, MLAShape, NoBackend, Phase, Request, arch_named, explain, select
from portable_mla.core.arch import ARCHS
from portable_mla.dispatch import select as dispatch_module
from portable_mla.dispatch.registry import BACKENDS, ORDER
from portable_mla.models import MODELS

SHAPE = MLAShape(16, 512, 64, 64, torch.bfloat16, CacheFormat.bf16)
CAPACITY = Capacity(8, 8, 1, 4096, 512, 1 << 30)


def request(arch: str, shape: MLAShape = SHAPE, phase: Phase = Phase.decode) -> Request:
    """A decode of DeepSeek-V3's TP8 rank."""
    return Request(arch_named(arch), shape, phase, 1, True, False, CAPACITY)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_serves_every_model_of_the_zoo(arch: str) -> None:
    for model in MODELS.values():
        explanation = explain(request(arch, model.shape()))
        assert explanation.chosen is not None
        assert [candidate.name for candidate in explanation.candidates] == list(ORDER[arch])


def test_the_cpu_backend_comes_before_the_reference() -> None:
    assert explain(request("cpu")).chosen == "cpu"
    assert [candidate.name for candidate in explain(request("cpu")).candidates] == ["cpu", "reference"]


NO_WIDTHS = "needs a shape's nope_dim and v_dim, got None and None"


def test_a_refusal_lists_every_reason_and_quotes_both_sides() -> None:
    shape = dataclasses.replace(SHAPE, latent_dim=300, cache_format=CacheFormat.fp8_e4m3)
    explanation = explain(request("sm90", shape))
    assert explanation.chosen == "reference"
    reasons = {candidate.name: candidate.reasons for candidate in explanation.candidates}
    assert reasons["gluon"] == (
        "needs latent+rope of 512+64, 512+0, got 300+64; triton has more",
        "needs a bf16 or fp16 cache, got fp8_e4m3",
    )
    assert reasons["triton"] == ("needs latent+rope of 512+64, 512+0, 256+64, 256+32, 128+32, got 300+64",)
    assert explain(request("cpu", phase=Phase.prefill)).candidates[1].reasons == (NO_WIDTHS,)


def test_no_backend_prints_the_request_and_every_reason() -> None:
    with pytest.raises(NoBackend) as caught:
        select(request("cpu", phase=Phase.prefill))
    message = str(caught.value)
    assert "prefill on cpu: 16 heads, nope None + rope 64, v None, q bfloat16, query_len <= 1" in message
    assert f"cpu: {NO_WIDTHS}" in message
    assert f"reference: {NO_WIDTHS}" in message


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_serves_the_prefill_of_every_model_that_states_its_widths(arch: str) -> None:
    for model in MODELS.values():
        explanation = explain(request(arch, model.shape(), Phase.prefill))
        if model.nope_dim is not None:
            assert explanation.chosen not in (None, "reference"), str(explanation)


@pytest.mark.parametrize("arch", ["cpu", "sm90"])
def test_a_prefill_is_served_by_its_widths_alone(arch: str) -> None:
    shape = MLAShape.expanded(16, 128, 64, 128, torch.bfloat16)
    cached = MODELS["deepseek-v3"].shape(tensor_parallel=8, page_size=1)
    assert explain(request(arch, shape, Phase.prefill)).chosen == explain(request(arch, cached, Phase.prefill)).chosen


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    shape = dataclasses.replace(SHAPE, cache_format=CacheFormat.fp32)
    assert explain(request("sm90", shape)).chosen == "reference"
    with pytest.raises(NoBackend, match="asked for by name.*\n.*needs a bf16, fp16 or fp8 cache"):
        select(request("sm90", shape), "triton")


def test_a_backend_of_another_architecture_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(NoBackend, match="not registered for sm90, whose backends are .*reference"):
        select(request("sm90"), "cpu")


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of .*cpu, reference, got 'flashmal'"):
        select(request("cpu"), "flashmal")


def test_the_reference_by_default_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    shape = dataclasses.replace(SHAPE, cache_format=CacheFormat.fp32, page_size=33)
    with caplog.at_level(logging.WARNING, "portable_mla"):
        select(request("sm90", shape))
    assert "right but slow" in caplog.text


def test_selection_is_remembered() -> None:
    select(request("cpu"))
    before = dispatch_module.select.cache_info().hits
    assert select(request("cpu")) is select(request("cpu"))
    assert dispatch_module.select.cache_info().hits >= before + 2


def test_every_registered_backend_loads_and_is_in_some_order() -> None:
    for arch, order in ORDER.items():
        for name in order:
            backend = dispatch_module.load(name, ARCHS[arch].vendor)
            assert backend.reasons_unsupported(request(arch)) == ()
    assert {name for order in ORDER.values() for name in order} == set(BACKENDS)
