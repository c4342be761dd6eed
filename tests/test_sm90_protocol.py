"""A model of the sm90 decode kernel's barriers: no interleaving of its warps deadlocks, over-arrives at a named barrier
or touches shared memory that another warp is still reading or writing; and the model notices seeded faults.

Each role is a generator that follows its function in sm90_kernels.py or sm90_load_kernels.py. A named barrier opens at
its number of arrivals; on hardware an arrival too many lets a later generation through, so the model forbids it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import pytest

COMPUTE, LOADER = 128, 32
SIZES = {"weights0": 256, "weights1": 256, "query": 320} | dict.fromkeys(
    ("free_left0", "free_left1", "free_right0", "free_right1"), 160
)
QUERY = ("query0", "query1")
Step = Callable[[], bool]  # does one step and says so, or says that it must wait
Role = Generator[Step, None, None]


class Fault(Exception):
    """What the model caught."""


@dataclass
class Room:
    """Named barriers, mbarriers and the buffers: who is using each, and what it holds."""

    fault: str = ""
    arrived: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    landed: Counter[str] = field(default_factory=Counter)
    holds: dict[str, object] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)
    transfers: list[tuple[str, object]] = field(default_factory=list)

    def arrive(self, barrier: str, threads: int = COMPUTE) -> Step:
        """Never waits. Threads that sync count as arrived only when all the others have."""

        def step() -> bool:
            self.arrived[barrier] += threads
            waiting = self.met_waiting(barrier)
            if self.arrived[barrier] + waiting > SIZES[barrier]:
                raise Fault(f"{barrier}: an arrival too many")
            if self.arrived[barrier] + waiting == SIZES[barrier]:
                self.arrived[barrier] = 0
                self.opened[barrier] += 1
            return True

        return step

    def met_waiting(self, barrier: str) -> int:
        """Threads that wait in a sync of this generation."""
        return sum(threads for (name, _), threads in self.met.items() if name == barrier)

    def meet(self, who: str, barrier: str, threads: int) -> Generator[Step, None, None]:
        """Arrive and wait."""
        generation = 0

        def join() -> bool:
            nonlocal generation
            generation = self.opened[barrier]
            self.met[barrier, who] = threads
            if self.arrived[barrier] + self.met_waiting(barrier) > SIZES[barrier]:
                raise Fault(f"{barrier}: an arrival too many")
            if self.arrived[barrier] + self.met_waiting(barrier) == SIZES[barrier]:
                self.arrived[barrier] = 0
                self.opened[barrier] += 1
            return True

        def leave() -> bool:
            if self.opened[barrier] == generation:
                return False
            del self.met[barrier, who]
            return True

        yield join
        yield leave

    def load(self, buffer: str, content: object) -> Step:
        """The TMA starts: nobody may be reading."""

        def step() -> bool:
            if self.readers[buffer]:
                raise Fault(f"{buffer}: loaded while it is read")
            self.holds[buffer] = None
            self.transfers.append((buffer, content))
            return True

        return step

    def wait(self, buffer: str, count: int) -> Step:
        """An mbarrier wait for the `count`th load."""
        return lambda: self.landed[buffer] >= count

    def write(self, buffer: str, content: object) -> Step:
        """A store by a warpgroup."""

        def step() -> bool:
            if self.readers[buffer]:
                raise Fault(f"{buffer}: written while it is read")
            self.holds[buffer] = content
            return True

        return step

    def begin(self, buffer: str, content: object) -> Step:
        """A wgmma or a load from shared memory starts."""

        def step() -> bool:
            if self.holds.get(buffer) != content:
                raise Fault(f"{buffer}: read {self.holds.get(buffer)} for {content}")
            self.readers[buffer] += 1
            return True

        return step

    def end(self, buffer: str) -> Step:
        """It has been waited for."""

        def step() -> bool:
            self.readers[buffer] -= 1
            return True

        return step


def scores(room: Room, item: int, key: object, count: int, keys: tuple[str, str]) -> Role:
    """The products with both halves of Q begin, each when its half of the block has landed."""
    for half in QUERY:
        yield room.begin(half, item)
    for buffer in keys:
        yield room.wait(buffer, count)
        yield room.begin(buffer, key)


def left(room: Room, items: list[int]) -> Role:
    """left_warpgroup: `items` holds pairs."""
    count = 0
    for item, pairs in enumerate(items):
        for pair in range(pairs):
            count += 1
            key = (item, pair)
            if pair == 0:
                yield room.wait("weights1", item + 1)
                yield room.begin("weights1", ("q", item))
                yield room.end("weights1")
                for half in QUERY:
                    yield room.wait(half, item + 1)
            yield from scores(room, item, key, count, ("left0", "right0"))
            if pair:  # the product of the pair before is waited for behind the first scores
                yield room.end("weights1")
                yield room.end("left1")
                yield room.arrive("free_left1")
            for buffer in (*QUERY, "left0", "right0"):
                yield room.end(buffer)
            if pair == pairs - 1:
                yield room.arrive("query")
            yield room.write("max0", key)
            yield room.write("weights0", key)
            yield room.arrive("weights0")
            yield room.begin("left0", key)
            yield room.end("left0")
            yield room.arrive("free_left0")
            yield from room.meet("left", "weights1", COMPUTE)
            yield room.begin("max1", key)
            yield room.end("max1")
            yield room.begin("weights1", key)
            yield room.begin("left1", key)
        yield room.write("sum0", item)
        yield room.end("weights1")
        yield room.end("left1")
        yield room.arrive("free_left1")
        yield room.write("peak0", item)
        yield room.arrive("weights0")
        yield from room.meet("left", "weights1", COMPUTE)
        for buffer in ("sum1", "peak1"):
            yield room.begin(buffer, item)
            yield room.end(buffer)


def right(room: Room, items: list[int]) -> Role:
    """right_warpgroup."""
    count = 0
    for item, pairs in enumerate(items):
        for pair in range(pairs):
            count += 1
            key = (item, pair)
            if pair == 0:
                yield room.wait("weights1", item + 1)
                yield room.begin("weights1", ("q", item))
                yield room.end("weights1")
                for half in QUERY:
                    yield room.wait(half, item + 1)
            yield from scores(room, item, key, count, ("right1", "left1"))
            yield from room.meet("right", "weights0", COMPUTE)
            yield room.begin("max0", key)
            yield room.end("max0")
            for buffer in (*QUERY, "right1", "left1"):
                yield room.end(buffer)
            if pair == pairs - 1:
                yield room.arrive("query")
            yield room.begin("weights0", key)
            yield room.begin("right0", key)
            yield room.write("max1", key)
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
        yield room.write("peak1", item)
        if room.fault == "arrive before meeting":
            yield room.arrive("weights1")
        yield from room.meet("right", "weights0", COMPUTE)
        if room.fault != "arrive before meeting":
            yield room.arrive("weights1")
        for buffer in ("sum0", "peak0"):
            yield room.begin(buffer, item)
            yield room.end(buffer)


def load_left(room: Room, items: list[int]) -> Role:
    """load_left."""
    used = False
    for item, pairs in enumerate(items):
        for pair in range(pairs):
            if pair == 0:
                if used:
                    yield from room.meet("load_left", "query", LOADER)
                yield room.load("query0", item)
                for barrier in ("free_left0", "free_left1") if used else ():
                    yield from room.meet("load_left", barrier, LOADER)
                yield room.load("weights1", ("q", item))
            elif not (room.fault == "no wait" and pair == 2):
                yield from room.meet("load_left", "free_left0", LOADER)
            yield room.load("left0", (item, pair))
            if pair > 0:
                yield from room.meet("load_left", "free_left1", LOADER)
            elif not used:
                yield room.wait("query0", 1)
            yield room.load("left1", (item, pair))
            used = True
    for barrier in ("query", "free_left0", "free_left1") if used else ():
        yield from room.meet("load_left", barrier, LOADER)


def load_right(room: Room, items: list[int]) -> Role:
    """load_right."""
    used = False
    for item, pairs in enumerate(items):
        for pair in range(pairs):
            if pair == 0:
                if used:
                    yield from room.meet("load_right", "query", LOADER)
                yield room.load("query1", item)
            for block in ("0", "1"):
                if used:
                    yield from room.meet("load_right", f"free_right{block}", LOADER)
                elif block == "1":
                    yield room.wait("query1", 1)
                yield room.load(f"right{block}", (item, pair))
            used = True
    for barrier in ("query", "free_right0", "free_right1") if used else ():
        yield from room.meet("load_right", barrier, LOADER)


def play(rng: random.Random, items: list[int], fault: str = "") -> None:
    """One interleaving; each role has its own pace, so that one may run far ahead of another."""
    room = Room(fault)
    roles = [role(room, items) for role in (left, right, load_left, load_right)]
    steps: list[Step | None] = [next(role, None) for role in roles]
    pace = [rng.choice((1, 4, 30)) for _ in roles]
    while any(steps) or room.transfers:
        ready = [index for index, step in enumerate(steps) if step]
        while ready:
            index = rng.choices(ready, [pace[index] for index in ready])[0]
            step = steps[index]
            if step is not None and step():
                steps[index] = next(roles[index], None)
                break
            ready.remove(index)
        if room.transfers and (not ready or rng.random() < 0.3):
            buffer, content = room.transfers.pop(rng.randrange(len(room.transfers)))
            room.holds[buffer] = content
            room.landed[buffer] += 1
        elif not ready:
            raise Fault("deadlock")
    if any(room.arrived.values()):
        raise Fault(f"arrivals that nobody met: {dict(room.arrived)}")


def shapes(rng: random.Random) -> list[int]:
    """Pairs of each item of a part."""
    return [rng.choice((1, 1, 2, 3, 5)) for _ in range(rng.randint(0, 4))]


def test_no_interleaving_deadlocks_or_races() -> None:
    for seed in range(1500):
        rng = random.Random(seed)
        play(rng, shapes(rng))


@pytest.mark.parametrize("fault", ["early release", "arrive before meeting", "no wait"])
def test_a_seeded_fault_is_caught(fault: str) -> None:
    caught = 0
    for seed in range(300):
        rng = random.Random(seed)
        try:
            play(rng, [3, 1, 3], fault)
        except Fault:
            caught += 1
    assert caught, f"{fault} went unnoticed"
