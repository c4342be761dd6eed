"""The cache write: what is written is what is attended to, and what is wrong is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import CacheFormat, MLAAttention, MLAShape, PagedLatentCache, Yarn, arch_of, rope_table, write_latent
from portable_mla.backends import reference
from portable_mla.core.cache_format import LARGEST
from portable_mla.core.quantize import dequantise_rows
from portable_mla.core.rope import RopeLayout, rotate
from portable_mla.core.shape import Capacity
from tests.support import acceptance
from tests.support.cases import Case, build
from tests.support.targets import Target, local_targets
from tests.support.write_cases import CASES, SLOTS, WriteCase, written_bytes

LENS = (37, 5, 90)


def attend_written(cache_format: CacheFormat, device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """A decode step over rows that were written: q, the rows before they were stored, and the result."""
    rng = torch.Generator().manual_seed(1)
    shape = MLAShape(16, 512, 64, 16, torch.bfloat16, cache_format)
    cache = PagedLatentCache(shape, 12, device=device)
    cache.storage.view(torch.uint8).fill_(0xFF)  # NaN in every format
    table, weight = rope_table(128, 64, device=device), torch.rand(512, generator=rng).to(device)
    scale = 0.02 if cache_format.needs_scale else None
    rows = []
    for request, kv_len in enumerate(LENS):
        cache.allocate(request, kv_len)
        c_kv, k_pe = torch.randn(kv_len, 512, generator=rng).to(device), torch.randn(kv_len, 64, generator=rng)
        rows.append(torch.empty(kv_len, 576, device=device))
        write_latent(
            cache[0], cache.slots(request, 0, kv_len), c_kv, k_pe.to(device), norm_weight=weight, cos_sin=table,
            positions=torch.arange(kv_len, device=device), kv_scale=scale, rows_out=rows[-1],
        )  # fmt: skip
    batch, q = cache.batch(range(len(LENS))), torch.randn(3, 16, 576, generator=rng).bfloat16().to(device)
    attention = MLAAttention(shape, Capacity(3, 3, 1, 256, 12, cache[0].nbytes), device=device)
    attention.plan(batch)
    out, lse = attention(q, cache[0], softmax_scale=0.05, kv_scale=scale)
    kv_scale = None if scale is None else torch.tensor(scale, device=device)
    problem = replace(
        build(Case((1,))), q=q, kv_cache=cache[0], batch=batch, softmax_scale=0.05, kv_lens=LENS,
        query_lens=(1, 1, 1), kv_scale=kv_scale,
    )  # fmt: skip
    print(cache_format.name, acceptance.check(problem, out, lse))
    return q, rows, out


@pytest.mark.parametrize("device", sorted({target.device for target in local_targets()}))
@pytest.mark.parametrize("cache_format", [one for one in CacheFormat if one.quantised or one is CacheFormat.bf16])
def test_what_is_written_is_attended_to_and_the_error_of_the_format_is_published(
    cache_format: CacheFormat, device: str
) -> None:
    if cache_format.needs_scale and arch_of(device).float8 not in (None, cache_format.dtype):
        pytest.skip(f"{device} reads another fp8")
    q, rows, out = attend_written(cache_format, device)
    worst = 0.0
    for index, one in enumerate(rows):
        exact, _ = reference.attend(q[index : index + 1].double(), one.double(), 512, 0.05)
        error = (out[index].double() - exact[0]).square().mean(-1).sqrt() / exact[0].square().mean(-1).sqrt()
        worst = max(worst, error.max().item())
    print(f"{cache_format.name}: worst row's relative RMS against rows that were not quantised: {worst:.1e}")
    assert worst < (2**-7 if cache_format is CacheFormat.bf16 else 2**-4)


@pytest.mark.parametrize("target", [t for t in local_targets() if not t.of_a_library], ids=str)
@pytest.mark.parametrize("cache", ["fp8_e4m3", "fp8_e4m3fnuz", "fp8_656"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_decode_over_fp8_is_within_the_acceptance_rule(target: Target, cache: str, dtype: str) -> None:
    lens = (100, 7, 33, 0)
    for case in (
        Case(lens, 12, dtype=dtype, cache=cache, query_lens=(1, 2, 3, 0), max_query_len=3),
        Case((700, 64), 16, dtype=dtype, cache=cache, seed=1, content="needle", garbage="hot", page_size=64),
        Case((400,), 40, dtype=dtype, cache=cache, seed=2, page_size=1),
    ):
        wanted = arch_of(target.device).float8
        if CacheFormat[cache].needs_scale and wanted not in (None, CacheFormat[cache].dtype):
            pytest.skip(f"{target.device} reads another fp8")
        if target.accepts(case):
            target.solve(case)


def test_the_composed_operations_of_torch_have_the_same_bits() -> None:
    call = WriteCase().build()
    write(call)
    latent = call.c_kv.double()
    factor = (1 / torch.sqrt(latent.square().mean(1, keepdim=True) + call.eps)).float()
    assert call.norm_weight is not None
    assert call.k_pe is not None
    expected = (call.c_kv.float() * factor * call.norm_weight.float()).bfloat16()
    kept = torch.tensor(SLOTS) >= 0
    stored = call.kv_cache.view(-1, 576)[torch.tensor(SLOTS)[kept]]
    assert torch.equal(stored[:, :512], expected[kept])
    angles = torch.tensor([3, 1, 99, 5, 0, 44]).double()[:, None] * 10000.0 ** (-torch.arange(0, 64, 2) / 64).double()
    even, odd = call.k_pe.double()[:, 0::2], call.k_pe.double()[:, 1::2]
    turned = torch.stack(
        [even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1
    ).flatten(1)  # fmt: skip
    assert torch.allclose(stored[:, 512:].double(), turned[kept], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_rotated_products_depend_on_the_distance_alone(layout: RopeLayout) -> None:
    table = rope_table(500, 64, yarn=Yarn(40.0, 4096))
    q, k = torch.randn(2, 64)
    near, far = (rotate(q, table[a], layout) @ rotate(k, table[b], layout) for a, b in ((30, 10), (480, 460)))
    assert abs(near - far) < 1e-4
    assert abs(near - q @ k) > 1e-3


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones() -> None:
    plain, stretched = rope_table(2, 64), rope_table(2, 64, yarn=Yarn(40.0, 4096, attention_factor=2.0))
    angle = torch.asin(stretched[1, 32:].double() / 2)
    assert torch.allclose(angle[1:5], plain[1, 33:37].double().asin(), atol=1e-6)
    assert torch.allclose(angle[-5:], plain[1, -5:].double() / 40, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_value_is_as_near_as_its_format_allows(case: WriteCase) -> None:
    call = case.build()
    write(call)
    kept = [index for index, slot in enumerate(SLOTS) if slot >= 0]
    slots = torch.tensor(SLOTS)[kept]
    stored = call.kv_cache[slots // 16, slots % 16]
    got = dequantise_rows(stored, case.cache_format, call.kv_scale, torch.float32)
    assert call.rows is not None
    rows = call.rows[kept].float()
    step, floor = 2**-8, torch.full((1,), 1e-6)
    if case.cache_format.quantised:  # half a step, of the smallest scale that a group may have
        step, floor = 2**-4 + 2**-8, floor + rows.abs().amax(1, keepdim=True) * 2**-17
    if case.cache_format.needs_scale:
        assert call.kv_scale is not None
        bound = LARGEST[case.cache_format.dtype] * call.kv_scale
        rows, floor = rows.clamp(-bound, bound), call.kv_scale * 2**-10
    assert bool(((got - rows).abs() <= rows.abs() * step + floor * 1.01).all())
    others = torch.ones(5, 16, dtype=torch.bool)
    others[slots // 16, slots % 16] = False
    assert torch.equal(call.kv_cache[others].view(torch.uint8), case.cache()[others].view(torch.uint8))


def test_out_of_place_and_in_place_rotation_agree_and_nothing_else_changes() -> None:
    one, other = WriteCase().build(), WriteCase().build()
    write(one)
    assert one.q_pe is not None
    assert other.q_pe is not None
    before, out = other.q_pe.clone(), torch.empty_like(other.q_pe)
    write(other, q_pe_out=out)
    assert torch.equal(other.q_pe, before)
    assert torch.equal(out, one.q_pe)
    assert torch.equal(written_bytes(one)["kv_cache"], written_bytes(other)["kv_cache"])


def write(call: Any, **changes: Any) -> None:
    """The public call of a case's tensors, changed."""
    named = {
        "norm_weight": call.norm_weight, "eps": call.eps, "positions": call.positions, "cos_sin": call.cos_sin,
        "rope_layout": call.rope_layout, "kv_scale": call.kv_scale, "q_pe": call.q_pe, "rows_out": call.rows,
    }  # fmt: skip
    first = {"kv_cache": call.kv_cache, "slots": call.slots, "c_kv": call.c_kv, "k_pe": call.k_pe}
    write_latent(**{**first, **named, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slots": torch.tensor([0, 1, 2, 80, 4, 5])}, IndexError, "slots: token 3: expected -1 to 79, got 80"),
        ({"slots": torch.tensor([0, 1, -2, 3, 4, 5])}, IndexError, "slots: token 2: expected -1 to 79, got -2"),
        ({"slots": torch.zeros(6)}, TypeError, "slots: expected a dtype of torch.int32, torch.int64"),
        ({"slots": torch.zeros(6, 1).int()}, ValueError, "slots: expected 1 dimensions"),
        ({"positions": torch.tensor([0, 0, 0, 0, 0, 100])}, IndexError, "positions: token 5: expected 0 to 99, got"),
        ({"positions": torch.zeros(5).int()}, ValueError, "positions: expected at least 6, got 5"),
        ({"positions": None}, ValueError, "positions: positions and cos_sin come together"),
        ({"cos_sin": None, "q_pe": None}, ValueError, "cos_sin: positions and cos_sin come together"),
        ({"cos_sin": None, "positions": None}, ValueError, "cos_sin: expected a table to rotate q_pe with"),
        ({"cos_sin": torch.zeros(100, 32)}, ValueError, "cos_sin: expected rows of 64 like k_pe, got 32"),
        ({"c_kv": torch.zeros(5, 512)}, ValueError, r"c_kv: expected shape \(6, 512\), got \(5, 512\)"),
        ({"c_kv": torch.zeros(6, 512).double()}, TypeError, "c_kv: expected a dtype of torch.bfloat16"),
        ({"c_kv": torch.zeros(512, 6).T}, ValueError, "c_kv: expected a last-dimension stride of 1"),
        ({"k_pe": torch.zeros(6, 63), "cos_sin": None, "positions": None, "q_pe": None}, ValueError, "kv_cache: exp"),
        ({"norm_weight": torch.ones(511)}, ValueError, r"norm_weight: expected shape \(512,\)"),
        ({"q_pe": torch.zeros(6, 4, 32)}, ValueError, r"q_pe: expected shape \(6, 4, 64\)"),
        ({"q_pe_out": torch.zeros(6, 20, 64)}, TypeError, "q_pe_out: expected torch.bfloat16 like q_pe"),
        ({"rope_layout": "neox"}, ValueError, "rope_layout: expected 'half' or 'interleaved', got 'neox'"),
        ({"eps": -1.0}, ValueError, "eps: expected a finite number, at least 0, got -1.0"),
        ({"kv_scale": 1.0}, ValueError, "kv_scale: expected None for a bf16 cache"),
        ({"kv_cache": torch.zeros(5, 16, 576).to(torch.float8_e4m3fn)}, ValueError, "kv_scale required for fp8"),
        ({"kv_cache": torch.zeros(5, 16, 576).int()}, TypeError, "kv_cache: expected a dtype of"),
        ({"kv_cache": torch.zeros(5, 16, 575).bfloat16()}, ValueError, r"kv_cache: expected shape \(5, 16, 576\)"),
        ({"kv_cache": torch.zeros(5, 16, 657).byte()[..., 1:]}, ValueError, "strides that are multiples of 4"),
        ({"status": torch.zeros(4).long()}, ValueError, r"status: expected shape \(8,\)"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named_and_nothing_is_written(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = WriteCase().build()
    before = {name: bits.clone() for name, bits in written_bytes(call).items()}
    with pytest.raises(error, match=message):
        write(call, **changes)
    for name, bits in written_bytes(call).items():
        assert torch.equal(bits, before[name])


@pytest.mark.parametrize("cache_format", [CacheFormat.bf16, CacheFormat.fp8_656])
def test_the_op_says_what_it_changes(cache_format: CacheFormat) -> None:
    call = WriteCase(cache_format).build()
    arguments = (
        call.kv_cache, call.slots, call.c_kv, call.k_pe, call.norm_weight, 1e-6, call.positions, call.cos_sin, True,
        call.kv_scale, None, call.q_pe, call.rows, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.portable_mla.write_latent.default, arguments)


def test_a_write_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    expected, got = WriteCase().build(), WriteCase().build()
    write(expected)
    torch.compile(write, fullgraph=True, backend="aot_eager")(got)
    for name, bits in written_bytes(expected).items():
        assert torch.equal(written_bytes(got)[name], bits)


def test_a_step_without_tokens_writes_nothing() -> None:
    cache = torch.full((2, 16, 576), 7.0).bfloat16()
    write_latent(cache, torch.zeros(0, dtype=torch.int32), torch.zeros(0, 512), torch.zeros(0, 64))
    assert bool((cache == 7).all())


@pytest.mark.parametrize(("rope_dim", "positions"), [(0, 5), (7, 5), (64, 0)])
def test_a_table_that_cannot_be_is_refused(rope_dim: int, positions: int) -> None:
    with pytest.raises(ValueError, match="rope_dim: expected a pos|positions: expected at least 1"):
        rope_table(positions, rope_dim)
