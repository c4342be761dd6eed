"""A model of what a Hopper kernel's warps share: named barriers, mbarriers and buffers, played in random interleavings.

A named barrier opens at its number of arrivals; on hardware an arrival too many lets a later generation through, so the
model forbids it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field

COMPUTE, LOADER = 128, 32
Step = Callable[[], bool]  # does one step and says so, or says that it must wait
Role = Generator[Step, None, None]


class Fault(Exception):
    """What the model caught."""


@dataclass
class Room:
    """Named barriers, mbarriers and the buffers: who is using each, and what it holds."""

    sizes: Mapping[str, int]  # arrivals at which a named barrier opens
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
            if self.arrived[barrier] + waiting > self.sizes[barrier]:
                raise Fault(f"{barrier}: an arrival too many")
            if self.arrived[barrier] + waiting == self.sizes[barrier]:
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
            if self.arrived[barrier] + self.met_waiting(barrier) > self.sizes[barrier]:
                raise Fault(f"{barrier}: an arrival too many")
            if self.arrived[barrier] + self.met_waiting(barrier) == self.sizes[barrier]:
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


def play(rng: random.Random, room: Room, roles: Sequence[Role]) -> None:
    """One interleaving; each role has its own pace, so that one may run far ahead of another."""
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
