"""MLALayer: every way through it against plain torch in float64, its weights, its heads divided, and bad input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import (
    MODELS,
    CacheFormat,
    Capacity,
    LayerGeometry,
    LayerStep,
    MixedAttention,
    MLAAttention,
    MLALayer,
    PagedLatentCache,
    Yarn,
    rope_table,
    softmax_scale,
    yarn_mscale,
)
from portable_mla.layer.step import token_places
from portable_mla.metadata import PagedBatch

PAGE = 4
YARN = Yarn(4.0, 64)
# Widths of the zoo's kinds: LoRA queries or none, GLM's and Mistral's ratios, no RoPE, LongCat's factors, half RoPE.
GEOMETRIES = {
    "deepseek-v2-lite": LayerGeometry(48, 4, 32, 8, 16, 16, softmax_scale(16, 8)),
    "deepseek-v3": LayerGeometry(48, 4, 32, 8, 16, 16, softmax_scale(16, 8, mscale=yarn_mscale(4.0)), 24),
    "glm-4.7-flash": LayerGeometry(40, 5, 32, 8, 24, 32, softmax_scale(24, 8), 24),
    "glm-5.3-flash": LayerGeometry(40, 2, 32, 0, 24, 24, softmax_scale(24, 0), 24),
    "longcat-flash": LayerGeometry(48, 4, 32, 8, 16, 16, softmax_scale(16, 8), 24, q_factor=1.4, latent_factor=1.2),
    "minicpm3-4b": LayerGeometry(40, 3, 16, 8, 16, 16, softmax_scale(16, 8), 24, rope_layout="half"),
    "mistral-small-4": LayerGeometry(64, 2, 32, 16, 16, 32, softmax_scale(16, 16), 24, bias=True),
}


def layer_of(geometry: LayerGeometry, seed: int = 0) -> MLALayer:
    """Random weights that give scores of a few units."""
    torch.manual_seed(seed)
    layer = MLALayer(geometry)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else torch.nn.init.uniform_(
            parameter, 0.5, 1.5
        )
    return layer


def table(geometry: LayerGeometry, device: str = "cpu") -> Tensor | None:
    return rope_table(256, geometry.rope_dim, yarn=YARN, device=device) if geometry.rope_dim else None


@torch.no_grad()
def plain(layer: MLALayer, hidden: Tensor, stored: Tensor | None = None) -> Tensor:
    """One whole sequence [n, hidden] through unabsorbed MLA in float64, written from the paper's formulas. stored: the
    rows [n, latent + rope] of a cache that quantises, in place of its own."""
    g, x = layer.geometry, hidden.double()
    weights = {name: parameter.double() for name, parameter in layer.named_parameters()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + g.norm_eps).sqrt() * weights[f"{name}.weight"]

    def rotate(value: Tensor) -> Tensor:  # [n, heads, rope], by complex numbers
        angles = torch.complex(cos.double(), sin.double())[: len(value), None]
        if g.rope_layout == "interleaved":
            return torch.view_as_real(
                torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous()) * angles
            ).flatten(-2)
        turned = torch.complex(*value.chunk(2, -1)) * angles
        return torch.cat([turned.real, turned.imag], -1)

    cos_sin = table(g, str(x.device))
    cos, sin = x.new_zeros(256, 0).chunk(2, 1) if cos_sin is None else cos_sin.double().chunk(2, 1)
    q = (
        linear("q_proj", x)
        if g.q_lora_rank is None
        else linear("q_b_proj", norm("q_a_layernorm", linear("q_a_proj", x)))
    )
    q = q.view(len(x), layer.heads, -1) * g.q_factor
    latent, k_pe = linear("kv_a_proj_with_mqa", x).split([g.latent_dim, g.rope_dim], -1)
    latent = norm("kv_a_layernorm", latent) * g.latent_factor
    k_pe = rotate(k_pe[:, None])[:, 0]
    if stored is not None:
        latent, k_pe = stored.double().split([g.latent_dim, g.rope_dim], -1)
    k_nope, v = linear("kv_b_proj", latent).view(len(x), layer.heads, -1).split([g.nope_dim, g.v_dim], -1)
    q_pe = rotate(q[..., g.nope_dim :])
    scores = torch.einsum("nhd,khd->hnk", q[..., : g.nope_dim], k_nope) + torch.einsum("nhd,kd->hnk", q_pe, k_pe)
    hidden_keys = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    weights_of_keys = (scores * g.softmax_scale).masked_fill(hidden_keys, -torch.inf).softmax(-1)
    return linear("o_proj", torch.einsum("hnk,khv->nhv", weights_of_keys, v).flatten(1))


@dataclass
class Server:
    """A layer with a paged cache whose unwritten slots are NaN, serving requests step by step."""

    layer: MLALayer
    absorbed_only: bool = False
    cache_format: CacheFormat = CacheFormat.fp32
    kv_scale: Tensor | None = None
    overlap: bool | None = None

    def __post_init__(self) -> None:
        geometry, weight = self.layer.geometry, self.layer.kv_b_proj.weight
        self.device = str(weight.device)
        shape = geometry.shape(
            weight.dtype, self.cache_format, page_size=PAGE, tensor_parallel=self.layer.tensor_parallel
        )
        self.cache = PagedLatentCache(shape, 64, device=self.device)
        self.cache.storage.view(torch.uint8).fill_(0xFF)  # NaN in every format
        capacity = Capacity(8, 256, 128, 128, 64)
        self.attention: MLAAttention | MixedAttention
        if self.absorbed_only:
            self.attention = MLAAttention(shape, capacity, device=self.device, uniform_queries=False)
        else:
            self.attention = MixedAttention(shape, capacity, device=self.device, decode_threshold=2)

    def step(self, parts: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """New tokens [n, hidden] of some requests -> their rows."""
        pool = self.cache.pool
        context = max((pool.kv_len(name) for name, _ in parts if name in pool.requests), default=0)
        for name, part in parts:
            (pool.extend if name in pool.requests else pool.allocate)(name, len(part))
        lens = [len(part) for _, part in parts]
        batch = self.cache.batch([name for name, _ in parts], query_lens=lens, max_query_len=max(lens))
        if isinstance(self.attention, MLAAttention):
            self.attention.plan(batch)
        else:
            self.attention.plan(batch, lens)
        cos_sin = table(self.layer.geometry, self.device)
        step = LayerStep.of(
            self.attention, batch, sum(lens), cos_sin, longest_context=context, overlap=self.overlap
        )  # fmt: skip
        hidden = torch.cat([part for _, part in parts])
        return list(self.layer(hidden, self.cache[0], step, kv_scale=self.kv_scale).split(lens))


def assert_close(got: Tensor, golden: Tensor, bound: float = 2**-16) -> float:
    """Each row within `bound` of its size, as float32 sums are."""
    error = float(((got.double() - golden).norm(dim=-1) / golden.norm(dim=-1)).max())
    assert error <= bound, f"worst row error {error:.1e}"
    return error


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> LayerGeometry:
    value: LayerGeometry = GEOMETRIES[request.param]
    return value


def hidden_states(geometry: LayerGeometry, *lens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, geometry.hidden_size, generator=generator) for n in lens]


@pytest.mark.parametrize("absorbed_only", [False, True], ids=["expanded", "absorbed"])
def test_prefill_decode_and_mixed_steps_are_plain_mla(geometry: LayerGeometry, absorbed_only: bool) -> None:
    server = Server(layer_of(geometry), absorbed_only)
    a, b = hidden_states(geometry, 23, 17)
    golden_a, golden_b = plain(server.layer, a), plain(server.layer, b)
    (first,) = server.step([("a", a[:9])])  # a prefill
    second, third = server.step([("a", a[9:10]), ("b", b[:11])])  # a decode beside a prefill
    fourth, fifth = server.step([("a", a[10:12]), ("b", b[11:])])  # two query tokens beside a prefill with a context
    last = [server.step([("a", a[i : i + 1])])[0] for i in range(12, 23)]  # decodes
    errors = [
        assert_close(torch.cat([first, second, fourth, *last]), golden_a),
        assert_close(torch.cat([third, fifth]), golden_b),
    ]
    print(f"worst row error {max(errors):.1e}")


def test_a_wrong_scale_would_be_seen(geometry: LayerGeometry) -> None:
    layer = layer_of(geometry)
    (a,) = hidden_states(geometry, 12)
    golden = plain(layer, a)
    layer.geometry = replace(geometry, softmax_scale=1.001 * geometry.softmax_scale)
    with pytest.raises(AssertionError, match="worst row error"):
        assert_close(Server(layer).step([("a", a)])[0], golden)


def test_the_heads_of_all_ranks_add_up_to_the_whole(geometry: LayerGeometry) -> None:
    whole = layer_of(geometry)
    (a,) = hidden_states(geometry, 15)
    ranks = geometry.heads
    total = torch.zeros(15, geometry.hidden_size, dtype=torch.float64)
    for rank in range(ranks):
        part = MLALayer(geometry, rank=rank, tensor_parallel=ranks)
        part.load_state_dict(whole.state_dict())
        assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in whole.parameters()) or ranks == 1
        server = Server(part)
        total += torch.cat([*server.step([("a", a[:14])]), *server.step([("a", a[14:])])]).double()
    assert_close(total, plain(whole, a))


def _load(layer: MLALayer, other: MLALayer) -> None:
    layer.load_state_dict(other.state_dict())


def _copy_data(layer: MLALayer, other: MLALayer) -> None:
    for name, parameter in layer.named_parameters():
        parameter.data.copy_(other.get_parameter(name))


def _copy_in_inference_mode(layer: MLALayer, other: MLALayer) -> None:
    with torch.inference_mode():
        for name, parameter in layer.named_parameters():
            parameter.copy_(other.get_parameter(name))


def _replace(layer: MLALayer, other: MLALayer) -> None:
    for name, module in other.named_children():
        setattr(layer, name, module)


@pytest.mark.parametrize("change", [_load, _copy_data, _copy_in_inference_mode, _replace])
def test_weights_that_change_in_any_way_are_the_ones_that_serve(
    geometry: LayerGeometry, change: Callable[[MLALayer, MLALayer], None]
) -> None:
    one, two = layer_of(geometry, 1), layer_of(geometry, 2)
    (a,) = hidden_states(geometry, 15)
    server = Server(two)
    server.step([("a", a[:5])])
    server.step([("a", a[5:])])  # over a cached context
    golden = plain(one, a)
    change(two, one)
    assert_close(torch.cat([*Server(two).step([("b", a)])]), golden)
    server.cache.free("a")
    assert_close(torch.cat([*server.step([("a", a[:5])]), *server.step([("a", a[5:])])]), golden)


class _Adapter(torch.nn.Module):
    """A low-rank change on top of a linear layer, which keeps its weight."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.bias = base, base.bias

    @property
    def weight(self) -> Tensor:
        """The base's."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Twice the base."""
        doubled: Tensor = 2 * self.base(x)
        return doubled


