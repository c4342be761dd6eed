"""What a Hopper kernel's warps share, as data: each warp's role is a list of operations on named barriers, mbarriers
and buffers; `play` runs the roles in one random interleaving, tests/protocol/barrier_search.py in all of them.

A named barrier opens at its number of arrivals; on hardware an arrival too many lets a later generation through, so the
model forbids it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

COMPUTE, LOADER = 128, 32


class Fault(Exception):
    """What the model caught."""


@dataclass(frozen=True)
class Op:
    """One step of a warp or warpgroup. kind: a key of `SYNCHRONIZES`; target: a named barrier or a buffer."""

    kind: str
    target: str = ""
    content: object = None
    number: int = 0  # of a barrier: threads that arrive; of a wait: the load that it waits for
    masked: bool = False  # what it reads behind the keys does not count


Role = Iterator[Op]
# Whether other warps can tell the operation from the accesses around it.
SYNCHRONIZES = {
    "arrive": True, "meet": True, "wait": True, "load": True, "complete": True,
    "begin": False, "end": False, "write": False, "rewrite": False, "fence": False, "synchronize": False,
}  # fmt: skip


def arrive(barrier: str, threads: int = COMPUTE) -> Op:
    """Arrive at a named barrier; never waits."""
    return Op("arrive", barrier, None, threads)


def meet(barrier: str, threads: int = COMPUTE) -> Op:
    """Arrive at a named barrier and wait for the others."""
    return Op("meet", barrier, None, threads)


def wait(buffer: str, count: int) -> Op:
    """An mbarrier wait for the `count`th load of a buffer."""
    return Op("wait", buffer, None, count)


def load(buffer: str, content: object) -> Op:
    """The TMA starts: nobody may be using the buffer."""
    return Op("load", buffer, content)


def complete(buffer: str) -> Op:
    """An mbarrier's phase that ends without a load."""
    return Op("complete", buffer)


def begin(buffer: str, content: object) -> Op:
    """A wgmma or a load from shared memory starts. content None: whatever the buffer holds."""
    return Op("begin", buffer, content)


def begin_scores(buffer: str, content: object) -> Op:
    """Products with keys start, whose scores behind the last key are masked."""
    return Op("begin", buffer, content, masked=True)


def end(buffer: str) -> Op:
    """It has been waited for."""
    return Op("end", buffer)


def write(buffer: str, content: object) -> Op:
    """A store by a warpgroup."""
    return Op("write", buffer, content)


def rewrite(buffer: str, content: object) -> Op:
    """A store of zeros behind the keys, and of what is there ahead of it. Of those that read meanwhile, each must have
    stored the same before, or mask."""
    return Op("rewrite", buffer, content)


def fence() -> Op:
    """A thread's stores become visible to wgmma and the TMA."""
    return Op("fence")


def synchronize() -> Op:
    """A role's own threads wait for one another."""
    return Op("synchronize")


@dataclass
class Shared:
    """Named barriers, mbarriers and the buffers: who is using each, and what it holds."""

    sizes: Mapping[str, int]  # arrivals at which a named barrier opens
    arrived: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    met: dict[int, tuple[str, int]] = field(default_factory=dict)  # role: barrier, generation
    landed: Counter[str] = field(default_factory=Counter)
    holds: dict[str, object] = field(default_factory=dict)
    readers: dict[str, list[tuple[int, bool]]] = field(default_factory=dict)  # roles, whether they mask
    rewrote: set[tuple[str, object, int]] = field(default_factory=set)
    transfers: list[Op] = field(default_factory=list)

    def step(self, role: int, op: Op) -> bool:
        """Does one operation and says so, or says that it must wait."""
        if op.kind == "wait":
            if self.landed[op.target] > op.number:
                raise Fault(f"{op.target}: a phase was slept through")
            return self.landed[op.target] == op.number
        if op.kind == "meet":
            return self._meet(role, op)
        if op.kind == "arrive":
            self._count(op)
        elif op.kind in ("load", "complete"):
            self._start(op)
        elif op.kind not in ("fence", "synchronize"):
            self._access(role, op)
        return True

    def land(self, transfer: Op) -> None:
        """A transfer has ended."""
        self.transfers.remove(transfer)
        if transfer.kind == "load":
            self.holds[transfer.target] = transfer.content
        self.landed[transfer.target] += 1

    def _meet(self, role: int, op: Op) -> bool:
        if role not in self.met:
            self.met[role] = (op.target, self.opened[op.target])
            self._count(op)
            return False
        barrier, generation = self.met[role]
        if self.opened[barrier] == generation:
            return False
        del self.met[role]
        return True

    def _count(self, op: Op) -> None:
        self.arrived[op.target] += op.number
        if self.arrived[op.target] > self.sizes[op.target]:
            raise Fault(f"{op.target}: an arrival too many")
        if self.arrived[op.target] == self.sizes[op.target]:
            self.arrived[op.target] = 0
            self.opened[op.target] += 1

    def _start(self, op: Op) -> None:
        if op.kind == "load":
            if self.readers.get(op.target):
                raise Fault(f"{op.target}: loaded while it is read")
            self.holds[op.target] = None
        self.transfers.append(op)

    def _access(self, role: int, op: Op) -> None:
        readers = self.readers.setdefault(op.target, [])
        if op.kind == "end":
            readers.remove(next(reader for reader in readers if reader[0] == role))
            return
        if op.kind == "write":
            if readers:
                raise Fault(f"{op.target}: written while it is read")
            self.holds[op.target] = op.content
            return
        if op.content is not None and self.holds.get(op.target) != op.content:
            raise Fault(f"{op.target}: found {self.holds.get(op.target)} for {op.content}")
        if op.kind == "begin":
            readers.append((role, op.masked))
            return
        if any(not masked and (op.target, op.content, reader) not in self.rewrote for reader, masked in readers):
            raise Fault(f"{op.target}: rewritten while one reads it that has not rewritten it")
        self.rewrote.add((op.target, op.content, role))


def play(rng: random.Random, sizes: Mapping[str, int], roles: Sequence[Role]) -> None:
    """One interleaving; each role has its own pace, so that one may run far ahead of another."""
    shared = Shared(sizes)
    ops = [next(role, None) for role in roles]
    pace = [rng.choice((1, 4, 30)) for _ in roles]
    while any(ops) or shared.transfers:
        moved = _advance(rng, shared, roles, ops, pace)
        if shared.transfers and (not moved or rng.random() < 0.3):
            shared.land(rng.choice(shared.transfers))
        elif not moved:
            raise Fault("deadlock")
    if any(shared.arrived.values()):
        raise Fault(f"arrivals that nobody met: {dict(shared.arrived)}")


def _advance(
    rng: random.Random, shared: Shared, roles: Sequence[Role], ops: list[Op | None], pace: Sequence[int]
) -> bool:
    """One step of some role that can do one; false where none can."""
    ready = [index for index, op in enumerate(ops) if op]
    while ready:
        index = rng.choices(ready, [pace[index] for index in ready])[0]
        op = ops[index]
        joins = op is not None and op.kind == "meet" and index not in shared.met
        if op is not None and shared.step(index, op):
            ops[index] = next(roles[index], None)
            return True
        if joins:
            return True
        ready.remove(index)
    return False
