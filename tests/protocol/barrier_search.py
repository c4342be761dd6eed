"""Every interleaving of the roles of tests/protocol/barrier_model.py: no deadlock, no arrival too many, no access to a
buffer that another role is overwriting, no transfer that nobody waits for.

Accesses between two synchronizing operations are one step that lasts from the first to the second, the most that they
can overlap. A load lands when a role waits for it, the latest that it can; a role that could sleep through a phase is
caught where it waits. A state that was seen is not entered again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.protocol.barrier_model import SYNCHRONIZES, Fault, Op

READ, SCORED, WRITTEN, REWRITTEN = "read", "read and masked", "written", "rewritten"
TOGETHER = {frozenset(pair) for pair in ((READ,), (SCORED,), (REWRITTEN,), (READ, SCORED), (SCORED, REWRITTEN))}
Uses = Mapping[str, str]  # of buffers: how
IN_FLIGHT = "in flight"


@dataclass(frozen=True)
class Segment:
    """A synchronizing operation and the accesses from there to the next one."""

    op: Op | None  # None: a role's start
    carried: Uses  # what a wgmma reads from before the operation until after it
    accesses: tuple[Op, ...]
    used: Uses


def segments(ops: Iterable[Op]) -> list[Segment]:
    """A role cut at its synchronizing operations."""
    cut: list[tuple[Op | None, list[Op]]] = [(None, [])]
    for op in ops:
        if SYNCHRONIZES[op.kind]:
            cut.append((op, []))
        else:
            cut[-1][1].append(op)
    found: list[Segment] = []
    reading: dict[str, str] = {}
    rewritten: set[tuple[str, object]] = set()
    for first, accesses in cut:
        carried, used = dict(reading), dict(reading)
        for op in accesses:
            if op.kind == "rewrite":
                rewritten.add((op.target, op.content))
            if op.kind == "begin":
                after_own = REWRITTEN if (op.target, op.content) in rewritten else READ
                reading[op.target] = SCORED if op.masked else after_own
            if op.kind == "end":
                del reading[op.target]
            how = {"begin": reading.get(op.target), "write": WRITTEN, "rewrite": REWRITTEN}.get(op.kind)
            if how and used.get(op.target) != WRITTEN:
                used[op.target] = how
        found.append(Segment(first, carried, tuple(accesses), used))
    return found


@dataclass(frozen=True)
class State:
    """Where each role is, and whether it has joined the barrier that comes next; arrivals, loads and contents."""

    places: tuple[int, ...]
    joined: tuple[bool, ...]
    arrived: frozenset[tuple[str, int]]
    started: frozenset[tuple[str, int]]
    holds: frozenset[tuple[str, object]]


class Search:
    """The states of some roles."""

    def __init__(self, sizes: Mapping[str, int], roles: Sequence[Iterable[Op]]) -> None:
        self.sizes = sizes
        self.roles = [segments(role) for role in roles]

    def explore(self) -> int:
        """The number of states; raises the first Fault that any interleaving has."""
        start = State((0,) * len(self.roles), (False,) * len(self.roles), frozenset(), frozenset(), frozenset())
        for role in range(len(self.roles)):
            start = self._access(start, role)
        seen, rest = {start}, [start]
        while rest:
            state = rest.pop()
            after = [self._step(state, role) for role in range(len(self.roles))]
            reached = [found for found in after if found is not None]
            if not reached:
                self._check_end(state)
            fresh = [found for found in reached if found not in seen]
            seen.update(fresh)
            rest += fresh
        return len(seen)

    def _check_end(self, state: State) -> None:
        if any(place + 1 < len(role) for place, role in zip(state.places, self.roles, strict=True)):
            raise Fault("deadlock")
        if any(count for _, count in state.arrived):
            raise Fault(f"arrivals that nobody met: {dict(state.arrived)}")
        if flying := [name for name, content in state.holds if isinstance(content, tuple) and content[0] == IN_FLIGHT]:
            raise Fault(f"{flying}: nobody waited for the last load")

    def _step(self, state: State, role: int) -> State | None:
        """The state after a role's next operation, None where it must wait or has ended."""
        place = state.places[role] + 1
        if place == len(self.roles[role]) or state.joined[role]:
            return None
        op = self.roles[role][place].op
        assert op is not None
        if op.kind in ("arrive", "meet"):
            return self._arrive(state, role, op)
        if op.kind == "wait":
            waited = self._wait(state, op)
            return None if waited is None else self._move(waited, role)
        return self._move(self._start(state, role, op), role)

    def _arrive(self, state: State, role: int, op: Op) -> State:
        arrived = dict(state.arrived)
        count = arrived.pop(op.target, 0) + op.number
        if count > self.sizes[op.target]:
            raise Fault(f"{op.target}: an arrival too many")
        joined = list(state.joined)
        joined[role] = op.kind == "meet"
        if count < self.sizes[op.target]:
            counts = frozenset((arrived | {op.target: count}).items())
            state = replace(state, arrived=counts, joined=tuple(joined))
            return state if joined[role] else self._move(state, role)
        state = replace(state, arrived=frozenset(arrived.items()), joined=tuple(joined))
        leaving = [other for other, waits in enumerate(joined) if waits and self._next(state, other) == op.target]
        for other in leaving if joined[role] else [role, *leaving]:
            state = self._move(state, other)
        return state

    def _next(self, state: State, role: int) -> str:
        op = self.roles[role][state.places[role] + 1].op
        assert op is not None
        return op.target

    def _wait(self, state: State, op: Op) -> State | None:
        """The load has landed, if it has started."""
        started = dict(state.started).get(op.target, 0)
        if started > op.number:
            raise Fault(f"{op.target}: a phase may be slept through")
        if started < op.number:
            return None
        holds = dict(state.holds)
        content = holds.get(op.target)
        if isinstance(content, tuple) and content[0] == IN_FLIGHT:
            holds[op.target] = content[1]
        return replace(state, holds=frozenset(holds.items()))

    def _start(self, state: State, role: int, op: Op) -> State:
        started, holds = dict(state.started), dict(state.holds)
        started[op.target] = started.get(op.target, 0) + 1
        if op.kind == "load":
            if any(op.target in self._used(state, other) for other in range(len(self.roles)) if other != role):
                raise Fault(f"{op.target}: loaded while it is used")
            content = holds.get(op.target)
            if isinstance(content, tuple) and content[0] == IN_FLIGHT:
                raise Fault(f"{op.target}: loaded twice")
            holds[op.target] = (IN_FLIGHT, op.content)
        return replace(state, started=frozenset(started.items()), holds=frozenset(holds.items()))

    def _used(self, state: State, role: int) -> Uses:
        """A role that waits at a barrier has ended what it does not carry across."""
        place = state.places[role]
        return self.roles[role][place + 1].carried if state.joined[role] else self.roles[role][place].used

    def _move(self, state: State, role: int) -> State:
        places, joined = list(state.places), list(state.joined)
        places[role] += 1
        joined[role] = False
        return self._access(replace(state, places=tuple(places), joined=tuple(joined)), role)

    def _access(self, state: State, role: int) -> State:
        segment = self.roles[role][state.places[role]]
        if not segment.accesses:
            return state
        for other in range(len(self.roles)):
            for name, how in self._used(state, other).items() if other != role else ():
                mine = segment.used.get(name)
                if mine and frozenset((mine, how)) not in TOGETHER:
                    raise Fault(f"{name}: {mine} while it is {how}")
        holds = dict(state.holds)
        for op in segment.accesses:
            if op.kind in ("begin", "rewrite") and op.content is not None and holds.get(op.target) != op.content:
                raise Fault(f"{op.target}: found {holds.get(op.target)} for {op.content}")
            if op.kind == "write":
                holds[op.target] = op.content
        return replace(state, holds=frozenset(holds.items()))
