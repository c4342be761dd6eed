"""Properties of prefill that every backend must have, and of the merge that joins its chunks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, event, example, given, note
from hypothesis import strategies as st
from torch import Tensor

from portable_mla import merge_state, merge_states, mla_prefill
from tests.contract.test_contract import same
from tests.support import prefill_cases
from tests.support.environment import TILES, asked
from tests.support.prefill_cases import (
    CONTENTS,
    GARBAGE,
    GEOMETRIES,
    PrefillCase,
    PrefillProblem,
    Result,
    build,
    offsets,
    run,
    run_into,
)
from tests.support.strategies import GPU
from tests.support.targets import Target

HALF = ("bf16", "fp16")


@pytest.fixture(scope="session", params=prefill_cases.prefill_targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that serves prefill, on every device of this machine."""
    value: Target = request.param
    return value


@st.composite
def prefills(
    draw: st.DrawFn, *, contents: tuple[str, ...] = tuple(CONTENTS), causal: bool | None = None
) -> PrefillCase:
    """A prefill, with lengths at the edges of tiles; on a GPU what it is compiled for is drawn from few."""
    length = st.one_of(st.sampled_from((0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)), st.integers(0, 300))
    sequences = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    dtypes = HALF if GPU else (*HALF, "fp32")
    return PrefillCase(
        tuple(queries for queries, _ in sequences),
        tuple(keys for _, keys in sequences),
        draw(st.sampled_from((2,) if GPU else (1, 2, 5))),
        draw(st.sampled_from(GEOMETRIES)),
        draw(st.sampled_from(dtypes)),
        draw(st.booleans()) if causal is None else causal,
        draw(st.sampled_from(contents)),
        draw(st.sampled_from(sorted(GARBAGE))),
        draw(st.sampled_from((0, 3))),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 2**16)),
    )


def accepted(target: Target, case: PrefillCase) -> PrefillProblem:
    """The case's problem, if the backend serves it."""
    problem = build(case, target.device)
    note(repr(case))
    assume(prefill_cases.accepts(target, problem))
    event(f"{target} {case.content}")
    return problem


@given(case=prefills())
@example(case=PrefillCase((0,), (0,)))
@example(case=PrefillCase((0, 3, 0), (5, 0, 0), padding=300))
@example(case=PrefillCase((7, 1), (3, 1)))
@example(case=PrefillCase((130, 1, 257), (400, 129, 257), content="needle", garbage="hot"))
@example(case=PrefillCase((40, 130), (600, 300), 8, (192, 64, 256), content="heavy"))
@example(case=PrefillCase((128, 128), (128, 256), content="neg_extreme"))
@example(case=PrefillCase((128, 128), (128, 256), content="pos_extreme"))
@example(case=PrefillCase((5, 65), (300, 64), causal=False, content="ties"))
@example(case=PrefillCase((1,) * 150, (3,) * 150))
def test_every_result_obeys_the_acceptance_rule(target: Target, case: PrefillCase) -> None:
    problem = accepted(target, case)
    prefill_cases.check(problem, *run(target, problem))


@given(case=prefills(), garbage=st.sampled_from(sorted(GARBAGE)))
def test_keys_and_queries_that_nobody_owns_never_reach_an_output(
    target: Target, case: PrefillCase, garbage: str
) -> None:
    problem = accepted(target, replace(case, spare_keys=3, padding=3))
    inputs, keys, tokens = problem.inputs, sum(case.kv_lens), sum(case.query_lens)
    other = {name: getattr(inputs, name).clone() for name in ("q", "k_nope", "k_pe", "v")}
    for name in ("k_nope", "k_pe", "v"):
        other[name][keys:] = GARBAGE[garbage]
    other["q"][tokens:] = torch.nan
    same(run(target, problem), run(target, problem.with_inputs(**other)))


