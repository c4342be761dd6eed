"""The reference itself: absorption proved, dequantisation of every format, conventions."""

from __future__ import annotations

import pytest
import torch

from portable_mla.backends import reference
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.quantize import dequantise_rows
from tests.support.cases import Case, build
from tests.support.targets import Target


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize(
    ("nope", "rope", "v_dim", "latent"), [(128, 64, 128, 512), (192, 64, 256, 512), (64, 32, 64, 256)]
)
def test_m21_the_absorbed_form_is_the_expanded_form(
    target: Target, query_len: int, nope: int, rope: int, v_dim: int, latent: int
) -> None:
    case = Case((97, 3), 5, latent, rope, 16, "fp32", None, query_len)
    problem = build(case, "cpu")
    rng = torch.Generator().manual_seed(7)
    w_uk = torch.randn(5, nope, latent, generator=rng, dtype=torch.float64) / nope**0.5
    w_uv = torch.randn(5, v_dim, latent, generator=rng, dtype=torch.float64) / latent**0.5
    q = torch.randn(2 * query_len, 5, nope + rope, generator=rng, dtype=torch.float64)
    absorbed = torch.cat([torch.einsum("thn,hnl->thl", q[..., :nope], w_uk), q[..., nope:]], dim=-1)
    problem = problem.with_q(absorbed.float())
    out, lse = reference.decode(problem.inputs, problem.batch, latent_dim=latent, softmax_scale=problem.softmax_scale)
    if Target("cpu", target.backend).accepts(case) and target.device == "cpu":
        ours, ours_lse = target.run(problem)
        assert (ours - out).norm() <= 1e-6 * out.norm()
        assert (ours_lse - lse).nan_to_num(0, 0, 0).abs().max() <= 1e-4
    rows = torch.zeros(97, latent + rope, dtype=torch.float64)
    for request, kv_len in enumerate(problem.kv_lens):
        pages = problem.batch.block_table[request, : -(-kv_len // 16)].long()
        rows = problem.kv_cache[pages].reshape(-1, latent + rope)[:kv_len].double()
        mine = slice(request * query_len, (request + 1) * query_len)
        expanded, expanded_lse = reference.attend_unabsorbed(q[mine], rows, w_uk, w_uv, problem.softmax_scale)
        through_w_uv = torch.einsum("thl,hvl->thv", out[mine], w_uv)
        # q was rounded to float32 on its way into the cache's dtype, nothing else was.
        assert (through_w_uv - expanded).norm() <= 1e-6 * expanded.norm()
        assert torch.allclose(lse[mine], expanded_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("scale", [0.03, 1.0, 7.0])
def test_per_tensor_fp8_rows_are_their_bytes_times_the_scale(dtype: torch.dtype, scale: float) -> None:
    rows = torch.randn(9, 160).to(dtype)
    cache_format = CacheFormat(dtype)
    dequantised = dequantise_rows(rows, cache_format, torch.tensor(scale), torch.float64)
    assert torch.equal(dequantised, rows.double() * torch.tensor(scale).double())


def test_the_two_e4m3_flavours_read_one_byte_differently() -> None:
    byte = torch.tensor([[0x40]], dtype=torch.uint8)
    assert dequantise_rows(byte.view(torch.float8_e4m3fn), CacheFormat.fp8_e4m3, None, torch.float32).item() == 2.0
    assert (
        dequantise_rows(byte.view(torch.float8_e4m3fnuz), CacheFormat.fp8_e4m3fnuz, None, torch.float32).item() == 1.0
    )


def test_656_byte_rows_hold_four_scaled_groups_and_a_bfloat16_rope() -> None:
    latent = torch.randn(3, 5, 512).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 5, 4) + 0.1
    rope = torch.randn(3, 5, 64).bfloat16()
    rows = torch.cat([latent.view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)], dim=-1)
    assert rows.shape[-1] == 656
    got = dequantise_rows(rows, CacheFormat.fp8_656, None, torch.float64)
    for group in range(4):
        columns = slice(128 * group, 128 * (group + 1))
        assert torch.equal(got[..., columns], latent[..., columns].double() * scales[..., group, None].double())
    assert torch.equal(got[..., 512:], rope.double())
    assert torch.equal(dequantise_rows(rows[:, ::2], CacheFormat.fp8_656, None, torch.float64), got[:, ::2])


@pytest.mark.parametrize("cache_format", ["fp8_e4m3", "fp8_e4m3fnuz", "fp8_656"])
def test_decode_over_an_fp8_cache_is_decode_over_its_dequantised_rows(cache_format: str) -> None:
    from portable_mla import mla_decode

    problem = build(Case((70, 33), garbage="zero"))
    form = CacheFormat[cache_format]
    scale = 0.5 if form.needs_scale else None
    rows = problem.kv_cache.float()
    if form is CacheFormat.fp8_656:
        ones = torch.ones(*rows.shape[:2], 4)
        parts = (rows[..., :512].to(torch.float8_e4m3fn), ones, rows[..., 512:].bfloat16())
        stored = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    else:
        stored = (rows / 0.5).clamp(-240, 240).to(form.dtype)
    tensor_scale = None if scale is None else torch.tensor(scale)
    plain = dequantise_rows(stored, form, tensor_scale, torch.float32)
    batch = problem.batch
    for backend in (None, "reference"):
        out, lse = mla_decode(
            problem.q, stored, batch.block_table, batch.kv_lens, softmax_scale=0.1, latent_dim=512, kv_scale=scale,
            backend=backend,
        )  # fmt: skip
        golden = mla_decode(
            problem.q.float(), plain, batch.block_table, batch.kv_lens, softmax_scale=0.1, latent_dim=512
        )
        assert (out - golden[0]).norm() <= 2**-8 * golden[0].norm()
        assert (lse - golden[1]).abs().max() <= 1e-4
