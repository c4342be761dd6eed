"""The kernel of contexts over their bounds in the interpreter: what torch has."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from portable_mla.metadata import Status
from portable_mla.prefill.context_bounds import launch_poison, poison_in_torch

CPU = torch.device("cpu")


@given(
    sequences=st.lists(st.tuples(st.integers(-3, 40), st.integers(0, 4)), min_size=1, max_size=6),
    max_len=st.integers(0, 40),
    max_tokens=st.integers(0, 150),
    reports=st.booleans(),
)
def test_the_kernel_poisons_the_rows_that_torch_poisons(
    sequences: list[tuple[int, int]], max_len: int, max_tokens: int, reports: bool
) -> None:
    lens = torch.tensor([n for n, _ in sequences], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, *(n for _, n in sequences)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = int(cu_seqlens[-1]) + 2
    bounds = {"max_len": max_len, "max_tokens": max_tokens}
    results = []
    for poison in (poison_in_torch, launch_poison):
        out, lse, status = torch.ones(rows, 3, 5).bfloat16(), torch.ones(rows, 3), Status.allocate(CPU).words
        poison(lens, cu_seqlens, out, lse, **bounds, status=status if reports else None)
        results.append((out.float().nan_to_num(9.0), lse.nan_to_num(9.0), status))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
