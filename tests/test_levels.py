"""What Hopper's kernels do to a row's weights, in torch: levels that stay until weights reach 2**8 pass the acceptance
rule with the rounding of the largest weight made up for, and fail it without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import acceptance
from tests.acceptance import logical_rows
from tests.cases import Case, Problem, build

BLOCK, MOST_LOG2, LN_2 = 64, 8.0, math.log(2)


def decode(problem: Problem, *, made_up: bool) -> tuple[Tensor, Tensor]:
    """Blocks of keys from the last to the first, float32 sums of rounded weights."""
    q, outs, lses = problem.q, [], []
    for request, kv_len in enumerate(problem.kv_lens):
        rows = logical_rows(problem, problem.batch.block_table[request], kv_len).float()
        scores = q[request].float() @ rows.T * (problem.softmax_scale / LN_2)
        level = torch.full(scores.shape[:1], -1e30)
        largest, total = level, torch.zeros_like(level)
        acc = torch.zeros(scores.shape[0], problem.latent_dim)
        for first in reversed(range(0, kv_len, BLOCK)):
            some = scores[:, first : first + BLOCK]
            highest = some.amax(1)
            largest = torch.maximum(largest, highest)
            raised = torch.where(highest - level > MOST_LOG2, highest, level)
            factor = torch.exp2(level - raised)
            weights = torch.exp2(some - raised[:, None])
            values = rows[first : first + BLOCK, : problem.latent_dim]
            acc = acc * factor[:, None] + weights.to(q.dtype).float() @ values
            total = total * factor + weights.sum(1)
            level = raised
        heaviest = torch.exp2(largest - level)
        gain = heaviest.to(q.dtype).float() - heaviest if made_up else 0.0
        outs.append((acc / (total + gain)[:, None]).to(q.dtype))
        lses.append((level + total.log2()) * LN_2)
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("content", ["heavy", "iid", "needle", "ties"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_rounding_of_the_largest_weight_has_to_be_made_up_for(content: str, dtype: str) -> None:
    problem = build(Case((700, 129, 64, 1000, 257), heads=20, page_size=64, content=content, dtype=dtype))
    acceptance.check(problem, *decode(problem, made_up=True))
    if content == "heavy" and dtype == "bf16":
        with pytest.raises(AssertionError, match="^out"):
            acceptance.check(problem, *decode(problem, made_up=False))
