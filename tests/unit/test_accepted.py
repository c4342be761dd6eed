"""How much each backend serves. Tests skip what a backend refuses, so one that began to refuse would pass them all."""

from __future__ import annotations

import itertools

import pytest
import torch

from portable_mla import MODELS, CacheFormat, Capacity, MLAShape, Phase, Request, arch_named
from portable_mla.dispatch.registry import ORDER
from portable_mla.dispatch.select import load
from tests.support.prefill_cases import GEOMETRIES as EXPANDED
from tests.support.strategies import COMPILED

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAPACITY = Capacity(8, 64, 8, 4096, 512, 1 << 30)
QUANTISED = [one for one in CacheFormat if one.quantised]
PAIRS = [(arch, backend) for arch, backends in ORDER.items() for backend in backends]
# Requests that each serves at least: decodes of the contract tests' shapes, with ragged queries and deterministic or
# not; of fp8 caches; prefills of every geometry.
LEAST = {
    "cpu": (36, 18, 10),
    "reference": (36, 18, 10),
    "triton": (32, 12, 10),
    "gluon": (6, 0, 10),
    "flashmla": (2, 0, 0),
    "flash_attn3": (8, 0, 0),
    "flashinfer": (6, 0, 0),
    "aiter": (2, 0, 0),
    "aiter_persistent": (2, 0, 0),
}


def served(arch: str, backend: str, requests: list[Request]) -> int:
    one = load(backend, arch_named(arch).vendor)
    return sum(not one.reasons_unsupported(request) for request in requests)


def decodes(arch: str) -> list[Request]:
    found = []
    for heads, (latent, rope), page_size, dtype, query_len in COMPILED:
        shape = MLAShape(heads, latent, rope, page_size, DTYPES[dtype], CacheFormat[dtype])
        for uniform, deterministic in itertools.product((True, False), (True, False)):
            found.append(Request(arch_named(arch), shape, Phase.decode, query_len, uniform, deterministic, CAPACITY))
    return found


def quantised(arch: str) -> list[Request]:
    found = []
    for cache_format, heads, query_len in itertools.product(QUANTISED, (16, 64, 128), (1, 2)):
        shape = MLAShape(heads, 512, 64, 64, torch.bfloat16, cache_format)
        found.append(Request(arch_named(arch), shape, Phase.decode, query_len, True, False, CAPACITY))
    return found


def prefills(arch: str) -> list[Request]:
    found = []
    for (nope, rope, v_dim), dtype in itertools.product(EXPANDED, (torch.bfloat16, torch.float16)):
        shape = MLAShape.expanded(16, nope, rope, v_dim, dtype)
        found.append(Request(arch_named(arch), shape, Phase.prefill, 64, False, False, CAPACITY))
    return found


@pytest.mark.parametrize(("arch", "backend"), PAIRS)
def test_a_backend_serves_no_less_than_it_did(arch: str, backend: str) -> None:
    found = tuple(served(arch, backend, ask(arch)) for ask in (decodes, quantised, prefills))
    least = LEAST[backend]
    assert all(n >= before for n, before in zip(found, least, strict=True)), f"serves {found}, and served {least}"


@pytest.mark.parametrize("arch", ORDER)
def test_the_first_backend_of_an_architecture_serves_deepseek(arch: str) -> None:
    request = Request(arch_named(arch), MODELS["deepseek-v3"].shape(), Phase.decode, 1, True, False, CAPACITY)
    assert served(arch, ORDER[arch][0], [request]) == 1
