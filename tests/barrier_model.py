"""A model of what a Hopper kernel's warps share: named barriers, mbarriers and buffers, played in random interleavings,
or in all of them.

A named barrier opens at its number of arrivals; on hardware an arrival too many lets a later generation through, so the
model forbids it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

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
    joined: dict[tuple[str, str], int] = field(default_factory=dict)  # how often a barrier had opened when one waited
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

        def join() -> bool:
            self.joined[barrier, who] = self.opened[barrier]
            self.met[barrier, who] = threads
            if self.arrived[barrier] + self.met_waiting(barrier) > self.sizes[barrier]:
                raise Fault(f"{barrier}: an arrival too many")
            if self.arrived[barrier] + self.met_waiting(barrier) == self.sizes[barrier]:
                self.arrived[barrier] = 0
                self.opened[barrier] += 1
            return True

        def leave() -> bool:
            if self.opened[barrier] == self.joined[barrier, who]:
                return False
            del self.met[barrier, who], self.joined[barrier, who]
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

    def awake(self, buffer: str, count: int) -> Step:
        """A wait that must not sleep through a phase, for the next one would look like the one before."""

        def step() -> bool:
            if self.landed[buffer] > count:
                raise Fault(f"{buffer}: a phase was slept through")
            return True

        return step

    def land(self, index: int) -> None:
        """A transfer ends."""
        buffer, content = self.transfers.pop(index)
        self.holds[buffer] = content
        self.landed[buffer] += 1

    def copy(self) -> dict[str, Any]:
        """All that changes."""
        return {name: copy(value) for name, value in vars(self).items() if name not in ("sizes", "fault")}

    def finish(self) -> None:
        """Nobody runs any more."""
        if any(self.arrived.values()):
            raise Fault(f"arrivals that nobody met: {dict(self.arrived)}")


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
            room.land(rng.randrange(len(room.transfers)))
        elif not ready:
            raise Fault("deadlock")
    room.finish()


def play_all(room: Room, roles: Sequence[Role]) -> int:
    """Every interleaving of roles whose steps are the same in each; how many states there are."""
    steps = [list(role) for role in roles]
    seen = set()
    pending: list[tuple[tuple[int, ...], dict[str, Any]]] = [((0,) * len(steps), room.copy())]
    while pending:
        at, state = pending.pop()
        moves = 0
        for index in range(len(steps) + len(state["transfers"])):
            vars(room).update({name: copy(value) for name, value in state.items()})
            after = at
            if index >= len(steps):
                room.land(index - len(steps))
            elif at[index] < len(steps[index]) and steps[index][at[index]]():
                after = (*at[:index], at[index] + 1, *at[index + 1 :])
            else:
                continue
            moves += 1
            key = (after, tuple(sorted(map(repr, room.transfers))), tuple(sorted(room.joined.items())))
            if key not in seen:
                seen.add(key)
                pending.append((after, room.copy()))
        if not moves:
            vars(room).update(state)
            if any(position < len(one) for position, one in zip(at, steps, strict=True)):
                raise Fault("deadlock")
            room.finish()
    return len(seen)
