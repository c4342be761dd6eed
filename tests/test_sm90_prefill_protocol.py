"""A model of the sm90 prefill kernel's barriers: no interleaving of its warps deadlocks, over-arrives at a named
barrier or touches shared memory that another warp is still reading or writing; and the model notices seeded faults.

Each role is a generator that follows its function in sm90_prefill_kernels.py or sm90_prefill_load_kernels.py.
"""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton.experimental.gluon", reason="needs a Triton with Gluon")

from portable_mla.backends.nvidia.sm90_prefill_room_kernels import ITEM_SLOTS
from tests.barrier_model import COMPUTE, LOADER, Fault, Role, Room, play, play_all

STAGES = ("0", "1")
SIZES = {f"free_{name}{stage}": 288 for name in ("keys", "values") for stage in STAGES} | {
    "free_query0": 192, "free_query1": 160, "turn0": 256, "turn1": 256
}  # fmt: skip


def item_slots(room: Room) -> int:
    """Items that are kept: a warpgroup may be an item behind the other."""
    return 1 if room.fault == "one slot" else ITEM_SLOTS.value


def attend(room: Room, items: list[int], warpgroup: int) -> Role:
    """attend_items: `items` holds blocks. A product reads its buffers from `begin` to `end`."""
    me, other = str(warpgroup), str(1 - warpgroup)
    who, query = f"warpgroup{me}", f"query{me}"
    used = 0
    if warpgroup == 1:
        yield room.arrive("turn0")
    for item, blocks in enumerate(items):
        yield room.wait(query, item + 1)
        slot = f"item{item % item_slots(room)}"
        yield room.begin(slot, item)
        yield room.end(slot)
        for block in range(blocks):
            stage, before = str(used % 2), str((used - 1) % 2)
            yield room.wait(f"keys{stage}", used // 2 + 1)
            if block:
                yield from room.meet(who, f"turn{me}", COMPUTE)
            yield room.begin(query, item)
            yield room.begin(f"keys{stage}", used)
            if block:
                yield room.wait(f"values{before}", (used - 1) // 2 + 1)
                yield room.begin(f"values{before}", used - 1)
                yield room.arrive(f"turn{other}")
            if room.fault == "early release":
                yield room.arrive(f"free_keys{stage}")
            yield room.end(query)
            yield room.end(f"keys{stage}")
            if room.fault != "early release":
                yield room.arrive(f"free_keys{stage}")
            if block == blocks - 1:
                yield room.arrive(f"free_query{me}")
            if block:
                yield room.end(f"values{before}")
                yield room.arrive(f"free_values{before}")
            used += 1
        last = str((used - 1) % 2)
        yield room.wait(f"values{last}", (used - 1) // 2 + 1)
        yield room.begin(f"values{last}", used - 1)
        yield room.end(f"values{last}")
        yield room.arrive(f"free_values{last}")
    if warpgroup == 0 and room.fault != "turn left":
        yield from room.meet(who, "turn0", COMPUTE)


def load_keys(room: Room, items: list[int]) -> Role:
    """load_queries_and_keys."""
    used = 0
    for item, blocks in enumerate(items):
        for block in range(blocks):
            stage = str(used % 2)
            if used > 1:
                yield from room.meet("loader", f"free_keys{stage}", LOADER)
            yield room.load(f"keys{stage}", used)
            for half in ("0", "1") if block == 0 else ():
                if item:
                    yield from room.meet("loader", f"free_query{half}", LOADER)
                if half == "0":
                    yield room.write(f"item{item % item_slots(room)}", item)
                yield room.load(f"query{half}", item)
            used += 1
    for barrier in ("free_query0", "free_query1", *(f"free_keys{stage}" for stage in STAGES[:used])) if used else ():
        yield from room.meet("loader", barrier, LOADER)


def load_values(room: Room, items: list[int]) -> Role:
    """load_values. Its wait for Q must not sleep through a phase, for the next one would look like the one before."""
    used = 0
    for item, blocks in enumerate(items):
        yield room.wait("query0", item + 1)
        yield room.awake("query0", item + 1)
        slot = f"item{item % item_slots(room)}"
        yield room.begin(slot, item)
        yield room.end(slot)
        yield room.arrive("free_query0", LOADER)
        for _ in range(blocks):
            stage = str(used % 2)
            if used > 1:
                yield from room.meet("load_values", f"free_values{stage}", LOADER)
            yield room.load(f"values{stage}", used)
            used += 1
    for stage in STAGES[:used]:
        yield from room.meet("load_values", f"free_values{stage}", LOADER)


def warps(room: Room, items: list[int]) -> list[Role]:
    """All of a program."""
    return [attend(room, items, 0), attend(room, items, 1), load_keys(room, items), load_values(room, items)]


def prefill(rng: random.Random, items: list[int], fault: str = "") -> None:
    """One interleaving of a program's warps."""
    room = Room(SIZES, fault)
    play(rng, room, warps(room, items))


def test_no_interleaving_deadlocks_or_races() -> None:
    for seed in range(1500):
        rng = random.Random(seed)
        prefill(rng, [rng.choice((1, 1, 1, 2, 3, 5)) for _ in range(rng.randint(0, 6))])


@pytest.mark.parametrize("fault", ["early release", "turn left", "one slot"])
def test_a_seeded_fault_is_caught(fault: str) -> None:
    caught = 0
    for seed in range(300):
        try:
            prefill(random.Random(seed), [3, 1, 3, 1, 1, 1], fault)
        except Fault:
            caught += 1
    assert caught, f"{fault} went unnoticed"


@pytest.mark.parametrize("items", [[1], [2], [3]], ids=str)
def test_no_interleaving_at_all_of_an_item(items: list[int]) -> None:
    assert play_every(items) > 1000


@pytest.mark.parametrize("fault", ["early release", "turn left"])
def test_a_seeded_fault_is_in_some_interleaving(fault: str) -> None:
    with pytest.raises(Fault):
        play_every([3], fault)


def play_every(items: list[int], fault: str = "") -> int:
    """States of all interleavings."""
    room = Room(SIZES, fault)
    return play_all(room, warps(room, items))
