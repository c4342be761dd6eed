"""The sm90 prefill kernel's barriers: no interleaving of its warps deadlocks, over-arrives at a named barrier or
touches shared memory that another warp is still reading or writing; the model notices seeded faults; and the kernel's
own source does what the model does, so that no call of its can be left out or exchanged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")

from tests.protocol.barrier_model import Fault, play
from tests.protocol.barrier_search import Search
from tests.protocol.kernel_source import Files
from tests.protocol.kernel_trace import (
    Changed,
    Segment,
    normal_form,
    with_calls_exchanged,
    with_parity,
    with_sizes,
    without_each_call,
)
from tests.protocol.prefill_model import SIZES, Queue
from tests.protocol.prefill_trace import BARRIERS, FILES, trace

BOTH = (False, True)
ROLES = range(4)
CASES = [
    (Queue(some, [tail] * len(some), suspect and causal, ahead), late, causal, suspect)
    for some in ([], [1], [2, 1], [1, 4, 2])
    for tail, late, ahead, causal, suspect in itertools.product(BOTH, repeat=5)
]
LONGEST = CASES[-32:]


def of_the_model(work: Queue, role: int) -> list[Segment]:
    return normal_form(with_sizes(with_parity(work.roles()[role]), SIZES))


def follow(case: tuple[Queue, bool, bool, bool], role: int, files: Files = FILES) -> list[Segment]:
    work, late, causal, suspect = case
    return normal_form(trace(work, role, files, late=late, causal=causal, suspect=suspect))


def follows(files: Files) -> bool:
    """Whether the source does what the model does in every role."""
    for case, role in itertools.product(LONGEST, ROLES):
        try:
            if follow(case, role, files) != of_the_model(case[0], role):
                return False
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("role", ROLES)
def test_the_kernel_does_what_the_model_does(role: int) -> None:
    for case in CASES:
        assert follow(case, role) == of_the_model(case[0], role), case


@pytest.mark.parametrize("change", [without_each_call, with_calls_exchanged])
def test_no_call_of_the_kernel_can_be_left_out_or_exchanged(change: Callable[[Files], Changed]) -> None:
    assert [place for place, files in change(FILES) if follows(files)] == []


def test_named_barriers_have_numbers_that_triton_does_not_use() -> None:
    assert set(BARRIERS.values()) == set(SIZES)
    assert all(6 < number < 15 for number in BARRIERS)


def test_no_interleaving_of_small_items_deadlocks_or_races() -> None:
    for count in (0, 1, 2):
        for blocks in itertools.product((1, 2, 3), repeat=count):
            for tail, suspect, ahead in itertools.product(BOTH, repeat=3):
                Search(SIZES, Queue(blocks, [tail] * count, suspect, ahead).roles()).explore()


def test_no_random_interleaving_deadlocks_or_races() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        blocks = [rng.choice((1, 1, 1, 2, 3, 5)) for _ in range(rng.randint(0, 6))]
        tails, suspect, ahead = [rng.random() < 0.5 for _ in blocks], rng.random() < 0.5, rng.random() < 0.5
        play(rng, SIZES, Queue(blocks, tails, suspect, ahead).roles())


@pytest.mark.parametrize("ahead", BOTH)
@pytest.mark.parametrize("suspect", BOTH)
def test_items_wait_for_whoever_still_reads_them(suspect: bool, ahead: bool) -> None:
    blocks, tails = [1] * 6, [True] * 6
    Search(SIZES, Queue(blocks, tails, suspect, ahead).roles()).explore()
    with pytest.raises(Fault, match="item"):
        Search(SIZES, Queue(blocks, tails, suspect, ahead, slots=2 if suspect else 1).roles()).explore()


@pytest.mark.parametrize("fault", ["early release", "turn left"])
def test_a_seeded_fault_is_in_some_interleaving(fault: str) -> None:
    work = Queue([3, 1, 1, 1], [False] * 4, fault=fault)
    with pytest.raises(Fault):
        Search(SIZES, work.roles()).explore()
