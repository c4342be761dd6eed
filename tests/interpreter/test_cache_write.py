"""The cache write in the interpreter: bit for bit what torch has, and what only kernels do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from portable_mla import CacheFormat
from portable_mla.cache import write_launch
from portable_mla.cache.kernels import write as cache_write_kernels
from portable_mla.cache.write import write_in_torch
from portable_mla.cache.write_launch import launch_write
from portable_mla.core.quantize import to_float8
from portable_mla.metadata import Limits, Status
from tests.interpreter.round_trip_kernels import round_trip_kernel
from tests.interpreter.test_broken_kernels import Mutant
from tests.support.write_cases import CASES, WriteCase, written_bytes

FLAVOURS = {"e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}
LIMITS = Limits(max_pages=5, max_context=100, max_query_len=1, max_query_tokens=8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_writes_the_bits_that_torch_writes(case: WriteCase) -> None:
    expected, got = case.build(), case.build()
    write_in_torch(expected)
    launch_write(got)
    for name, bits in written_bytes(expected).items():
        assert torch.equal(written_bytes(got)[name], bits), name


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fp8_is_rounded_and_read_as_torch_does(flavour: str) -> None:
    dtype = FLAVOURS[flavour]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    exact = every[every.isfinite()].sort().values
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat([torch.nextafter(halfway, torch.tensor(end)) for end in (-1e9, 1e9)])
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-30, -1e-30, 449.0, 241.0])
    values = torch.cat([every, halfway, beside, special, torch.randn(2048 - 1100) * 20])
    values = torch.nn.functional.pad(values, (0, 2048 - len(values)))
    bits, wide = torch.empty(2048, dtype=torch.uint8), torch.empty(2048, dtype=torch.float16)
    constants: dict[str, Any] = {"COUNT": 2048, "FNUZ": flavour == "e4m3fnuz"}
    round_trip_kernel[(1,)](values, bits, wide, **constants)
    expected = to_float8(values, dtype)
    assert torch.equal(bits, expected.view(torch.uint8))
    assert torch.equal(wide.float().nan_to_num(1e9), expected.float().nan_to_num(1e9))


def test_slots_and_positions_that_are_not_there_are_skipped_and_reported() -> None:
    case, status = WriteCase(), Status.allocate(torch.device("cpu"))
    good, bad = case.build(), case.build()
    write_in_torch(good)
    slots, positions = bad.slots.clone().long(), bad.positions
    slots[2], slots[4] = 80, -2
    assert positions is not None
    positions[3] = 100
    launch_write(replace(bad, slots=slots, status=status.words))
    expected, got = good.kv_cache.view(-1, 576), bad.kv_cache.view(-1, 576)
    for slot in range(80):
        if slot in (63, 0):
            assert bool((got[slot] == 7).all())
        elif slot == 79:
            assert torch.equal(got[slot, :512], expected[slot, :512])
            assert bool(got[slot, 512:].isnan().all())
        else:
            assert torch.equal(got[slot], expected[slot])
    assert bad.q_pe is not None
    assert bad.q_pe[3].isnan().all()
    with pytest.raises(IndexError, match=r"slots: token 2: expected .* got 80; positions: token 3: .* got 100"):
        status.check(LIMITS)


def test_a_query_is_rotated_into_another_tensor_and_its_source_stays() -> None:
    one, other = WriteCase().build(), WriteCase().build()
    write_in_torch(one)
    assert one.q_pe is not None
    assert other.q_pe is not None
    source, target = other.q_pe, torch.zeros(6, 20, 576, dtype=torch.bfloat16)
    before = source.clone()
    launch_write(replace(other, q_source=source, q_pe=target[..., 512:]))
    assert torch.equal(target[..., 512:], one.q_pe)
    assert torch.equal(source, before)
    assert not target[..., :512].any()


BROKEN = {
    "the norm forgets its weight": ("latent * factor * weight", "latent * factor"),
    "the norm forgets its factor": ("latent * factor * weight", "latent * weight"),
    "eps is left out": ("tl.sqrt(mean + eps)", "tl.sqrt(mean)"),
    "it turns the wrong way": ("one * cos - other * sin,", "one * cos + other * sin,"),
    "half and interleaved are exchanged": ("return pair, 2 * pair, 2 * pair + 1", "return pair, pair, pair + HALF"),
    "the row is in the place of its neighbour": ("slot % PAGE_SIZE\n", "(slot ^ 1) % PAGE_SIZE\n"),
    "the last head is left out": ("(head < heads)", "(head < heads - 1)"),
    "a group's scale is rounded down": (
        "(tl.maximum(bits, SMALLEST_SCALE) + 0x7FFFFF)",
        "tl.maximum(bits, SMALLEST_SCALE)",
    ),
    "the scale multiplies": ("tl.div_rn(values, scale + tl.zeros_like(values))", "(values * scale)"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_kernel_is_caught(broken: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = Mutant(cache_write_kernels, *broken).write(tmp_path).write_latent_kernel
    write_launch._launch.cache_clear()
    monkeypatch.setattr(cache_write_kernels, "write_latent_kernel", kernel)
    differ = False
    for case in (WriteCase(), WriteCase(CacheFormat.fp8_e4m3, scale=0.5), WriteCase(CacheFormat.fp8_656)):
        expected, got = case.build(), case.build()
        write_in_torch(expected)
        launch_write(got)
        results = written_bytes(got)
        differ |= any(not torch.equal(results[name], bits) for name, bits in written_bytes(expected).items())
    write_launch._launch.cache_clear()
    assert differ
