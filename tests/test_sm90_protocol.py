"""A model of the sm90 decode kernel's barriers: no interleaving of its warps deadlocks, over-arrives at a named barrier
or touches shared memory that another warp is still reading or writing; and the model notices seeded faults.

Each role is a generator that follows its function in sm90_warpgroup_kernels.py or sm90_load_kernels.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from tests.barrier_model import COMPUTE, LOADER, Fault, Role, Room, play, play_all

SIZES = {"weights0": 256, "weights1": 256, "query": 320} | dict.fromkeys(
    ("free_left0", "free_left1", "free_right0", "free_right1"), 160
)
QUERY = ("query0", "query1")


def scores(room: Room, item: int, key: object, count: int, keys: tuple[str, str]) -> Role:
    """The products with both halves of Q begin, each when its half of the block has landed."""
    for half in QUERY:
        yield room.begin(half, item)
    for buffer in keys:
        yield room.wait(buffer, count)
        yield room.begin(buffer, key)


def take_query(room: Room, item: int, rope: bool) -> Role:
    """wait_query."""
    if rope:
        yield room.wait("weights1", item + 1)
        yield room.begin("weights1", ("q", item))
        yield room.end("weights1")
    for half in QUERY:
        yield room.wait(half, item + 1)


def weigh_even(room: Room, key: object) -> Role:
    """The even block's weights, and the left warpgroup's product with them."""
    yield room.write("level0", key)
    yield room.write("weights0", key)
    yield room.arrive("weights0")
    yield room.begin("left0", key)
    yield room.end("left0")
    yield room.arrive("free_left0")


def left(room: Room, items: list[int], rope: bool) -> Role:
    """left_warpgroup: `items` holds blocks."""
    count = 0
    for item, blocks in enumerate(filter(None, items)):
        pairs, lone = divmod(blocks, 2)
        yield from take_query(room, item, rope)
        if lone:
            count += 1
            key: tuple[int, object] = (item, "lone")
            yield from scores(room, item, key, count, ("left0", "right0"))
            for buffer in (*QUERY, "left0", "right0"):
                yield room.end(buffer)
            if not pairs:
                yield room.arrive("query")
            yield from weigh_even(room, key)
            if room.fault != "no meeting":
                yield from room.meet("left", "weights1", COMPUTE)
        for pair in range(pairs):
            count += 1
            key = (item, pair)
            yield from scores(room, item, key, count, ("left0", "right0"))
            if pair:  # the product of the pair before is waited for behind the first scores
                yield room.end("weights1")
                yield room.end("left1")
                yield room.arrive("free_left1")
            for buffer in (*QUERY, "left0", "right0"):
                yield room.end(buffer)
            if pair == pairs - 1:
                yield room.arrive("query")
            yield from weigh_even(room, key)
            yield from room.meet("left", "weights1", COMPUTE)
            yield room.begin("level1", key)
            yield room.end("level1")
            yield room.begin("weights1", key)
            yield room.begin("left1", key)
        if pairs:
            yield room.end("weights1")
            yield room.end("left1")
            yield room.arrive("free_left1")
        yield room.write("sum0", item)
        yield room.write("gain0", item)
        yield room.arrive("weights0")
        yield from room.meet("left", "weights1", COMPUTE)
        for buffer in ("sum1", "gain1", "peak1"):
            yield room.begin(buffer, item)
            yield room.end(buffer)


def right(room: Room, items: list[int], rope: bool, zeroes: Sequence[bool]) -> Role:
    """right_warpgroup. zeroes: whether an item's last odd block has a tail to be zeroed, of small pages alone."""
    count = 0
    for item, blocks in enumerate(filter(None, items)):
        pairs, lone = divmod(blocks, 2)
        if lone:
            key: tuple[int, object] = (item, "lone")
            yield from room.meet("right", "weights0", COMPUTE)
            if not pairs:
                yield room.arrive("query")
            for buffer in ("level0", "weights0", "right0"):
                yield room.begin(buffer, key)
                yield room.end(buffer)
            yield room.arrive("free_right0")
            if room.fault != "no meeting":
                yield room.arrive("weights1")
        elif pairs and zeroes[item]:  # both halves
            for buffer in ("left1", "right1"):
                yield room.wait(buffer, count + 1)
                yield room.write(buffer, (item, 0))
        if pairs:
            yield from take_query(room, item, rope)
        for pair in range(pairs):
            count += 1
            key = (item, pair)
            yield from scores(room, item, key, count, ("right1", "left1"))
            yield from room.meet("right", "weights0", COMPUTE)
            yield room.begin("level0", key)
            yield room.end("level0")
            for buffer in (*QUERY, "right1", "left1"):
                yield room.end(buffer)
            if pair == pairs - 1:
                yield room.arrive("query")
            yield room.begin("weights0", key)
            yield room.begin("right0", key)
            yield room.write("level1", key)
            yield room.write("weights1", key)
            yield room.arrive("weights1")
            if room.fault == "early release":
                yield room.arrive("free_right0")
            yield room.end("weights0")
            yield room.end("right0")
            if room.fault != "early release":
                yield room.arrive("free_right0")
            yield room.begin("right1", key)
            yield room.end("right1")
            yield room.arrive("free_right1")
        yield room.write("sum1", item)
        yield room.write("gain1", item)
        yield room.write("peak1", item)
        if room.fault == "arrive before meeting":
            yield room.arrive("weights1")
        yield from room.meet("right", "weights0", COMPUTE)
        if room.fault != "arrive before meeting":
            yield room.arrive("weights1")
        for buffer in ("sum0", "gain0"):
            yield room.begin(buffer, item)
            yield room.end(buffer)


