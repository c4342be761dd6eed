"""What Hopper's kernels do to a row's weights: levels that stay until weights reach 2**8 pass the acceptance rule with
the rounding of the largest weight made up for, and fail it without. The kernels' own functions, on torch tensors."""

from __future__ import annotations

import math
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")

from portable_mla.backends.nvidia.hopper.decode.kernels import shared_memory
from portable_mla.backends.nvidia.hopper.kernels import softmax
from tests.support import acceptance
from tests.support.acceptance import logical_rows
from tests.support.cases import Case, Problem, build

LN_2, BLOCK = math.log(2), shared_memory.BLOCK.value


def kernel_functions(**constants: float) -> SimpleNamespace:
    """The functions of the softmax with torch in place of Gluon, and with other constants where they are given."""
    language = SimpleNamespace(
        where=torch.where, exp2=torch.exp2, full_like=torch.full_like, float32=torch.float32, constexpr=object
    )
    world: dict[str, Any] = {"gl": language, "multiply": torch.mul, "MOST_LOG2": softmax.MOST_LOG2.value}
    world |= constants
    for name, value in vars(softmax).items():
        if value.__class__.__name__ == "GluonJITFunction" and value.__module__ == softmax.__name__:
            world[name] = FunctionType(value.fn.__code__, world, name)
    return SimpleNamespace(**world)


def decode(problem: Problem, kernel: SimpleNamespace, *, made_up: bool = True) -> tuple[Tensor, Tensor, float]:
    """Blocks of keys from the last to the first, float32 sums of rounded weights; and the largest weight."""
    q, outs, lses, heaviest = problem.q, [], [], 0.0
    scale = torch.tensor(problem.softmax_scale / LN_2)
    for request, kv_len in enumerate(problem.kv_lens):
        rows = logical_rows(problem, problem.batch.block_table[request], kv_len).float()
        scores = q[request].float() @ rows.T
        level = torch.full(scores.shape[:1], -1e30)
        largest, total = level, torch.zeros_like(level)
        acc = torch.zeros(scores.shape[0], problem.latent_dim)
        for first in reversed(range(0, kv_len, BLOCK)):
            some = scores[:, first : first + BLOCK]
            largest = torch.maximum(largest, some.amax(1))
            raised = kernel.raise_level(level, largest, scale)
            factor = kernel.growth(level, raised, scale)
            # in float64, for the product and the difference to be rounded once, as in one operation
            weights = kernel.weigh(some.double(), (raised * scale).double(), scale.double()).float()
            heaviest = max(heaviest, weights.max().item())
            values = rows[first : first + BLOCK, : problem.latent_dim]
            acc = acc * factor[:, None] + weights.to(q.dtype).float() @ values
            total = total * factor + weights.sum(1)
            level = raised
        gain = kernel.rounding_gain(largest, level, scale, q.dtype)
        factor = kernel.normaliser(level, total, gain, scale, q.dtype) if made_up else 1.0 / total
        outs.append((acc * factor[:, None]).to(q.dtype))
        lses.append((level * scale + total.log2()) * LN_2)
    return torch.stack(outs), torch.stack(lses), heaviest


@pytest.mark.parametrize("content", ["heavy", "iid", "needle", "ties"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_rounding_of_the_largest_weight_has_to_be_made_up_for(content: str, dtype: str) -> None:
    problem = build(Case((700, 129, 64, 1000, 257), heads=20, page_size=64, content=content, dtype=dtype))
    out, lse, heaviest = decode(problem, kernel_functions())
    acceptance.check(problem, out, lse)
    assert heaviest <= 2.0**8 * (1 + 2**-7)
    if content == "heavy" and dtype == "bf16":
        out, lse, _ = decode(problem, kernel_functions(), made_up=False)
        with pytest.raises(AssertionError, match="^out"):
            acceptance.check(problem, out, lse)


def test_a_level_that_stays_for_longer_lets_float16_overflow() -> None:
    problem = build(Case((700, 1000), heads=20, page_size=64, content="needle", dtype="fp16"))
    assert decode(problem, kernel_functions(MOST_LOG2=64.0))[2] > torch.finfo(torch.float16).max
