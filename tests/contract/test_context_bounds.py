"""What a prefill has in the cache before its new tokens: known, or said to be wrong, and never left out silently."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import (
    CachedContext,
    CacheFormat,
    Capacity,
    LayerGeometry,
    LayerStep,
    MixedAttention,
    MLALayer,
    MLAShape,
    PagedBatch,
    PagedLatentCache,
    mla_chunked_prefill,
    softmax_scale,
)
from portable_mla.layer.step import token_places
from portable_mla.metadata import Limits, Status
from portable_mla.metadata.status import Fault
from portable_mla.prefill.context_bounds import poison_in_torch
from tests.contract.test_chunked_prefill import chunked
from tests.contract.test_layer import assert_close, plain, table
from tests.support.prefill_cases import PrefillCase
from tests.unit.test_scales import ints

GEOMETRY = LayerGeometry(32, 4, 16, 8, 12, 10, softmax_scale(12, 8), q_lora_rank=24)
TABLE = table(GEOMETRY, "cpu")


class Steps:
    """A layer that serves one request chunk by chunk."""

    def __init__(self, cache_format: CacheFormat = CacheFormat.fp32) -> None:
        torch.manual_seed(0)
        self.layer = MLALayer(GEOMETRY, dtype=torch.float32)
        self.hidden = torch.randn(11, 32) * 2
        shape = GEOMETRY.shape(torch.float32, cache_format, page_size=4)
        self.mixed = MixedAttention(shape, Capacity(2, 16, 16, 32, 8), device="cpu")
        self.cache = PagedLatentCache(shape, 8)
        self.cache.storage.view(torch.uint8).fill_(0)
        self.cache.allocate("r", 0)

    def plan(self, tokens: int) -> PagedBatch:
        """Room for so many more tokens, and the step's plan."""
        self.cache.extend("r", tokens)
        batch = self.cache.batch(["r"], query_lens=[tokens], max_query_len=tokens)
        self.mixed.plan(batch, [tokens])
        return batch

    def run(self, start: int, stop: int, kv_scale: float | Tensor | None = None, **options: Any) -> Tensor:
        """The rows of the tokens from start to stop."""
        step = LayerStep.of(self.mixed, self.plan(stop - start), stop - start, TABLE, **options)
        out: Tensor = self.layer(self.hidden[start:stop], self.cache[0], step, kv_scale=kv_scale)
        return out


def test_a_second_chunk_sees_the_first_without_being_told_how_long_it_is() -> None:
    steps = Steps()
    rows = torch.cat([steps.run(0, 5), steps.run(5, 11)])
    assert_close(rows, plain(steps.layer, steps.hidden))


@pytest.mark.parametrize("bound", [0, 4])
def test_a_bound_that_is_too_small_is_refused_and_nothing_is_written(bound: int) -> None:
    steps = Steps()
    steps.run(0, 5)
    before = steps.cache.storage.clone()
    with pytest.raises(ValueError, match="request 0 has 5 tokens in the cache before its new ones"):
        steps.run(5, 11, longest_context=bound)
    assert bound == 0 or torch.equal(steps.cache.storage, before)


@pytest.mark.parametrize("bound", [-1, True, 2.0])
def test_a_bound_that_is_no_length_is_refused(bound: int) -> None:
    steps = Steps()
    with pytest.raises(ValueError, match="longest_context: expected an int of at least 0"):
        LayerStep.of(steps.mixed, steps.plan(3), 3, TABLE, longest_context=bound)


def test_a_prefill_that_forgets_its_context_is_refused() -> None:
    steps = Steps()
    steps.run(0, 5)
    steps.plan(3)
    new = torch.randn(3, 4, 20), torch.randn(3, 4, 12), torch.randn(3, 8), torch.randn(3, 4, 10)
    with pytest.raises(ValueError, match="context: request 0 has 5 tokens in the cache before its new ones"):
        steps.mixed.prefill(*new, softmax_scale=0.1)


def test_a_step_that_is_made_by_hand_uses_the_bound_of_its_attention() -> None:
    steps, same = Steps(), Steps()
    steps.run(0, 5)
    same.run(0, 5)
    made = LayerStep.of(steps.mixed, steps.plan(6), 6, TABLE)
    by_hand = LayerStep(steps.mixed, made.slots, made.positions, TABLE)
    assert torch.equal(steps.layer(steps.hidden[5:], steps.cache[0], by_hand), same.run(5, 11))


