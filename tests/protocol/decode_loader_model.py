"""A part of the sm90 decode kernel's plan, and what the two warps that load it share with the rest: each follows its
function in decode/kernels/producers.py. tests/protocol/decode_model.py has the warpgroups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tests.protocol.barrier_model import LOADER, Op, Role, load, meet, wait

SIZES = {"weights0": 256, "weights1": 256, "query": 320} | dict.fromkeys(
    ("free_left0", "free_left1", "free_right0", "free_right1"), 160
)
BLOCK = 64


class Item(NamedTuple):
    """Pairs, a lone block, whether it has a tail, and whether some token does not see all of the last block's keys, and
    of those of the one before."""

    number: int
    pairs: int
    lone: int
    tail: bool
    hides: bool
    hides_before: bool


@dataclass(frozen=True)
class Part:
    """A program's items. fault: what a test plants, by name."""

    blocks: Sequence[int]  # of each item; 0 of a faulty request, or of a unit without this program's rows
    tails: Sequence[int]  # of each item: slots of its last block behind the keys
    rope: bool = True  # whether Q and keys have rope columns
    tokens: int = 1  # query tokens; the first one does not see as many keys less one
    small: bool = True  # whether pages are smaller than a block, so that a tail is loaded with it
    fault: str = ""

    def items(self) -> Iterator[Item]:
        """Of each item that has blocks."""
        work = [(blocks, tail) for blocks, tail in zip(self.blocks, self.tails, strict=True) if blocks]
        for number, (blocks, tail) in enumerate(work):
            hidden = [self.tokens > 1 and tail + self.tokens - 1 > BLOCK * behind for behind in range(2)]
            yield Item(number, *divmod(blocks, 2), self.small and tail > 0, *hidden)


def steps(part: Part) -> Iterator[tuple[int, int, object, int | None]]:
    """What a loader does at each step: the item, the step, the even block and the pair whose odd block it loads."""
    for item, pairs, lone, *_ in part.items():
        for step in range(pairs + lone):
            loads_odd = not lone or step > 1 or (step == 0 and pairs > 0)
            odd = step - lone if step else 0
            yield item, step, "lone" if lone and step == 0 else step - lone, odd if loads_odd else None


def load_left(part: Part) -> Role:
    """load_left, whose first step is _begin_left if the first item has blocks."""
    even_used = odd_used = False
    begins = part.blocks[:1] != [0]
    for item, step, even, odd in steps(part):
        if step == 0:
            if even_used:
                yield meet("query", LOADER)
            yield load("query0", item)
            if part.rope and begins and not even_used:
                yield load("weights1", ("q", item))
        if even_used and not (part.fault == "no wait" and step == 2):
            yield meet("free_left0", LOADER)
        yield load("left0", (item, even))
        if odd_used and (step == 0 or odd is not None):
            yield meet("free_left1", LOADER)
            odd_used = False
        if part.rope and step == 0 and (even_used or not begins):
            yield load("weights1", ("q", item))
        if odd is not None:
            if begins and not even_used:
                yield wait("query0", 1)
            yield load("left1", (item, odd))
            odd_used = True
        even_used = True
    yield from last_meetings(even_used, odd_used, "left")


def load_right(part: Part) -> Role:
    """load_right, whose first step is _begin_right if the first item has blocks."""
    even_used = odd_used = False
    begins = part.blocks[:1] != [0]
    for item, step, even, odd in steps(part):
        if step == 0:
            if even_used:
                yield meet("query", LOADER)
            yield load("query1", item)
        if even_used:
            yield meet("free_right0", LOADER)
        yield from load_right_half(part, "0", (item, even))
        if odd is not None:
            if odd_used:
                yield meet("free_right1", LOADER)
            elif begins and not even_used:
                yield wait("query1", 1)
            yield from load_right_half(part, "1", (item, odd))
            odd_used = True
        even_used = True
    yield from last_meetings(even_used, odd_used, "right")


def load_right_half(part: Part, block: str, content: object) -> Iterator[Op]:
    """_load_right_half."""
    yield load(f"right{block}", content)
    if part.rope:
        yield load(f"rope{block}", content)


def last_meetings(even_used: bool, odd_used: bool, side: str) -> Role:
    """What a loader still meets when it has loaded all."""
    for barrier, used in (("query", even_used), (f"free_{side}0", even_used), (f"free_{side}1", odd_used)):
        if used:
            yield meet(barrier, LOADER)
