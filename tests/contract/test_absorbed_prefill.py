"""Absorbed prefill: queries of any length against the latent cache, by the decode kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from portable_mla import explain
from portable_mla.backends import reference
from portable_mla.core.arch import ARCHS
from portable_mla.decode.arguments import DecodeArguments
from portable_mla.metadata.status import Fault
from tests.contract.test_chunked_prefill import LATENT, PAGE
from tests.contract.test_contract import accepted, same
from tests.contract.test_mixed import HEADS, ROPE, attention, mixed
from tests.support import acceptance
from tests.support.cases import Case, build
from tests.support.targets import Target, local_targets


@pytest.fixture(
    scope="session", params=[t for t in local_targets() if t.accepts(Case((9,), max_query_len=33))], ids=str
)
def target(request: pytest.FixtureRequest) -> Target:
    """Every backend that takes long queries, on every device of this machine."""
    value: Target = request.param
    return value


@given(
    lens=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), min_size=1, max_size=3),
    ragged=st.booleans(),
    content=st.sampled_from(("iid", "needle", "fingerprint")),
    seed=st.integers(0, 99),
)
@example(lens=[(70, 40), (9, 9), (0, 5)], ragged=True, content="needle", seed=1)
def test_queries_of_any_length_obey_the_acceptance_rule(
    target: Target, lens: list[tuple[int, int]], ragged: bool, content: str, seed: int
) -> None:
    query_lens = tuple(n for n, _ in lens) if ragged else None
    longest = 70 if ragged else 33
    case = Case(
        tuple(n for _, n in lens), 5, 128, 32, query_lens=query_lens, max_query_len=longest, content=content, seed=seed
    )
    problem = accepted(target, case)
    acceptance.check(problem, *target.run(problem))


def test_absorbed_and_expanded_are_the_same_attention() -> None:
    rng = torch.Generator().manual_seed(5)
    rows, q_nope, q_pe = (torch.randn(*size, generator=rng).double() for size in ((90, 160), (33, 3, 64), (33, 3, 32)))
    w_uk, w_uv = (torch.randn(3, 64, 128, generator=rng).double() for _ in range(2))
    expanded, lse = reference.attend_unabsorbed(torch.cat([q_nope, q_pe], -1), rows, w_uk, w_uv, 0.05)
    absorbed_q = torch.cat([torch.einsum("nhd,hdl->nhl", q_nope, w_uk), q_pe], -1)
    latent, absorbed_lse = reference.attend(absorbed_q, rows, 128, 0.05)
    assert torch.allclose(torch.einsum("nhl,hvl->nhv", latent, w_uv), expanded, rtol=1e-12)
    assert torch.allclose(lse, absorbed_lse, rtol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True])
def test_long_queries_are_planned_in_blocks_unless_cuts_are_fixed(deterministic: bool) -> None:
    problem = build(Case((100, 100), 16, query_lens=(33, 9), max_query_len=33))
    request = DecodeArguments(problem.q, problem.kv_cache, problem.batch, 512, 0.1).request(deterministic)
    on_gpu = replace(request, arch=ARCHS["sm80"])
    reasons = explain(on_gpu).candidates[0].reasons
    if deterministic:
        assert reasons == ("needs at most 8 query tokens a request where bits must not depend on the batch, got 33",)
        return
    assert reasons == ()
    too_many = replace(on_gpu, capacity=replace(on_gpu.capacity, max_batch=10_000))
    assert "needs max_batch * max_query_len of at most 262144" in explain(too_many).candidates[0].reasons[0]


def test_a_mixed_step_prefills_absorbed_with_the_bits_of_a_step_of_its_own() -> None:
    target = Target("cpu", "cpu")
    step = mixed(((1, 90), (2, 30)), ((9, 60), (40, 45)), "cpu", 4)
    mixing = attention(target, 2, absorbed=True)
    b = step.batch
    assert b.query_lens is not None
    pages = torch.arange(sum(-(-n // 16) for n in (60, 45))).flip(0).int()
    table = b.block_table.clone()
    table[2, :4], table[3, :3] = pages[:4], pages[4:]
    batch = replace(b, block_table=table)
    cache, q = (torch.randn(*size, LATENT + ROPE).bfloat16() for size in ((400, PAGE), (49, HEADS)))
    mixing.plan(batch, step.query_lens)
    out, lse = mixing.prefill_absorbed(q, cache, softmax_scale=0.05)
    alone = replace(step.decode, q=q, kv_cache=cache, softmax_scale=0.05, kv_lens=(60, 45), query_lens=(9, 40))
    prefills = replace(batch, block_table=table[2:], kv_lens=b.kv_lens[2:], query_lens=b.query_lens[2:])
    alone = replace(alone, batch=prefills)
    same((out, lse), target.run(alone))
    acceptance.check(alone, out, lse)
    assert mixing.memory()["absorbed prefill: status"] == 8 * len(Fault)
    with pytest.raises(ValueError, match="prefill_absorbed: expected a MixedAttention built with absorbed=True"):
        attention(target, 2).prefill_absorbed(q, cache, softmax_scale=0.05)