def test_an_adapter_on_what_is_absorbed_is_refused_by_name(geometry: LayerGeometry) -> None:
    layer = layer_of(geometry)
    layer.kv_b_proj = _Adapter(layer.kv_b_proj)  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match=r"kv_b_proj: expected a plain torch.nn.Linear.*test_layer\._Adapter"):
        Server(layer).step([("a", hidden_states(geometry, 2)[0])])


def test_an_adapter_on_another_projection_is_used(geometry: LayerGeometry) -> None:
    layer = layer_of(geometry)
    (a,) = hidden_states(geometry, 9)
    projection = layer.kv_a_proj_with_mqa
    layer.kv_a_proj_with_mqa = _Adapter(projection)  # type: ignore[assignment]
    got = [torch.cat([*Server(layer, absorbed_only=absorbed).step([("a", a)])]) for absorbed in (False, True)]
    layer.kv_a_proj_with_mqa = projection
    projection.weight.data.mul_(2)
    if layer.kv_a_proj_with_mqa.bias is not None:
        layer.kv_a_proj_with_mqa.bias.data.mul_(2)
    for rows in got:
        assert_close(rows, plain(layer, a))


def test_an_fp8_cache_is_attended_to_as_it_is_stored(geometry: LayerGeometry) -> None:
    scale = torch.tensor(0.03)
    server = Server(layer_of(geometry), True, CacheFormat.fp8_e4m3, scale)
    (a,) = hidden_states(geometry, 15)
    rows = torch.cat([*server.step([("a", a[:9])]), *server.step([("a", a[9:])])])
    slots = server.cache.slots("a", 0, 15)
    stored = server.cache[0].view(-1, server.cache.shape.row_width)[slots].float() * scale
    assert_close(rows, plain(server.layer, a, stored))


