"""Hopper's Gluon prefill kernel without a Hopper: how tensors are shown to it, and what its compiled variants use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla.core.arch import ARCHS
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.interface import PrefillInputs
from portable_mla.runtime.kernel_launch import KernelLaunch

pytest.importorskip("triton", reason="needs the package triton")

from portable_mla.backends.nvidia.hopper import backend as sm90

ROOT = Path(__file__).parents[2]


def prefill_request(heads: int = 20, max_context: int = 4096) -> Request:
    """Of DeepSeek's widths."""
    capacity = Capacity(
        max_batch=8, max_query_tokens=4096, max_query_len=4096, max_context=max_context, max_pages=0, cache_bytes=0
    )
    shape = MLAShape.expanded(heads, 128, 64, 128, torch.bfloat16)
    return Request(ARCHS["sm90"], shape, Phase.prefill, 4096, False, False, capacity)


def inputs(tokens: int, keys: int, heads: int = 20, *, causal: bool = True) -> PrefillInputs:
    """k_nope and v as views of one projection, k_pe as a view of latent cache rows."""
    q = torch.zeros(tokens, heads, 192, dtype=torch.bfloat16)
    projected = torch.zeros(keys, heads, 256, dtype=torch.bfloat16)
    k_pe = torch.zeros(keys, 576, dtype=torch.bfloat16)[:, 512:]
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([0, keys], dtype=torch.int32)
    return PrefillInputs(q, projected[..., :128], k_pe, projected[..., 128:], *cu_seqlens, causal=causal)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """Grids and arguments of the launches from here on, which only look as if they happened."""
    seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def launch(self: KernelLaunch, key: object, grid: tuple[int, ...], *arguments: Any) -> None:
        hash(key)
        assert set(self._kernel.arg_names[len(arguments) :]) <= set(self._constants)
        assert len(arguments) + len(self._trailing) == len(self._kernel.arg_names)
        seen.append((grid, dict(zip(self._kernel.arg_names, arguments, strict=False)) | self._constants))

    monkeypatch.setattr(KernelLaunch, "__call__", launch)
    return seen


def results(tokens: int, heads: int = 20) -> tuple[Tensor, Tensor]:
    """out and lse."""
    return torch.empty(tokens, heads, 128, dtype=torch.bfloat16), torch.empty(tokens, heads)


def test_views_are_read_in_place_and_odd_tensors_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.prefill.runner import Sm90PrefillRunner

    seen = launches(monkeypatch)
    runner = Sm90PrefillRunner(prefill_request())
    given = inputs(300, 500)
    runner.run(given, *results(300), softmax_scale=0.1)
    grid, call = seen.pop()
    assert grid == (80,), "4 slots of 20 heads: 3 row tiles of 300 tokens and one that may hold padding"
    assert call["k_nope_desc"].base.data_ptr() == given.k_nope.data_ptr()
    assert (call["k_nope_desc"].shape, call["k_nope_desc"].strides) == ([500, 19 * 256 + 128], [20 * 256, 1])
    assert (call["k_pe_desc"].shape, call["k_pe_desc"].strides) == ([500, 64], [576, 1])
    assert (call["v_desc"].base.data_ptr(), call["stride_v_head"]) == (given.v.data_ptr(), 256)
    assert (call["CAUSAL"], call["tokens"], call["keys"], call["batch"]) == (True, 300, 500, 1)
    odd = torch.zeros(500, 65, dtype=torch.bfloat16)[:, 1:]
    full = PrefillInputs(given.q, given.k_nope, odd, given.v, given.cu_seqlens_q, given.cu_seqlens_k, causal=False)
    runner.run(full, *results(300), softmax_scale=0.1)
    grid, call = seen.pop()
    assert call["k_pe_desc"].base.data_ptr() != odd.data_ptr()
    assert call["k_pe_desc"].strides == [64, 1]
    assert not call["CAUSAL"]


def test_no_keys_and_no_queries_are_no_descriptors_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.prefill.runner import Sm90PrefillRunner

    seen = launches(monkeypatch)
    runner = Sm90PrefillRunner(prefill_request())
    runner.run(inputs(0, 5), *results(0), softmax_scale=0.1)
    assert not seen
    runner.run(inputs(1, 0), *results(1), softmax_scale=0.1)
    ((_, call),) = seen
    assert call["v_desc"].shape[0] == 1


@pytest.mark.parametrize(
    ("heads", "max_context", "group"), [(128, 4096, 10), (128, 1 << 20, 1), (20, 4096, 10), (7, 64, 7)]
)
def test_heads_are_grouped_by_what_fits_l2(
    monkeypatch: pytest.MonkeyPatch, heads: int, max_context: int, group: int
) -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    from portable_mla.backends.nvidia.hopper.prefill.runner import Sm90PrefillRunner

    seen = launches(monkeypatch)
    runner = Sm90PrefillRunner(prefill_request(heads, max_context))
    runner.run(inputs(1, 1, heads), *results(1, heads), softmax_scale=0.1)
    assert seen[0][1]["head_group"] == group


def test_no_variant_spills_more_than_two_registers_and_no_wgmma_waits_for_another() -> None:
    if sm90.missing_names():
        pytest.skip(f"this Triton lacks {sm90.missing_names()}")
    code = """
from ci.compile import cross_compile, gate, prefill_variants
budgets = gate.read_budgets().get(gate.version(), {}).get("sm90", {})
for name, (request, causal) in list(prefill_variants.gluon_prefill_requests("sm90").items())[0:5:4]:
    compiled = cross_compile.compile_gluon_prefill(request, causal=causal)
    used = cross_compile.Resources.of(compiled)
    assert cross_compile.serialised_wgmma(compiled) == [], cross_compile.serialised_wgmma(compiled)
    assert cross_compile.stray_mbarriers(compiled) == [], (name, cross_compile.stray_mbarriers(compiled))
    assert used.matrix["HGMMA"] >= 80, used
    if gate.version() == "3.6":  # what the kernel was tuned on; 8 bytes cost nothing that was measured
        assert used.spills <= 8 and used.loop_spills <= 8, used
    elif budgets:
        assert gate.violations("sm90", {name: used}, budgets) == []
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