@pytest.mark.parametrize("kv_scale", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_a_scale_reaches_a_context_as_a_float_too(kv_scale: float | Tensor) -> None:
    steps, same = Steps(CacheFormat.fp8_e4m3), Steps(CacheFormat.fp8_e4m3)
    rows = [steps.run(0, 5, kv_scale), steps.run(5, 11, kv_scale)]
    expected = [same.run(0, 5, torch.tensor(0.02)), same.run(5, 11, torch.tensor(0.02))]
    assert torch.equal(torch.cat(rows), torch.cat(expected))


def test_a_failing_plan_keeps_the_step_before() -> None:
    steps = Steps()
    steps.run(0, 5)
    batch, split = steps.plan(3), steps.mixed.split
    with pytest.raises(IndexError, match="block_table: request 0"):
        steps.mixed.plan(replace(batch, block_table=torch.full_like(batch.block_table, 99)), [3])
    assert steps.mixed.split is split and steps.mixed.longest_context() == 5
    short = replace(batch, kv_lens=torch.tensor([2], dtype=torch.int32), kv_lens_on_host=None)
    with pytest.raises(ValueError, match="kv_lens: request 0: expected at least its 3 new tokens, got 2"):
        steps.mixed.plan(short, [3])
    assert steps.mixed.split is split


CASE = PrefillCase((3, 1, 2, 4), (8, 10, 2, 17), 3, (8, 4, 6), padding=0, dtype="fp32")


@pytest.mark.parametrize("bound", [20, 0])
def test_a_bound_on_all_tokens_below_their_sum_is_named(bound: int) -> None:
    problem = chunked(CASE, "cpu")
    i, lens = problem.new.inputs, problem.context.lens
    context = replace(problem.context, max_tokens=bound)
    with pytest.raises(ValueError, match=f"max_tokens: expected at least {int(lens.sum())}.*, got {bound}"):
        mla_chunked_prefill(
            i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k, context,
            max_seqlen_q=4, max_seqlen_k=4, softmax_scale=0.3,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_tokens": -5}, ValueError, "max_tokens: expected an int of at least 0, got -5"),
        ({"max_len": True}, ValueError, "max_len: expected an int of at least 0, got True"),
        ({"w_uk": None}, TypeError, "w_uk: expected a tensor, got NoneType"),
        ({"w_uv": torch.zeros(3, 16)}, ValueError, r"w_uv: expected \[heads, v_dim, latent\], got shape \(3, 16\)"),
        ({"lens": None}, TypeError, "lens: expected a tensor, got NoneType"),
    ],
)
def test_a_wrong_context_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(chunked(CASE, "cpu").context, **changes)


@pytest.mark.parametrize(
    ("lens", "max_len", "max_tokens", "wrong"),
    [
        ((5, 9, 0, 13), 13, 27, []),
        ((5, 9, 0, 13), 9, 99, [3]),
        ((5, 9, 0, 13), 13, 13, [1, 3]),
        ((5, 9, 0, 13), 0, 0, [0, 1, 3]),
        ((5, -2, 0, 13), 13, 27, [1]),
    ],
)
def test_what_bounds_leave_out_is_nan_and_reported(
    lens: tuple[int, ...], max_len: int, max_tokens: int, wrong: list[int]
) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32)
    out, lse, status = torch.ones(11, 2, 6), torch.ones(11, 2), Status.allocate(torch.device("cpu"))
    bounds = {"max_len": max_len, "max_tokens": max_tokens}
    poison_in_torch(torch.tensor(lens, dtype=torch.int32), cu_seqlens, out, lse, **bounds, status=status.words)
    rows = [token for s in wrong for token in range(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))]
    assert out.isnan().all(-1).all(-1).nonzero().flatten().tolist() == rows
    assert lse.isnan().all(-1).nonzero().flatten().tolist() == rows
    if wrong:
        with pytest.raises(IndexError, match=f"context: sequence {wrong[0]}: .*got {lens[wrong[0]]}"):
            status.check(Limits(1, 1, 1, 1))
    assert status.words[Fault.context_len] == Status.allocate(torch.device("cpu")).words[0]


def test_a_context_without_pages_is_no_read() -> None:
    problem = chunked(PrefillCase((3,), (3,), 3, (8, 4, 6), padding=0, dtype="fp32"), "cpu")
    i, context = problem.new.inputs, problem.context
    empty = replace(context, kv_cache=context.kv_cache[:0], max_len=7)
    out, _ = mla_chunked_prefill(
        i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k, empty,
        max_seqlen_q=3, max_seqlen_k=3, softmax_scale=0.3,
    )  # fmt: skip
    assert out.isfinite().all()