@given(case=prefills(contents=("iid", "needle")), seed=st.integers(0, 99))
def test_the_order_and_company_of_sequences_change_no_bit(target: Target, case: PrefillCase, seed: int) -> None:
    problem = accepted(target, replace(case, padding=0))
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(case.kv_lens), generator=rng).tolist()[: 1 + seed % len(case.kv_lens)]
    whole, mine = run(target, problem), rows(case.query_lens, order)
    theirs = rows(case.kv_lens, order)
    some = replace(
        case, query_lens=tuple(case.query_lens[i] for i in order), kv_lens=tuple(case.kv_lens[i] for i in order)
    )
    inputs, device = problem.inputs, target.device
    chosen = replace(problem, case=some).with_inputs(
        q=inputs.q[mine], k_nope=inputs.k_nope[theirs], k_pe=inputs.k_pe[theirs], v=inputs.v[theirs],
        cu_seqlens_q=offsets(some.query_lens, device), cu_seqlens_k=offsets(some.kv_lens, device),
    )  # fmt: skip
    same((whole[0][mine], whole[1][mine]), run(target, chosen))


@given(case=prefills(contents=("iid",)))
def test_empty_sequences_change_no_bit(target: Target, case: PrefillCase) -> None:
    problem = accepted(target, case)
    more_q = tuple(n for length in case.query_lens for n in (0, length, 0))
    more_k = tuple(n for length in case.kv_lens for n in (0, length, 0))
    padded = replace(problem, case=replace(case, query_lens=more_q, kv_lens=more_k)).with_inputs(
        cu_seqlens_q=offsets(more_q, target.device), cu_seqlens_k=offsets(more_k, target.device)
    )
    same(run(target, problem), run(target, padded))


@given(case=prefills(), step=st.sampled_from((8, 1)))
def test_strides_change_no_bit_where_the_way_of_loading_does_not(target: Target, case: PrefillCase, step: int) -> None:
    problem = accepted(target, case)
    inputs = problem.inputs
    apart = {name: getattr(inputs, name).contiguous() for name in ("k_nope", "k_pe", "v")}
    for name, tensor in {**apart, "q": inputs.q}.items():
        wide = torch.full((*(n + 1 for n in tensor.shape[:-1]), tensor.shape[-1] + step), torch.nan).to(tensor)
        view = wide[tuple(slice(1, None) for _ in tensor.shape[:-1])][..., step:]
        apart[name] = view.copy_(tensor)
    strided = problem.with_inputs(**apart)
    out, lse = run(target, problem)
    if step % 8:  # unaligned rows are gathered, by an instruction that may sum in another order
        prefill_cases.check(strided, *run(target, strided))
    else:
        same((out, lse), run(target, strided))
    q, device = inputs.q, target.device
    wide_out = torch.full((q.shape[0], q.shape[1] + 1, out.shape[2] + 8), 7.0, dtype=out.dtype, device=device)
    wide_lse = torch.full((lse.shape[0], 2, lse.shape[1]), 7.0, device=device)
    run_into(target, problem, wide_out[:, 1:, 8:], wide_lse[:, 0])
    same((out, lse), (wide_out[:, 1:, 8:], wide_lse[:, 0]))
    assert bool((wide_out[:, :1] == 7).all() and (wide_out[..., :8] == 7).all() and (wide_lse[:, 1] == 7).all())


