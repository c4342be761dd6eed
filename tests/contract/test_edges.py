"""The edge grid: sizes at which attention kernels have failed in the field, one by one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from portable_mla import mla_decode
from tests.support import acceptance
from tests.support.cases import CONTENTS, Case, build
from tests.support.targets import Target


def solve(target: Target, case: Case) -> None:
    """Decode the case and hold it to the rule; a refusal is a skip that says so."""
    if not target.accepts(case):
        pytest.skip(f"{target} refuses {case}")
    target.solve(case)


@pytest.mark.parametrize("kv_lens", [(0, 9, 33), (9, 0, 33), (9, 33, 0), (0, 0, 0), (0,)])
@pytest.mark.parametrize("max_query_len", [1, 3])
def test_empty_requests_give_zero_and_minus_infinity(
    target: Target, kv_lens: tuple[int, ...], max_query_len: int
) -> None:
    solve(target, Case(kv_lens, max_query_len=max_query_len))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("tail", [1, 2, 3, 4, -1])
def test_context_ends_anywhere_in_a_page(target: Target, page_size: int, tail: int) -> None:
    solve(target, Case((tail % page_size, page_size + tail, 5 * page_size + tail), page_size=page_size))


@pytest.mark.parametrize("kv_len", [1, 2, 5, 7])
def test_queries_that_precede_the_context_see_nothing(target: Target, kv_len: int) -> None:
    solve(target, Case((kv_len, 40), max_query_len=8))


@pytest.mark.parametrize("page_size", [1, 2, 16, 32, 48, 64, 128, 544])
@pytest.mark.parametrize("content", ["needle", "fingerprint"])
def test_any_page_size(target: Target, page_size: int, content: str) -> None:
    solve(target, Case((page_size - 1, page_size, page_size + 1, 700), page_size=page_size, content=content))


@pytest.mark.parametrize("heads", [1, 3, 5, 8, 12, 16, 17, 20, 32, 40, 48, 63, 64, 96, 126, 128])
def test_any_number_of_heads(target: Target, heads: int) -> None:
    solve(target, Case((130, 65), heads=heads, content="needle"))


@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("heads", [5, 16])
def test_any_number_of_query_tokens(target: Target, query_len: int, heads: int) -> None:
    solve(target, Case((129, 70, query_len), heads=heads, max_query_len=query_len))


@pytest.mark.parametrize("query_lens", [(2, 0), (1, 8, 1), (0, 0, 5), (3, 5, 7), (0, 0)])
@pytest.mark.parametrize("padding", [0, 5])
def test_mixed_query_lengths_and_padding_rows(target: Target, query_lens: tuple[int, ...], padding: int) -> None:
    lens = (65, 40, 129)[: len(query_lens)]
    solve(target, Case(lens, query_lens=query_lens, max_query_len=8, padding=padding))


@pytest.mark.parametrize("content", ["neg_extreme", "pos_extreme", "ties", "subnormal"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_extreme_logits(target: Target, content: str, dtype: str) -> None:
    solve(target, Case((1, 64, 200), content=content, dtype=dtype, max_query_len=2))


@pytest.mark.parametrize("geometry", [(512, 64), (512, 0), (256, 64), (256, 32), (128, 32)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_geometry_and_dtype(target: Target, geometry: tuple[int, int], dtype: str) -> None:
    solve(target, Case((257, 31), latent_dim=geometry[0], rope_dim=geometry[1], dtype=dtype))


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("garbage", ["nan", "hot"])
def test_every_kind_of_data_over_a_long_ragged_batch(target: Target, content: str, garbage: str) -> None:
    solve(target, Case((2049, 1, 640, 0, 1500, 64, 63, 65, 500, 129), content=content, garbage=garbage, page_size=64))


def test_only_the_result_is_written(target: Target) -> None:
    case = Case((65, 0, 7), heads=3, query_lens=(2, 1, 0), max_query_len=2, padding=2)
    problem = target.build(case)
    tokens, heads = problem.q.shape[:2]
    guard = torch.full((tokens + 4, heads, problem.latent_dim), 7.0, dtype=problem.q.dtype, device=problem.q.device)
    guard_lse = torch.full((tokens + 4, heads), 7.0, device=problem.q.device)
    inside = slice(2, tokens + 2)
    acceptance.check(problem, *target.run_into(problem, guard[inside], guard_lse[inside]))
    for outer in (guard, guard_lse):
        assert bool((outer[:2] == 7).all())
        assert bool((outer[-2:] == 7).all())


@pytest.mark.parametrize("units", [1, 2, 7, 33, 132, 500])
@pytest.mark.parametrize("max_query_len", [1, 8])
def test_m5_the_number_of_splits_does_not_change_the_result(target: Target, units: int, max_query_len: int) -> None:
    case = Case((3000, 1, 513, 519, 0, 64, 7), heads=20, content="split_skew", max_query_len=max_query_len)
    problem = target.build(case)
    acceptance.check(problem, *target.run_as(problem, arch=replace(target.arch, units=units)))


@pytest.mark.parametrize("units", [2, 6])  # on Hopper one part of 300 blocks, or three of 100, of two programs each
def test_long_parts_that_programs_share(target: Target, units: int) -> None:
    problem = target.build(Case((12_000, 7_077, 65), heads=128, page_size=64, content="needle"))
    acceptance.check(problem, *target.run_as(problem, arch=replace(target.arch, units=units)))


# Lengths about multiples of 64 keys: their last block is whole, short at the beginning of a page or short inside one.
ENDS = (1, 63, 64, 65, 127, 129, 191, 193, 449)
LAST_BLOCKS = (
    Case(ENDS, heads=20, page_size=64, max_query_len=8, content="needle"),
    Case(ENDS, heads=20, page_size=128, max_query_len=3, content="needle", garbage="hot"),
    Case(ENDS, heads=20, page_size=192, content="needle"),
    Case(ENDS, heads=64, rope_dim=0, page_size=256, content="needle"),
    Case(ENDS, heads=128, page_size=64, max_query_len=2, content="needle", garbage="hot"),
)


@pytest.mark.parametrize(
    "case", LAST_BLOCKS, ids=lambda case: f"{case.heads}x{case.max_query_len} page {case.page_size}"
)
def test_the_last_blocks_of_sequences_wherever_they_are_cut(target: Target, case: Case) -> None:
    if not target.accepts(case):
        pytest.skip(f"{target} refuses {case}")
    problem = target.build(case)
    for units in (1, 3, 132):
        acceptance.check(problem, *target.run_as(problem, arch=replace(target.arch, units=units)))


def test_pages_that_other_layers_are_between(target: Target) -> None:
    if target.of_a_library:
        pytest.skip(f"{target} has a rule of its own for strides")
    problem = target.build(Case(ENDS, heads=20, page_size=64, content="needle"))
    layers = torch.stack((torch.full_like(problem.kv_cache, torch.nan), problem.kv_cache), 1)
    acceptance.check(problem, *target.run(problem.with_cache(layers[:, 1])))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("max_query_len", [1, 3])
def test_a_token_that_outweighs_those_before_it_in_one_piece(target: Target, dtype: str, max_query_len: int) -> None:
    lens = (700, 129, 64, 1000, 257)
    case = Case(lens, heads=20, page_size=64, content="heavy", dtype=dtype, max_query_len=max_query_len)
    if not target.accepts(case):
        pytest.skip(f"{target} refuses {case}")
    problem = target.build(case)
    acceptance.check(problem, *target.run_as(problem, arch=replace(target.arch, units=1)))


@pytest.mark.parametrize("kv_len", [1, 15, 17, 127, 129, 511, 513, 5000, 20011])
@pytest.mark.parametrize("max_query_len", [1, 8])
def test_a_lone_request_is_split_anywhere(target: Target, kv_len: int, max_query_len: int) -> None:
    # With 8 query tokens the last split is partly, or for the early tokens wholly, masked.
    solve(target, Case((kv_len,), heads=16, page_size=64, content="split_skew", max_query_len=max_query_len))


def test_columns_keep_their_digits_beside_larger_ones(target: Target) -> None:
    """Half of the columns 2**20 times smaller, and the queries' as much larger: the same scores, bit for bit, and that
    half of the result 2**20 times smaller."""
    case = Case((5000, 130, 700), heads=64, page_size=64, content="iid")
    if not target.accepts(case):
        pytest.skip(f"{target} refuses {case}")
    problem = build(case, target.device)
    out, lse = target.run(problem)
    small = [tensor.clone() for tensor in (problem.q, problem.kv_cache)]
    for tensor, scale in zip(small, (2.0**20, 2.0**-20), strict=True):
        tensor[..., :256] *= scale
    scaled, same_lse = target.run(problem.with_q(small[0]).with_cache(small[1]))
    assert torch.equal(scaled[..., :256] * 2.0**20, out[..., :256]), "the small half"
    assert torch.equal(scaled[..., 256:], out[..., 256:]) and torch.equal(same_lse, lse), "the other half"


def test_many_short_requests_share_a_program(target: Target) -> None:
    lens = tuple(1 + 7 * index % 90 for index in range(700))
    solve(target, Case(lens, heads=2, latent_dim=128, rope_dim=32, content="iid"))


@pytest.mark.parametrize("odd", ["page", "slot", "base"])
def test_a_cache_that_no_wide_load_can_read_in_one_go(target: Target, odd: str) -> None:
    problem = build(Case((130, 65), page_size=64), target.device)
    pages, page_size, width = problem.kv_cache.shape
    slot = width + (odd == "slot")
    page = page_size * slot + (odd == "page")
    flat = torch.full((pages * page + 1,), torch.nan, dtype=problem.q.dtype, device=problem.q.device)
    cache = flat[int(odd == "base") :].as_strided((pages, page_size, width), (page, slot, 1))
    cache.copy_(problem.kv_cache)
    acceptance.check(problem, *target.run(problem.with_cache(cache)))


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [2**31, 2**32])
def test_addresses_beyond_32_bits(target: Target, elements: int) -> None:
    """Pages, query rows and result rows each side of 2**31 or 2**32 elements, by strides over buffers of that size."""
    if target.device == "cpu":
        pytest.skip("Python computes a CPU's addresses")
    free = torch.cuda.mem_get_info()[0]
    if free < 6 * elements + 2**31:
        pytest.skip(f"needs {6 * elements / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    problem = build(Case((130, 65, 40, 7), heads=3, content="fingerprint"), "cuda")
    far = problem.with_cache(spread(problem.kv_cache, elements)).with_q(spread(problem.q, elements))
    out = spread(torch.full_like(problem.q[..., :512], torch.nan), elements)
    lse = torch.full(problem.q.shape[:2], torch.nan, device="cuda")
    acceptance.check(problem, *target.run_into(far, out, lse))


def spread(tensor: Tensor, elements: int) -> Tensor:
    """The same values with the first dimension's steps so long that the last one starts past `elements`."""
    stride = -(-elements // (tensor.shape[0] - 1) // 16) * 16
    torch.use_deterministic_algorithms(False)  # filling the gaps would take long, and nothing may read them
    flat = torch.empty(stride * (tensor.shape[0] - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    strides = (stride, *tensor[0].contiguous().stride())
    return flat.as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.gpu
def test_a_grid_of_more_than_65535_requests_is_served(target: Target) -> None:
    batch, heads = 70_000, 2
    if not target.has_kernels:
        pytest.skip(f"{target} launches no grid")
    if not target.accepts(Case((1,), heads=heads, latent_dim=128, rope_dim=32, page_size=1)):
        pytest.skip(f"{target} refuses such pages")
    rng = torch.Generator(device="cuda").manual_seed(0)
    q = torch.randn(batch, heads, 160, generator=rng, device="cuda").bfloat16()
    cache = torch.randn(batch, 1, 160, generator=rng, device="cuda").bfloat16()
    table = torch.randperm(batch, generator=rng, device="cuda").int()[:, None]
    lens = torch.ones(batch, dtype=torch.int32, device="cuda")
    out, lse = mla_decode(q, cache, table, lens, softmax_scale=0.1, latent_dim=128, backend=target.backend)
    rows = cache[table[:, 0].long(), 0]
    assert torch.equal(out, rows[:, None, :128].expand_as(out))
    scores = torch.einsum("bhd,bd->bh", q.double(), rows.double()) * 0.1
    assert bool(((lse.double() - scores).abs() <= 1e-4).all())


@pytest.mark.parametrize(("chunk", "slab"), list(itertools.product((1, 32, 64, 300, 4096), (1, 3, 8))))
def test_m5_the_cpu_backends_chunks_and_slabs_do_not_change_the_result(chunk: int, slab: int) -> None:
    from portable_mla.backends.cpu import CpuRunner
    from portable_mla.decode.arguments import DecodeArguments
    from portable_mla.metadata import DecodeMetadata, Status

    problem = build(Case((300, 1, 64, 0, 129), content="split_skew", max_query_len=2))
    arguments = DecodeArguments(problem.q, problem.kv_cache, problem.batch, 512, problem.softmax_scale)
    runner = CpuRunner(arguments.request(deterministic=False), chunk_tokens=chunk, slab_requests=slab)
    runner.plan(DecodeMetadata(problem.batch, Status.allocate(torch.device("cpu"))))
    out, lse = torch.empty_like(problem.q[..., :512]), torch.empty(problem.q.shape[:2])
    runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale)
    acceptance.check(problem, out, lse)


def test_m7_a_request_alone_has_the_same_bits_as_in_any_batch_when_deterministic(target: Target) -> None:
    case = Case((300, 1, 64, 0, 129, 2000), heads=16, content="iid", max_query_len=2)
    if not target.accepts(case, deterministic=True):
        pytest.skip(f"{target} refuses deterministic requests")
    problem = target.build(case)
    out, lse = target.run(problem, deterministic=True)
    for request in range(len(problem.kv_lens)):
        alone_out, alone_lse = target.run(problem.only(request), deterministic=True)
        rows = slice(2 * request, 2 * request + 2)
        assert torch.equal(alone_out, out[rows])
        assert torch.equal(alone_lse, lse[rows])


def test_m7_fails_without_determinism_so_it_is_not_vacuous() -> None:
    case = Case((600, 500, 400, 300), heads=3, dtype="fp32", query_lens=(1, 8, 2, 1), max_query_len=8)
    problem, target = build(case), Target("cpu", "cpu")
    for deterministic in (False, True):
        out, _ = target.run(problem, deterministic=deterministic)
        parts = [target.run(problem.only(request), deterministic=deterministic)[0] for request in range(4)]
        assert torch.equal(out, torch.cat(parts)) is deterministic
