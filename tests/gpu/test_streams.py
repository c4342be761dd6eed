"""Two branches of a layer on two streams: the bits of one stream, in a graph too, whatever memory is used again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from portable_mla import LayerGeometry, LayerStep, MLAAttention, MLALayer, softmax_scale
from portable_mla.core.cache_format import CacheFormat
from portable_mla.runtime.streams import Fork
from tests.contract.test_layer import GEOMETRIES, Server, assert_close, hidden_states, layer_of, plain, table

# DeepSeek-V3's attention of 16 heads, in a narrow model
GEOMETRY = LayerGeometry(1024, 16, 512, 64, 128, 128, softmax_scale(128, 64), 512)
BFLOAT16 = 2**-5  # of a row: sums of rounded values, through four products


def served(layer: MLALayer, hidden: Tensor, *, overlap: bool, absorbed_only: bool = True) -> tuple[Tensor, Tensor]:
    """Every row of a prompt and of a few decodes, and the cache's bytes."""
    server = Server(layer, absorbed_only, cache_format_of(layer), overlap=overlap)
    rows = [*server.step([("a", hidden[:9])])]
    rows += [server.step([("a", hidden[i : i + 1])])[0] for i in range(9, len(hidden))]
    return torch.cat(rows), server.cache.storage.view(torch.uint8)


def cache_format_of(layer: MLALayer) -> CacheFormat:
    return CacheFormat(layer.kv_b_proj.weight.dtype)


def gpu_layer() -> tuple[MLALayer, Tensor]:
    layer = layer_of(GEOMETRY)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.3
    layer = layer.to("cuda", torch.bfloat16)
    return layer, hidden_states(GEOMETRY, 21)[0].to("cuda", torch.bfloat16)


@pytest.mark.parametrize("absorbed_only", [False, True], ids=["mixed", "absorbed"])
def test_on_a_cpu_it_changes_nothing(absorbed_only: bool) -> None:
    layer = layer_of(GEOMETRIES["deepseek-v3"])
    (hidden,) = hidden_states(layer.geometry, 21)
    one = served(layer, hidden, overlap=False, absorbed_only=absorbed_only)
    two = served(layer, hidden, overlap=True, absorbed_only=absorbed_only)
    assert all(map(torch.equal, one, two))


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(GEOMETRIES["deepseek-v3"])
    server = Server(layer, True)
    server.cache.allocate("a", 1)
    batch = server.cache.batch(["a"])
    assert isinstance(server.attention, MLAAttention)
    server.attention.plan(batch)
    for value, asked in (("1", True), ("0", False)):
        monkeypatch.setenv("PORTABLE_MLA_OVERLAP", value)
        assert LayerStep.of(server.attention, batch, 1, None).overlap is asked
        assert LayerStep.of(server.attention, batch, 1, None, overlap=not asked).overlap is not asked


@pytest.mark.gpu
@pytest.mark.parametrize("absorbed_only", [False, True], ids=["mixed", "absorbed"])
def test_on_a_gpu_the_layer_is_plain_mla_and_overlap_changes_no_bit(absorbed_only: bool) -> None:
    layer, hidden = gpu_layer()
    one = served(layer, hidden, overlap=False, absorbed_only=absorbed_only)
    golden = plain(layer, hidden)
    print(f"worst row error {assert_close(one[0], golden, BFLOAT16):.1e}")
    for _ in range(20):  # memory of one turn is another's in the next
        two = served(layer, hidden, overlap=True, absorbed_only=absorbed_only)
        assert all(map(torch.equal, one, two))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True, None], ids=["serial", "overlapped", "by itself"])
def test_a_captured_step_of_several_layers_has_the_bits_of_an_eager_one(overlap: bool | None) -> None:
    layer, hidden = gpu_layer()
    layers = 6
    server = Server(layer, True, CacheFormat.bf16)
    server.step([("a", hidden[:9])])
    prompt = server.cache.storage[0].clone()
    caches = [prompt.clone() for _ in range(layers)]
    server.cache.pool.extend("a", 1)
    batch = server.cache.batch(["a"])
    attention = server.attention
    assert isinstance(attention, MLAAttention)
    cos_sin = table(GEOMETRY, "cuda")
    token = hidden[9:10].clone()

    def step(overlapped: bool | None) -> Tensor:
        where = LayerStep.of(attention, batch, 1, cos_sin, overlap=overlapped)
        x = token
        for cache in caches:
            x = x + layer(x, cache, where)
        return x

    attention.plan(batch)
    expected, stored = step(False).clone(), [cache.clone() for cache in caches]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(overlap)  # compiles for both streams
    torch.cuda.current_stream().wait_stream(stream)
    for cache in caches:
        cache.copy_(prompt)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(overlap)
    for _ in range(10):
        got.fill_(torch.nan)
        for cache in caches:
            cache.copy_(prompt)
        graph.replay()
        assert torch.equal(got, expected)
        assert all(
            torch.equal(one.view(torch.uint8), two.view(torch.uint8)) for one, two in zip(caches, stored, strict=True)
        )


@pytest.mark.gpu
def test_a_branch_waits_for_what_was_before_and_is_waited_for() -> None:
    x = torch.zeros(1 << 24, device="cuda")
    other = torch.zeros_like(x)
    for _ in range(20):
        for _ in range(30):
            x.add_(1)
        with Fork(x, enabled=True) as fork:
            with fork.beside():
                for _ in range(30):
                    torch.add(x, 1, out=other)
            x.sum()
        other.sub_(x)
        assert bool((other == 1).all())