def batch_of(kv_lens: tuple[int, ...], table: Tensor, query_len: int) -> PagedBatch:
    """A uniform batch."""
    return PagedBatch(table, torch.tensor(kv_lens, dtype=torch.int32), None, query_len)


def test_tokens_before_the_first_of_a_request_stand_at_0_and_are_nowhere() -> None:
    slots, positions = token_places(batch_of((2, 9), torch.arange(6).int().view(2, 3), 4), 9, 4)
    assert positions.tolist() == [0, 0, 0, 1, 5, 6, 7, 8, 0]
    assert slots.tolist() == [-1, -1, 0, 1, 17, 18, 19, 20, -1]


def test_a_length_beyond_the_page_table_is_named() -> None:
    with pytest.raises(IndexError, match=r"kv_lens: request 1: expected 0 to 12 \(block_table holds 12.*got 13"):
        token_places(batch_of((2, 13), torch.zeros(2, 3).int(), 1), 2, 4)


def test_a_batch_without_requests_has_padding_alone() -> None:
    slots, positions = token_places(batch_of((), torch.zeros(0, 3).int(), 1), 3, 4)
    assert (slots.tolist(), positions.tolist()) == ([-1] * 3, [0] * 3)


def test_positions_of_fewer_tokens_are_padded_with_0() -> None:
    steps = Steps()
    batch = steps.plan(3)
    step = LayerStep.of(steps.mixed, batch, 5, TABLE)
    assert step.positions.tolist() == [0, 1, 2, 0, 0]


def test_a_cache_gives_positions_from_0_on() -> None:
    steps = Steps()
    steps.cache.extend("r", 2)
    steps.cache.allocate("long", 9)
    assert steps.cache.batch(["r", "long"], max_query_len=4).positions.tolist() == [0, 0, 0, 1, 5, 6, 7, 8]  # type: ignore[union-attr]


def test_lengths_of_a_scheduler_that_are_not_the_batchs_are_refused() -> None:
    batch = replace(batch_of((3,), torch.zeros(1, 3).int(), 1), kv_lens_on_host=(4,))
    with pytest.raises(ValueError, match=r"kv_lens_on_host: expected those of kv_lens, \[3\], got \[4\]"):
        batch.check_values(4, 1, 1)
    with pytest.raises(ValueError, match="kv_lens_on_host: expected 1 lengths, got 2"):
        replace(batch, kv_lens_on_host=(3, 3))


def test_a_negative_query_length_moves_no_other_requests_tokens() -> None:
    batch = PagedBatch(torch.tensor([[0], [1]], dtype=torch.int32), ints(2, 3), ints(-2, 3), 3)
    slots, positions = token_places(batch, 3, 4)
    assert (slots.tolist(), positions.tolist()) == ([4, 5, 6], [0, 1, 2])


def test_a_bound_on_all_tokens_of_no_sequence_reads_nothing() -> None:
    none, cu = torch.zeros(0, 1, dtype=torch.int32), ints(0)
    context = CachedContext(
        torch.randn(2, 4, 20), none, ints(), 5, torch.randn(3, 8, 16), torch.randn(3, 6, 16), max_tokens=5
    )
    out, _ = mla_chunked_prefill(
        torch.randn(2, 3, 12), torch.randn(2, 3, 8), torch.randn(2, 4), torch.randn(2, 3, 6), cu, cu, context,
        max_seqlen_q=2, max_seqlen_k=2, softmax_scale=0.3,
    )  # fmt: skip
    assert not bool(out.any())


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_len", "claim"), [(10, 4), (2, 2)], ids=["stale lengths", "fewer tokens than new ones"])
def test_lengths_of_a_scheduler_never_hide_what_the_device_has(kv_len: int, claim: int) -> None:
    shape = MLAShape(2, 512, 64, 16, torch.bfloat16, CacheFormat.bf16, 128, 128)
    mixed = MixedAttention(shape, Capacity(2, 16, 16, 64, 8), device="cuda")
    table_of_one = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    batch = PagedBatch(table_of_one, ints(kv_len).cuda(), ints(4).cuda(), 4, kv_lens_on_host=(claim,))
    mixed.plan(batch, [4])
    q, k, v = (torch.randn(4, 2, n, dtype=torch.bfloat16, device="cuda") for n in (192, 128, 128))
    out, lse = mixed.prefill(q, k, q[:, 0, 128:].contiguous(), v, softmax_scale=0.07)
    assert bool(out.isnan().all() and lse.isnan().all())
    with pytest.raises(IndexError, match="sequence 0"):
        mixed.check()
