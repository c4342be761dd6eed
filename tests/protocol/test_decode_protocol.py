"""The sm90 decode kernel's barriers: no interleaving of its warps deadlocks, over-arrives at a named barrier or touches
shared memory that another warp is still reading or writing; the model notices seeded faults; and the kernel's own
source does what the model does, so that no call of its can be left out or exchanged."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")

from tests.protocol.barrier_model import Fault, play
from tests.protocol.barrier_search import Search
from tests.protocol.decode_loader_model import SIZES, Part
from tests.protocol.decode_model import roles_of
from tests.protocol.decode_trace import BARRIERS, FILES, trace
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

BOTH = (False, True)
ROLES = range(4)
TAILS = (0, 20, 61)  # slots behind the keys: with 8 tokens, the last one leaves hidden keys in the block before too
SHAPES = [(tail, tokens) for tail in TAILS for tokens in (1, 8)]
CASES = [Part([], [])] + [
    Part(blocks, [tail] * len(blocks), rope, tokens, small)
    for some in ([1], [2, 1], [5, 1, 0, 4, 2])
    for blocks in (some, [0, *some])
    for (tail, tokens), rope, small in itertools.product(SHAPES, BOTH, BOTH)
]
LONGEST = CASES[-48:]


def of_the_model(work: Part, role: int) -> list[Segment]:
    return normal_form(with_sizes(with_parity(roles_of(work)[role]), SIZES))


def follow(work: Part, role: int, files: Files = FILES) -> list[Segment]:
    return normal_form(trace(work, role, files, boxes=4 if work.small else 2, once=work.small))


def follows(files: Files) -> bool:
    """Whether the source does what the model does in every role."""
    for work, role in itertools.product(LONGEST, ROLES):
        try:
            if follow(work, role, files) != of_the_model(work, role):
                return False
        except AssertionError:
            return False
    return True


@pytest.mark.parametrize("role", ROLES)
def test_the_kernel_does_what_the_model_does(role: int) -> None:
    for work in CASES:
        assert follow(work, role) == of_the_model(work, role), work


@pytest.mark.parametrize("change", [without_each_call, with_calls_exchanged])
def test_no_call_of_the_kernel_can_be_left_out_or_exchanged(change: Callable[[Files], Changed]) -> None:
    assert [place for place, files in change(FILES) if follows(files)] == []


def test_named_barriers_have_numbers_that_triton_does_not_use() -> None:
    assert set(BARRIERS.values()) == set(SIZES)
    assert all(6 < number < 15 for number in BARRIERS)


def test_no_interleaving_of_small_items_deadlocks_or_races() -> None:
    for count in (0, 1, 2):
        for blocks in itertools.product(range(4), repeat=count):
            for tail, tokens in SHAPES:
                Search(SIZES, roles_of(Part(blocks, [tail] * count, tokens=tokens))).explore()


def test_no_random_interleaving_deadlocks_or_races() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        blocks = [rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 6, 9)) for _ in range(rng.randint(0, 4))]
        tails, rope, tokens = [rng.choice(TAILS) for _ in blocks], rng.random() < 0.7, rng.choice((1, 8))
        play(rng, SIZES, roles_of(Part(blocks, tails, rope, tokens, rng.random() < 0.5)))


@pytest.mark.parametrize(
    "fault", ["early release", "arrive before meeting", "no wait", "no meeting", "drop before meeting"]
)
def test_a_seeded_fault_is_in_some_interleaving(fault: str) -> None:
    work = Part([5, 1], [0] * 2, tokens=8, fault=fault)
    with pytest.raises(Fault):
        Search(SIZES, roles_of(work)).explore()
