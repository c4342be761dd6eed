"""Results beside other processes on the same GPU, which takes turns: a kernel is stopped in the middle and goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from portable_mla import PagedBatch
from tests.support import acceptance
from tests.support.cases import Case, Problem
from tests.support.targets import Target

pytestmark = pytest.mark.gpu

NEIGHBOURS = 3
RUNS = 30
# Turns are of milliseconds, which decodes seldom last. These last some, by a plan for one unit and requests that read
# the same pages.
KV_LENS = (25_000, 193, 4_001)
COPIES = 24
NEIGHBOUR = """
import sys
import torch
square = torch.randn(4096, 4096, device=sys.argv[1], dtype=torch.bfloat16)
print(float((square @ square).sum()), flush=True)
while True:
    float(sum((square @ square).sum() for _ in range(100)))
"""


@contextmanager
def neighbours(device: str) -> Iterator[None]:
    """Processes that keep the GPU busy, once all of them do."""
    with ExitStack() as stack:
        busy = []
        for _ in range(NEIGHBOURS):
            command = [sys.executable, "-c", NEIGHBOUR, device]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            busy.append(process)
        for process in busy:
            assert process.stdout is not None
            assert process.stdout.readline(), f"a neighbour ended with {process.wait()}"
        yield
        assert all(process.poll() is None for process in busy), "a neighbour ended early"


def copies(problem: Problem) -> Problem:
    """The requests many times over, over the same pages."""
    batch = problem.batch
    more = PagedBatch(batch.block_table.repeat(COPIES, 1), batch.kv_lens.repeat(COPIES), None, batch.max_query_len)
    q, kv_lens, query_lens = problem.q.repeat(COPIES, 1, 1), problem.kv_lens * COPIES, problem.query_lens * COPIES
    return replace(problem, q=q, batch=more, kv_lens=kv_lens, query_lens=query_lens)


@pytest.mark.parametrize("rope_dim", [64, 0])
def test_a_kernel_that_is_stopped_in_the_middle_keeps_its_bits(target: Target, rope_dim: int) -> None:
    case = Case(KV_LENS, heads=64, rope_dim=rope_dim, page_size=64, content="iid")
    if not target.has_kernels or target.of_a_library or not target.accepts(case):
        pytest.skip(f"{target} has no kernel of ours or refuses {case}")
    problem, one_unit = target.build(case), replace(target.arch, units=1)
    long = copies(problem)
    alone = target.run_as(long, arch=one_unit)
    acceptance.check(problem, *(result[: problem.tokens] for result in alone))
    with neighbours(target.device):
        for run in range(RUNS):
            out, lse = target.run_as(long, arch=one_unit)
            assert torch.equal(out, alone[0]), f"out has other bits in run {run}"
            assert torch.equal(lse, alone[1]), f"lse has other bits in run {run}"
