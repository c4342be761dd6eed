"""What the warps of the sm90 prefill kernel share, role by role: each follows its function in
prefill/kernels/consumers.py or producers.py. tests/protocol/test_prefill_protocol.py holds the two
against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import ITEM_SLOTS
from tests.protocol.barrier_model import (
    LOADER,
    Role,
    arrive,
    begin,
    complete,
    end,
    fence,
    load,
    meet,
    rewrite,
    synchronize,
    wait,
    write,
)

STAGES = ("0", "1")
SIZES = {f"free_{name}{stage}": 288 for name in ("keys", "values") for stage in STAGES} | {
    "free_query0": 192, "free_query1": 160, "turn0": 256, "turn1": 256
}  # fmt: skip
LAST = "last"  # what the slot of an item holds when there is no more


@dataclass(frozen=True)
class Queue:
    """The items that a program takes.

    suspect: whether every item's results send its warpgroups to mend_rows; ahead: whether the next item's first scores
    begin before results are stored; fault: what a test plants, by name.
    """

    blocks: Sequence[int]  # of each item
    tails: Sequence[bool]  # of each item: whether its last block ends behind the keys
    suspect: bool = False
    ahead: bool = False
    slots: int = ITEM_SLOTS.value
    fault: str = ""

    def slot(self, item: int) -> str:
        """Where an item is published."""
        return f"item{item % self.slots}"

    def content(self, item: int) -> object:
        """What is published there."""
        return item if item < len(self.blocks) else LAST

    def roles(self) -> list[Role]:
        """The two warpgroups and the two loaders."""
        return [attend(self, 0), attend(self, 1), load_keys(self), load_values(self)]


def receive(queue: Queue, item: int) -> Role:
    """receive_item."""
    yield begin(queue.slot(item), queue.content(item))
    yield end(queue.slot(item))


def mend(queue: Queue, item: int) -> Role:
    """_store: mend_rows takes the item anew."""
    if queue.suspect:
        yield from receive(queue, item)
        yield synchronize()
        yield begin("addresses", None)
        yield end("addresses")


def attend(queue: Queue, warpgroup: int) -> Role:
    """attend_items. A product reads its buffers from `begin` to `end`."""
    query = f"query{warpgroup}"
    used = 0
    if warpgroup == 1:
        yield arrive("turn0")
    yield wait(query, 1)
    yield from receive(queue, 0)
    for item, (blocks, tail) in enumerate(zip(queue.blocks, queue.tails, strict=True)):
        yield wait(f"keys{used % 2}", used // 2 + 1)
        yield begin(query, item)
        yield begin(f"keys{used % 2}", used)
        if queue.ahead and item:
            yield from mend(queue, item - 1)
        yield from attend_blocks(queue, warpgroup, item, used, blocks, tail)
        if not queue.ahead:
            yield from mend(queue, item)
        used += blocks
        yield wait(query, item + 2)
        yield from receive(queue, item + 1)
    for buffer in (query, f"keys{used % 2}"):  # scores of whatever is there, which nobody uses
        yield begin(buffer, None)
    if queue.ahead and queue.blocks:
        yield from mend(queue, len(queue.blocks) - 1)
    for buffer in (query, f"keys{used % 2}"):
        yield end(buffer)
    if warpgroup == 0 and queue.fault != "turn left":
        yield meet("turn0")


def attend_blocks(queue: Queue, warpgroup: int, item: int, used: int, blocks: int, tail: bool) -> Role:
    """_attend: `used` blocks came before, and the first one's products with Q are in flight."""
    query, stage = f"query{warpgroup}", str(used % 2)
    if queue.fault == "early release":
        yield arrive(f"free_keys{stage}")
    yield end(query)
    yield end(f"keys{stage}")
    if queue.fault != "early release":
        yield arrive(f"free_keys{stage}")
    if tail:
        yield wait(f"values{stage}", used // 2 + 1)
        yield rewrite(f"values{stage}", used)
        yield fence()
        yield synchronize()
    for step in range(blocks - 1):
        before, used = used, used + 1
        yield wait(f"keys{used % 2}", used // 2 + 1)
        yield meet(f"turn{warpgroup}")
        yield begin(query, item)
        yield begin(f"keys{used % 2}", used)
        yield wait(f"values{before % 2}", before // 2 + 1)
        yield begin(f"values{before % 2}", before)
        yield arrive(f"turn{1 - warpgroup}")
        yield end(query)
        yield end(f"keys{used % 2}")
        yield arrive(f"free_keys{used % 2}")
        if step == blocks - 2:
            yield arrive(f"free_{query}")
        yield end(f"values{before % 2}")
        yield arrive(f"free_values{before % 2}")
    if blocks == 1:
        yield arrive(f"free_{query}")
    yield wait(f"values{used % 2}", used // 2 + 1)
    yield begin(f"values{used % 2}", used)
    yield end(f"values{used % 2}")
    yield arrive(f"free_values{used % 2}")


def load_keys(queue: Queue) -> Role:
    """load_queries_and_keys."""
    used = 0
    for item, blocks in enumerate(queue.blocks):
        for block in range(blocks):
            stage = str(used % 2)
            if used > 1:
                yield meet(f"free_keys{stage}", LOADER)
            yield load(f"keys{stage}", used)
            for half in ("0", "1") if block == 0 else ():
                if item:
                    yield meet(f"free_query{half}", LOADER)
                if half == "0":
                    yield from publish(queue, item)
                yield load(f"query{half}", item)
            used += 1
    for barrier in ("free_query0", "free_query1", *(f"free_keys{stage}" for stage in STAGES[:used])) if used else ():
        yield meet(barrier, LOADER)
    yield from publish(queue, len(queue.blocks))
    yield complete("query0")
    yield complete("query1")


def publish(queue: Queue, item: int) -> Role:
    """publish_item."""
    yield write(queue.slot(item), queue.content(item))
    yield synchronize()


def load_values(queue: Queue) -> Role:
    """load_values. Its wait for Q must not sleep through a phase, for the next one would look like the one before."""
    used = 0
    for item, blocks in enumerate(queue.blocks):
        yield wait("query0", item + 1)
        yield from receive(queue, item)
        yield arrive("free_query0", LOADER)
        for _ in range(blocks):
            stage = str(used % 2)
            if used > 1:
                yield meet(f"free_values{stage}", LOADER)
            yield load(f"values{stage}", used)
            used += 1
    yield wait("query0", len(queue.blocks) + 1)
    yield from receive(queue, len(queue.blocks))
    for stage in STAGES[:used]:
        yield meet(f"free_values{stage}", LOADER)