def test_decodes_hold_no_copy_of_the_weights(geometry: LayerGeometry) -> None:
    layer = layer_of(geometry)
    Server(layer).step([("a", hidden_states(geometry, 2)[0])])
    assert layer.memory() == {"parameters": sum(parameter.nbytes for parameter in layer.parameters())}
    assert all(
        view.untyped_storage().data_ptr() == layer.kv_b_proj.weight.untyped_storage().data_ptr()
        for view in layer.up_projections()
    )


def test_padding_rows_are_written_nowhere() -> None:
    batch = PagedBatch(
        torch.tensor([[3], [1]], dtype=torch.int32),
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([2, 0], dtype=torch.int32),
        2,
    )
    slots, positions = token_places(batch, 4, PAGE)
    assert slots.tolist() == [12, 13, -1, -1]
    assert positions.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if None not in (model.nope_dim, model.v_dim)])
def test_every_published_geometry_makes_a_layer(name: str) -> None:
    model = MODELS[name]
    assert model.nope_dim is not None and model.v_dim is not None
    geometry = LayerGeometry(
        64,
        model.heads,
        model.latent_dim,
        model.rope_dim,
        model.nope_dim,
        model.v_dim,
        softmax_scale(model.nope_dim, model.rope_dim),
        model.q_lora_rank,
    )
    layer = MLALayer(geometry, device="meta", dtype=torch.bfloat16)
    shape = geometry.shape(torch.bfloat16, CacheFormat.bf16)
    assert shape == model.shape()
    assert layer.kv_b_proj.weight.shape == (model.heads * (model.nope_dim + model.v_dim), model.latent_dim)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 0, "hidden_size: expected a positive number, got 0"),
        ("softmax_scale", -0.1, "softmax_scale: expected a positive finite float, got -0.1"),
        ("rope_dim", 7, "rope_dim: expected an even width from 0, got 7"),
        ("q_lora_rank", 0, "q_lora_rank: expected a positive number, got 0"),
    ],
)
def test_a_wrong_geometry_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GEOMETRIES["deepseek-v3"], **{field: value})


def test_wrong_calls_are_refused() -> None:
    geometry = GEOMETRIES["deepseek-v3"]
    server = Server(layer_of(geometry))
    with pytest.raises(
        ValueError, match=r"rank, tensor_parallel: expected a rank below a divisor of 4 heads, got 0 and 3"
    ):
        MLALayer(geometry, tensor_parallel=3)
    with pytest.raises(ValueError, match="tensor_parallel: expected a divisor of 4 heads, got 3"):
        geometry.shape(torch.bfloat16, CacheFormat.bf16, tensor_parallel=3)
    with pytest.raises(ValueError, match=r"hidden: expected \[tokens, 48\], got \[3, 47\]"):
        server.step([("a", torch.zeros(3, 47))])
    server.layer = MLALayer(geometry, tensor_parallel=2)
    server.attention = Server(layer_of(geometry)).attention
    with pytest.raises(ValueError, match="step: expected an attention of 2 heads, got 4"):
        server.step([("b", torch.zeros(3, 48))])


def test_softmax_scale_is_deepseek_v3s() -> None:
    assert softmax_scale(128, 64, mscale=yarn_mscale(40.0)) == pytest.approx(
        192**-0.5 * 1.3688879454113936**2, rel=1e-12
    )