def steps(items: list[int]) -> Iterator[tuple[int, int, object, int | None]]:
    """What a loader does at each step: the item, the step, the even block and the pair whose odd block it loads."""
    for item, blocks in enumerate(filter(None, items)):
        pairs, lone = divmod(blocks, 2)
        for step in range(pairs + lone):
            loads_odd = not lone or step > 1 or (step == 0 and pairs > 0)
            odd = step - lone if step else 0
            yield item, step, "lone" if lone and step == 0 else step - lone, odd if loads_odd else None


def load_left(room: Room, items: list[int], rope: bool) -> Role:
    """load_left, whose first step is _begin_left if the first item has blocks."""
    even_used = odd_used = False
    begins = items[:1] != [0]
    for item, step, even, odd in steps(items):
        if step == 0:
            if even_used:
                yield from room.meet("load_left", "query", LOADER)
            yield room.load("query0", item)
            if rope and begins and not even_used:
                yield room.load("weights1", ("q", item))
        if even_used and not (room.fault == "no wait" and step == 2):
            yield from room.meet("load_left", "free_left0", LOADER)
        yield room.load("left0", (item, even))
        if odd_used and (step == 0 or odd is not None):
            yield from room.meet("load_left", "free_left1", LOADER)
            odd_used = False
        if rope and step == 0 and (even_used or not begins):
            yield room.load("weights1", ("q", item))
        if odd is not None:
            if begins and not even_used:
                yield room.wait("query0", 1)
            yield room.load("left1", (item, odd))
            odd_used = True
        even_used = True
    for barrier, used in (("query", even_used), ("free_left0", even_used), ("free_left1", odd_used)):
        if used:
            yield from room.meet("load_left", barrier, LOADER)


def load_right(room: Room, items: list[int]) -> Role:
    """load_right, whose first step is _begin_right if the first item has blocks."""
    even_used = odd_used = False
    begins = items[:1] != [0]
    for item, step, even, odd in steps(items):
        if step == 0:
            if even_used:
                yield from room.meet("load_right", "query", LOADER)
            yield room.load("query1", item)
        if even_used:
            yield from room.meet("load_right", "free_right0", LOADER)
        yield room.load("right0", (item, even))
        if odd is not None:
            if odd_used:
                yield from room.meet("load_right", "free_right1", LOADER)
            elif begins and not even_used:
                yield room.wait("query1", 1)
            yield room.load("right1", (item, odd))
            odd_used = True
        even_used = True
    for barrier, used in (("query", even_used), ("free_right0", even_used), ("free_right1", odd_used)):
        if used:
            yield from room.meet("load_right", barrier, LOADER)


def warps(room: Room, items: list[int], rope: bool, zeroes: Sequence[bool]) -> list[Role]:
    """All of a program."""
    both = [left(room, items, rope), right(room, items, rope, zeroes)]
    return [*both, load_left(room, items, rope), load_right(room, items)]


def decode(rng: random.Random, items: list[int], fault: str = "") -> None:
    """One interleaving of a part's warps."""
    room = Room(SIZES, fault)
    rope = rng.random() < 0.7
    zeroes = [rng.random() < 0.5 for _ in items]
    play(rng, room, warps(room, items, rope, zeroes))


def shapes(rng: random.Random) -> list[int]:
    """Blocks of each item of a part; 0 of a faulty request, or of a unit without this program's rows."""
    return [rng.choice((0, 1, 1, 2, 2, 3, 4, 5, 6, 9)) for _ in range(rng.randint(0, 4))]


def test_no_interleaving_deadlocks_or_races() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        decode(rng, shapes(rng))


@pytest.mark.parametrize("fault", ["early release", "arrive before meeting", "no wait", "no meeting"])
def test_a_seeded_fault_is_caught(fault: str) -> None:
    caught = 0
    for seed in range(300):
        rng = random.Random(seed)
        try:
            decode(rng, [6, 1, 7], fault)
        except Fault:
            caught += 1
    assert caught, f"{fault} went unnoticed"


@pytest.mark.parametrize("items", [[1], [2], [3]], ids=str)
@pytest.mark.parametrize("rope", [True, False])
def test_no_interleaving_at_all_of_an_item(items: list[int], rope: bool) -> None:
    assert play_every(items, rope=rope) > 1000


@pytest.mark.parametrize("fault", ["early release", "arrive before meeting"])
def test_a_seeded_fault_is_in_some_interleaving(fault: str) -> None:
    with pytest.raises(Fault):
        play_every([4], fault)


def play_every(items: list[int], fault: str = "", *, rope: bool = True) -> int:
    """States of all interleavings, with tails that are zeroed."""
    room = Room(SIZES, fault)
    return play_all(room, warps(room, items, rope, [True] * len(items)))
