"""The cache write and fp8 decode on a GPU: torch's bits, places beyond 2**32 bytes, and graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import CacheFormat, MLAAttention, MLAShape, PagedBatch, arch_of, rope_table, write_latent
from portable_mla.cache.write import write_in_torch
from portable_mla.cache.write_arguments import WriteArguments
from portable_mla.cache.write_launch import launch_write
from portable_mla.core.quantize import quantise_rows
from portable_mla.core.shape import Capacity
from portable_mla.metadata import Limits, Status
from tests.support.write_cases import CASES, SLOTS, WriteCase, written_bytes

pytestmark = pytest.mark.gpu
PAGE_SIZE, BEYOND = 64, 2**32 + 2**20  # bytes


def on_gpu(call: WriteArguments) -> WriteArguments:
    """The same call, of tensors with the same strides."""
    moved: Any = {name: _moved(value) for name, value in vars(call).items() if isinstance(value, Tensor)}
    return replace(call, **moved)


def _moved(tensor: Tensor) -> Tensor:
    size = max(tensor.untyped_storage().nbytes() // tensor.element_size(), 1)
    whole = torch.as_strided(tensor, (size,), (1,), 0).to("cuda")
    return torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())


def unread(cache_format: CacheFormat) -> bool:
    """Whether this GPU reads another flavour."""
    return cache_format.needs_scale and arch_of("cuda").float8 != cache_format.dtype


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_writes_the_bits_that_torch_writes(case: WriteCase) -> None:
    expected, got = case.build(), case.build()
    write_in_torch(expected)
    if unread(case.cache_format):
        with pytest.raises(TypeError, match="Convert with"):
            on_gpu(got)
        return
    got = on_gpu(got)
    launch_write(got)
    for name, bits in written_bytes(expected).items():
        assert torch.equal(written_bytes(got)[name].cpu(), bits), name


def test_what_is_not_there_is_skipped_and_reported() -> None:
    good, bad = on_gpu(WriteCase().build()), on_gpu(WriteCase().build())
    status = Status.allocate(torch.device("cuda"))
    slots = bad.slots.long()
    slots[2], slots[4] = 1 << 40, -2
    assert bad.positions is not None
    bad.positions[3] = 100
    launch_write(good)
    launch_write(replace(bad, slots=slots, status=status.words))
    torch.cuda.synchronize()
    expected, got = good.kv_cache.view(-1, 576), bad.kv_cache.view(-1, 576)
    for slot in set(range(80)) - {79, 63, 0}:
        assert torch.equal(got[slot], expected[slot])
    assert bool((got[[63, 0]] == 7).all())
    assert torch.equal(got[79, :512], expected[79, :512])
    assert bool(got[79, 512:].isnan().all())
    with pytest.raises(IndexError, match=r"slots: token 2: .*; positions: token 3: .* got 100"):
        status.check(Limits(max_pages=5, max_context=100, max_query_len=1, max_query_tokens=8))


@pytest.mark.parametrize("cache_format", [one for one in CacheFormat if one.quantised or one is CacheFormat.bf16])
def test_rows_beyond_32_bits_are_written_and_attended_to(cache_format: CacheFormat) -> None:
    if unread(cache_format):
        pytest.skip(f"{arch_of('cuda').name} reads another fp8")
    shape = MLAShape(16, 512, 64, PAGE_SIZE, torch.bfloat16, cache_format)
    page_bytes = PAGE_SIZE * shape.row_width * cache_format.dtype.itemsize
    pages, kv_len = BEYOND // page_bytes + 3, 3 * PAGE_SIZE
    scale = torch.tensor(0.02, device="cuda") if cache_format.needs_scale else None
    far = torch.empty(pages, PAGE_SIZE, shape.row_width, dtype=cache_format.dtype, device="cuda")
    near = torch.empty(3, PAGE_SIZE, shape.row_width, dtype=cache_format.dtype, device="cuda")
    rng = torch.Generator("cuda").manual_seed(0)
    c_kv, k_pe, q = (
        torch.randn(*size, generator=rng, device="cuda").bfloat16()
        for size in ((kv_len, 512), (kv_len, 64), (1, 16, 576))
    )
    results = []
    for cache, first in ((far, pages - 3), (near, 0)):
        cache.view(torch.uint8)[first:].fill_(0xFF)
        slots = torch.arange(kv_len, device="cuda") + first * PAGE_SIZE
        write_latent(cache, slots, c_kv, k_pe, kv_scale=scale)
        attention = MLAAttention(shape, Capacity(1, 1, 1, kv_len, len(cache), cache.nbytes), device="cuda")
        table = torch.arange(first, first + 3, device="cuda", dtype=torch.int32)[None]
        attention.plan(PagedBatch(table, torch.tensor([kv_len], dtype=torch.int32, device="cuda")))
        results.append(attention(q, cache, softmax_scale=0.05, kv_scale=scale)[0])
    assert torch.equal(far[-3:].view(torch.uint8), near.view(torch.uint8))
    assert bool(results[1].isfinite().all())
    assert torch.equal(*results)


def test_a_captured_write_follows_its_slots_and_positions() -> None:
    call = on_gpu(WriteCase(CacheFormat.fp8_656).build())
    positions = call.positions
    assert positions is not None and call.q_pe is not None
    source = call.q_pe.clone()

    def write() -> None:
        write_latent(
            call.kv_cache, call.slots, call.c_kv, call.k_pe, norm_weight=call.norm_weight, positions=positions,
            cos_sin=call.cos_sin, q_pe=source, q_pe_out=call.q_pe, rows_out=call.rows,
        )  # fmt: skip

    write()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write()
    call.slots.copy_(torch.tensor(SLOTS[::-1]))
    positions.copy_(torch.tensor([9, 8, 7, 6, 5, 4, 3, 2]))
    call.kv_cache.fill_(7)
    graph.replay()
    got = {name: bits.clone() for name, bits in written_bytes(call).items()}
    call.kv_cache.fill_(7)
    write()
    for name, bits in written_bytes(call).items():
        assert torch.equal(got[name], bits), name


def test_stored_rows_are_those_of_the_definition() -> None:
    rows = torch.randn(100, 576, generator=torch.Generator().manual_seed(0)) * 20
    cache = torch.zeros(2, PAGE_SIZE, 656, dtype=torch.uint8, device="cuda")
    moved = rows.cuda()
    write_latent(cache, torch.arange(100, device="cuda"), moved[:, :512], moved[:, 512:])
    assert torch.equal(cache.view(-1, 656)[:100].cpu(), quantise_rows(rows, CacheFormat.fp8_656, None))


def test_a_table_on_the_gpu_is_that_of_the_cpu() -> None:
    assert torch.equal(rope_table(100, 64, device="cuda").cpu(), rope_table(100, 64))
