"""Each combine, over float32 and float16 partial results, against the merge in float64."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from portable_mla.backends.triton.combine.kernels.combine import combine_kernel
from portable_mla.backends.triton.combine.runner import Combine, Partials
from portable_mla.backends.triton.config.combine import combine_tiles
from portable_mla.metadata.split_plan.plan import PlanShape
from portable_mla.runtime.kernel_launch import KernelLaunch
from tests.interpreter.running import SMALL, request_of
from tests.support.cases import Case, build

PIECES = (0, 3, -1, 45, 1, -2, 4, 70)  # of each token; -1 was final before, -2 is faulty
HEADS, LATENT = 5, 128
KINDS = tuple(combine_tiles(LATENT, 32))


def random_partials(dtype: torch.dtype) -> tuple[Partials, tuple[Tensor, Tensor], Tensor]:
    """Sizes, partial results with their statistics, and which slots each token has."""
    rng = torch.Generator().manual_seed(1)
    counts = [max(count, 2 if count == -2 else 0) for count in PIECES]
    slots, first = [], 0
    for count, taken in zip(PIECES, counts, strict=True):
        slots.append([first, first + taken if count >= 0 else count, 0, 0])
        first += taken
    sizes = Partials(first, HEADS, LATENT, dtype)
    out, stats = sizes.allocate(torch.device("cpu"))
    value = torch.randn(out.shape, generator=rng) * 1e-30
    stats[..., 0] = torch.randn(out.shape[:2], generator=rng) * 8
    stats[..., 1] = torch.rand(out.shape[:2], generator=rng) * 30 + 1
    if dtype == torch.float16:
        peaks = value.unflatten(-1, (2, -1)).abs().amax(-1)
        stats[..., 2:] = peaks * stats[..., 1:2]
        value = transposed(value / halves(peaks))
    out.copy_(value)
    return sizes, (out, stats), torch.tensor(slots, dtype=torch.int32)


def halves(units: Tensor) -> Tensor:
    """The unit of each column, given that of each half of them."""
    return units.repeat_interleave(LATENT // 2, -1)


def transposed(value: Tensor) -> Tensor:
    """Of 32 columns, the 4 x 4 pairs change places, and back: the order that float16 partial results are in."""
    pairs = value.reshape(*value.shape[:-1], -1, 4, 4, 2)
    return pairs.transpose(-3, -2).reshape(value.shape)


def merged(partials: tuple[Tensor, Tensor], low: int, high: int) -> tuple[Tensor, Tensor]:
    """By definition: [heads, latent] and the natural logarithm of what the rows sum to."""
    out, stats = (tensor[low:high].double() for tensor in partials)
    weight = torch.exp2(stats[..., :1])
    sums = transposed(out) * halves(stats[..., 2:]) if stats.shape[-1] == 4 else out * stats[..., 1:]
    total = (weight * stats[..., 1:2]).sum(0)
    return (weight * sums).sum(0) / total, total[:, 0].log()


def assert_merged_as_defined(arch: str, kind: str, dtype: torch.dtype, *, rehearsed: bool = False) -> None:
    """Merge with one of the combines, over partial results of this dtype. rehearsed: but for the wait between."""
    sizes, partials, slots = random_partials(dtype)
    problem = build(Case((1,) * len(PIECES), HEADS, **SMALL))
    combine = Combine(request_of(problem, arch, units=4), parts=8, narrow=dtype == torch.float16)
    if rehearsed:
        combine._launches[kind] = KernelLaunch(combine_kernel, combine.constants[kind] | {"REHEARSED": True})
    out = torch.full((len(PIECES), HEADS, LATENT), 7.0)
    lse = torch.full((len(PIECES), HEADS), 7.0)
    with patch.object(combine, "_kind", lambda tokens: kind):
        launch = combine.at("key", len(PIECES))
        launch(slots, *partials, out, lse, HEADS, sizes.rows, *out.stride()[:2], *lse.stride())
    for token, count in enumerate(PIECES):
        low, high = slots[token, :2].tolist()
        if count == -2:
            assert bool(out[token].isnan().all() and lse[token].isnan().all()), "a faulty row is a number"
        elif count == -1:
            assert bool((out[token] == 7).all() and (lse[token] == 7).all()), "a final row was written"
        elif count == 0:
            assert bool((out[token] == 0).all() and (lse[token] == -torch.inf).all()), "an empty row is not 0"
        else:
            golden, golden_lse = merged(partials, low, high)
            assert torch.allclose(out[token].double(), golden, rtol=1e-5, atol=1e-36), f"out of {count} pieces"
            assert torch.allclose(lse[token].double(), golden_lse, rtol=1e-6, atol=1e-6), f"lse of {count} pieces"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["wide", "narrow"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_merged_as_defined(kind: str, dtype: torch.dtype) -> None:
    assert_merged_as_defined("sm90", kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsal_changes_nothing(kind: str) -> None:
    assert_merged_as_defined("sm90", kind, torch.float16, rehearsed=True)


def test_which_combine_serves_follows_pieces_and_rows() -> None:
    request = request_of(build(Case((1,), 16, **SMALL)), "sm90", units=132)
    combine = Combine(request, parts=132)
    kinds = {tokens: combine._kind(tokens) for tokens in (2, 3, 13, 14, 1024, 1025)}
    assert kinds == {2: "thin", 3: "spread", 13: "spread", 14: "rows", 1024: "rows", 1025: "grouped"}
    same = Combine(replace(request, deterministic=True), parts=132)
    assert {same._kind(1), same._kind(10_000)} == {"spread"}


def test_partial_results_count_their_statistics() -> None:
    request = request_of(build(Case((1,), 16, **SMALL)), "sm90", units=132)
    shape = PlanShape(132, 1, 1, 1, 4096, block_q=1, block_n=64, min_tiles=2)
    for dtype, row in ((torch.float32, 128 * 4 + 2 * 4), (torch.float16, 128 * 2 + 4 * 4)):
        sizes = Partials.of(request, shape, dtype)
        assert sizes.nbytes == sizes.slots * 16 * row == sum(t.nbytes for t in sizes.allocate(torch.device("cpu")))