@given(case=prefills(contents=("iid", "needle"), causal=True), cuts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_chunks_of_keys_merged_by_lse_are_the_whole(target: Target, case: PrefillCase, cuts: list[float]) -> None:
    kv_lens = tuple(max(keys, queries) for queries, keys in zip(case.query_lens, case.kv_lens, strict=True))
    problem = accepted(target, replace(case, kv_lens=kv_lens))
    context = [keys - queries for queries, keys in zip(case.query_lens, kv_lens, strict=True)]
    edges = [[0] * len(context), *([int(n * cut) for n in context] for cut in sorted(cuts)), list(kv_lens)]
    parts = []
    for lows, highs in itertools.pairwise(edges):
        last = highs == edges[-1]
        parts.append(run(target, part_of(problem, lows, highs, causal=last), float32_out=True))
    out, lse = merge_states(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    prefill_cases.check(problem, out.to(problem.inputs.q.dtype), lse)


@given(case=prefills(contents=("iid", "needle"), causal=True))
def test_each_query_token_is_a_prefill_of_its_own(target: Target, case: PrefillCase) -> None:
    problem = accepted(target, replace(case, query_lens=case.query_lens[:1], kv_lens=case.kv_lens[:1], padding=0))
    (queries,), (keys,) = problem.case.query_lens, problem.case.kv_lens
    golden, golden_lse = problem.golden()
    for index in {0, queries // 2, queries - 1} if queries else set():
        visible = max(0, keys - queries + index + 1)
        alone = part_of(problem, [0], [visible], causal=True)
        alone = replace(alone, case=replace(alone.case, query_lens=(1,))).with_inputs(
            q=alone.inputs.q[index : index + 1], cu_seqlens_q=offsets((1,), target.device)
        )
        out, lse = run(target, alone)
        prefill_cases.check(alone, out, lse)
        assert ((lse - golden_lse[index]).abs().nan_to_num() <= 1e-4 + 2e-6 * golden_lse[index].abs()).all()
        assert bool(golden[index].any()) == (visible > 0)


@given(case=prefills(contents=("iid",)), seed=st.integers(0, 99))
def test_a_second_run_and_the_deterministic_mode_give_the_same_bits(
    target: Target, case: PrefillCase, seed: int
) -> None:
    problem = accepted(target, case)
    first = run(target, problem)
    same(first, run(target, problem))
    same(first, run(target, problem, deterministic=True))


def test_offsets_that_contradict_the_tensors_touch_no_memory_outside(target: Target) -> None:
    problem = build(PrefillCase((40, 100), (50, 200)), target.device)
    sizes = problem.inputs.q.shape[:2], problem.inputs.v.shape[2]
    for wrong_q, wrong_k in (
        ((0, 2**30, 2**31 - 1), (0, 2**30, 2**31 - 1)),
        ((0, -5, 100), (-7, 300, 20)),
        ((500, 20, 10), (252, 0, 5)),
        ((-(2**31), 2**31 - 1, 0), (2**31 - 1, -(2**31), 1)),
    ):
        outside = torch.full((3, *sizes[0], sizes[1]), 7.0, dtype=torch.bfloat16, device=target.device)
        outside_lse = torch.full((3, *sizes[0]), 7.0, device=target.device)
        broken = problem.with_inputs(
            cu_seqlens_q=torch.tensor(wrong_q, dtype=torch.int32, device=target.device),
            cu_seqlens_k=torch.tensor(wrong_k, dtype=torch.int32, device=target.device),
        )
        if not target.has_kernels:
            if target.device == "cpu":
                with pytest.raises(ValueError, match="cu_seqlens_[qk]: "):
                    run_into(target, broken, outside[1], outside_lse[1])
            continue
        run_into(target, broken, outside[1], outside_lse[1])
        assert bool((outside[::2] == 7).all() and (outside_lse[::2] == 7).all())
    prefill_cases.check(problem, *run(target, problem))


@pytest.mark.gpu
def test_a_captured_prefill_is_right_at_any_lengths_of_as_many_tokens_and_sequences() -> None:
    target = Target("cuda", "triton", asked(TILES) or "")
    first = build(PrefillCase((64, 100, 0), (64, 300, 0), padding=20, spare_keys=0), "cuda")
    out, lse = (tensor.clone() for tensor in run(target, first))
    graph = torch.cuda.CUDAGraph()
    run_into(target, first, out, lse)
    with torch.cuda.graph(graph):
        run_into(target, first, out, lse)
    for queries, keys in (((150, 3, 7), (160, 90, 114)), ((0, 0, 1), (0, 0, 364)), ((64, 100, 0), (64, 300, 0))):
        padding = 184 - sum(queries)
        later = build(PrefillCase(queries, keys, padding=padding, spare_keys=0, seed=5), "cuda")
        for name in ("q", "k_nope", "k_pe", "v", "cu_seqlens_q", "cu_seqlens_k"):
            getattr(first.inputs, name).copy_(getattr(later.inputs, name))
        out.fill_(torch.nan)
        graph.replay()
        prefill_cases.check(later, out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("step", [0, 1], ids=["aligned", "unaligned"])
def test_rows_beyond_2_to_the_31_elements_are_found(step: int) -> None:
    target = Target("cuda", "triton", asked(TILES) or "")
    problem = build(PrefillCase((3, 66), (4, 66), 2, GEOMETRIES[-1], content="needle", padding=1), "cuda")
    far = {}
    for name in ("q", "k_nope", "k_pe", "v"):
        tensor = getattr(problem.inputs, name)
        room = torch.empty(len(tensor), 1 << 25, dtype=tensor.dtype, device="cuda")
        inner = tensor[0].contiguous().stride()
        far[name] = room.as_strided(tensor.shape, (1 << 25, *inner), room.storage_offset() + step).copy_(tensor)
    distant = problem.with_inputs(**far)
    out = torch.empty(70, 1 << 25, dtype=torch.bfloat16, device="cuda")[:, : 2 * 64].unflatten(1, (2, 64))
    lse = torch.empty(70, 2, device="cuda")
    run_into(target, distant, out, lse)
    prefill_cases.check(problem, out, lse)


def part_of(problem: PrefillProblem, lows: list[int], highs: list[int], *, causal: bool) -> PrefillProblem:
    """The problem with the keys [low, high) of each sequence alone."""
    case, inputs = problem.case, problem.inputs
    starts = offsets(case.kv_lens).tolist()
    index = [start + n for start, low, high in zip(starts, lows, highs, strict=False) for n in range(low, high)]
    lens = tuple(high - low for low, high in zip(lows, highs, strict=True))
    chosen = {name: getattr(inputs, name)[index] for name in ("k_nope", "k_pe", "v")}
    return replace(problem, case=replace(case, kv_lens=lens, causal=causal)).with_inputs(
        **chosen, cu_seqlens_k=offsets(lens, inputs.q.device), causal=causal
    )


def rows(lens: tuple[int, ...], order: list[int]) -> Tensor:
    """Rows of the sequences in this order."""
    starts = offsets(lens).tolist()
    return torch.tensor([starts[i] + n for i in order for n in range(lens[i])], dtype=torch.long)


def call(target: Target, problem: PrefillProblem, **changes: Any) -> Result:
    """mla_prefill with other arguments."""
    i, bounds = problem.inputs, problem.arguments
    arguments: dict[str, Any] = {
        "q": i.q, "k_nope": i.k_nope, "k_pe": i.k_pe, "v": i.v, "cu_seqlens_q": i.cu_seqlens_q,
        "cu_seqlens_k": i.cu_seqlens_k, "max_seqlen_q": bounds.max_seqlen_q, "max_seqlen_k": bounds.max_seqlen_k,
        "softmax_scale": problem.softmax_scale, "causal": i.causal, "backend": target.backend,
    }  # fmt: skip
    return mla_prefill(**(arguments | changes))


SMALL = PrefillCase((3, 5), (4, 9))
CPU = Target("cpu", "cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": 3}, TypeError, "q: expected a tensor, got int"),
        ({"q": torch.zeros(9, 3)}, ValueError, r"q: expected \[tokens, heads, nope \+ rope\], got shape \(9, 3\)"),
        ({"k_pe": torch.zeros(15, 64)}, TypeError, "k_pe: expected torch.bfloat16 like q, got torch.float32"),
        ({"q": torch.zeros(9, 3, 190).bfloat16()}, ValueError, "q: expected 192 in the last dimension"),
        ({"k_nope": torch.zeros(15, 2, 128).bfloat16()}, ValueError, "k_nope: expected 3 heads like q, got 2"),
        ({"k_pe": torch.zeros(14, 64).bfloat16()}, ValueError, "k_pe: expected 15 keys like v, got 14"),
        ({"v": torch.zeros(15, 128, 3).bfloat16().mT}, ValueError, "v: expected a last-dimension stride of 1"),
        ({"cu_seqlens_q": torch.zeros(3)}, TypeError, "cu_seqlens_q: expected int32, got torch.float32"),
        ({"cu_seqlens_k": torch.zeros(4).int()}, ValueError, "cu_seqlens_k: expected 3 offsets like cu_s"),
        ({"cu_seqlens_q": torch.zeros(0).int()}, ValueError, r"cu_seqlens_q: expected \[sequences \+ 1\], got shape"),
        ({"cu_seqlens_q": offsets((3, 50))}, ValueError, "cu_seqlens_q: expected offsets from 0 to at most 9"),
        ({"cu_seqlens_k": offsets((14, -1))}, ValueError, "cu_seqlens_k: sequence 0: expected 0 to 9 rows"),
        ({"max_seqlen_q": 4}, ValueError, r"cu_seqlens_q: sequence 1: expected 0 to 4 rows \(max_seqlen_q\), got 5"),
        ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected an int of at least 0, got -1"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale: expected a positive finite float, got 0.0"),
        ({"out": torch.zeros(9, 3, 128)[:, :2].float()}, ValueError, r"out: expected shape \(9, 3, 128\)"),
        ({"out": torch.zeros(9, 3, 128).half()}, TypeError, "out: expected torch.bfloat16, got torch.float16"),
        ({"backend": "fast"}, ValueError, "backend: expected one of .*, got 'fast'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(CPU, build(SMALL), **changes)


def test_a_result_that_shares_memory_with_an_input_is_refused() -> None:
    problem = build(SMALL)
    with pytest.raises(ValueError, match="out: shares memory with q"):
        call(CPU, problem, out=problem.inputs.q[..., :128])


def test_the_ops_pass_opcheck_and_compile() -> None:
    problem = build(SMALL)
    i = problem.inputs
    tensors = (i.q, i.k_nope, i.k_pe, i.v, i.cu_seqlens_q, i.cu_seqlens_k)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.portable_mla.prefill, (*tensors, 5, 9, 0.1), test_utils=tests)
    out, lse = run(CPU, problem)
    torch.library.opcheck(torch.ops.portable_mla.prefill_out, (*tensors, out, lse, 5, 9, 0.1), test_utils=tests)
    state = (torch.randn(4, 2, 8), torch.randn(4, 2))
    torch.library.opcheck(torch.ops.portable_mla.merge_state, (*state, *state), test_utils=tests)
    torch.library.opcheck(torch.ops.portable_mla.merge_states, tuple(t[None] for t in state), test_utils=tests)
    compiled = torch.compile(lambda: merge_state(*call(CPU, problem), *call(CPU, problem)), fullgraph=True)
    same(compiled(), merge_state(*call(CPU, problem), *call(CPU, problem)))


# Merging, on every device of this machine.

DEVICES = ["cpu", *(["cuda"] if GPU else [])]


def states(parts: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Results over disjoint keys, a third of the rows empty, and NaN in them."""
    rng = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(parts, 9, 5, 96, generator=rng), torch.randn(parts, 9, 5, generator=rng) * 4
    empty = torch.rand(parts, 9, 5, generator=rng) < 0.3
    empty[:, 0] = True
    outs[empty], lses[empty] = torch.nan, -torch.inf
    lses[:, 1] += 1e4
    return outs.to(device, dtype), lses.to(device)


def golden_merge(outs: Tensor, lses: Tensor) -> Result:
    """In float64."""
    total = torch.logsumexp(lses.double(), 0)
    weights = torch.exp(lses.double() - total.masked_fill(total == -torch.inf, 0.0))
    return torch.where(lses[..., None] == -torch.inf, 0.0, weights[..., None] * outs.double()).sum(0), total


def close(one: Result, other: Result) -> None:
    """Equal up to float32 rounding, of large logarithms too: theirs is the relative error of a weight."""
    assert torch.equal(one[1] == -torch.inf, other[1] == -torch.inf)
    assert bool(torch.isfinite(one[0]).all())
    rounding = 4e-6 + 2**-21 * other[1].abs().nan_to_num(posinf=0.0)[..., None]
    assert ((one[0].double() - other[0].double()).abs() <= rounding).all()
    assert ((one[1].double() - other[1].double()).abs().nan_to_num() <= 1e-6 + 1e-6 * other[1].abs().nan_to_num()).all()


@pytest.mark.parametrize("device", DEVICES)
@given(parts=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_merging_is_the_sum_over_all_keys_in_any_order_and_grouping(device: str, parts: int, seed: int) -> None:
    outs, lses = states(parts, seed, device)
    golden = golden_merge(outs, lses)
    close(merge_states(outs, lses), golden)
    close(merge_states(outs.flip(0), lses.flip(0)), golden)
    folded = outs[0], lses[0]
    for part in range(1, parts):
        folded = merge_state(*folded, outs[part], lses[part])
    if parts > 1:
        close(folded, golden)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_empty_part_changes_no_bit_and_empty_parts_are_0_and_minus_inf(device: str, dtype: torch.dtype) -> None:
    outs, lses = states(1, 3, device, dtype)
    out, lse = torch.where(lses[0, ..., None] == -torch.inf, 0.0, outs[0]), lses[0]
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    same(merge_state(out, lse, *nothing), (out, lse))
    same(merge_state(*nothing, out, lse), (out, lse))
    empty_out, empty_lse = merge_states(torch.stack([nothing[0]] * 3), torch.stack([nothing[1]] * 3))
    assert not bool(empty_out.any())
    assert bool((empty_lse == -torch.inf).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_faulty_part_stays_nan_and_strides_change_no_bit(device: str) -> None:
    outs, lses = states(2, 8, device)
    lses[1, 4] = torch.nan
    out, lse = merge_state(outs[0], lses[0], outs[1], lses[1])
    assert bool(out[4].isnan().all() and lse[4].isnan().all())
    assert bool(torch.isfinite(out[[n for n in range(9) if n != 4]]).all())
    wide = outs.new_full((9, 5, 2, 100), torch.nan)[..., :96].permute(2, 0, 1, 3).copy_(outs)
    turned = lses.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = merge_states(wide, turned)
    assert torch.equal(strided[0].nan_to_num(), out.nan_to_num())
    assert torch.equal(strided[1].nan_to_num(), lse.nan_to_num())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out_a": torch.zeros(4, 8)}, ValueError, r"out_a: expected 3 dimensions, got shape \(4, 8\)"),
        ({"out_b": torch.zeros(4, 2, 9)}, ValueError, r"out_b: expected shape \(4, 2, 8\) like out_a"),
        ({"lse_a": torch.zeros(2, 4)}, ValueError, r"lse_a: expected shape \(4, 2\), got \(2, 4\)"),
        ({"lse_b": torch.zeros(4, 2).double()}, TypeError, "lse_b: expected torch.float32, got torch.float64"),
        ({"out_a": torch.zeros(4, 2, 8).int()}, TypeError, "out_a: expected a dtype of"),
    ],
)
def test_a_wrong_part_of_a_merge_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    part = {"out_a": torch.zeros(4, 2, 8), "lse_a": torch.zeros(4, 2)}
    part |= {"out_b": torch.zeros(4, 2, 8), "lse_b": torch.zeros(4, 2)}
    with pytest.raises(error, match=message):
        merge_state(**(part | changes))
