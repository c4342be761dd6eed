"""What the sm90 prefill kernel's own source does for a queue of items, in the terms of prefill_model.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

from portable_mla.backends.nvidia.hopper.prefill.kernels import consumers as turns
from portable_mla.backends.nvidia.hopper.prefill.kernels import producers as frees
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import ITEM_SLOTS
from tests.protocol.barrier_model import Op
from tests.protocol.kernel_source import ANY, Anything, Files, Language, Sources, files_of
from tests.protocol.kernel_trace import Memory, Trace
from tests.protocol.prefill_model import Queue

WARPGROUPS, LOADERS = "prefill.kernels.consumers", "prefill.kernels.producers"
SHARED = ("prefill.kernels.scores", "prefill.kernels.shared_memory", "prefill.kernels.repair_rows")
FILES = files_of((WARPGROUPS, LOADERS, *SHARED))
BARRIERS = {
    frees.FREE_KEYS_0.value: "free_keys0", frees.FREE_KEYS_1.value: "free_keys1",
    frees.FREE_VALUES_0.value: "free_values0", frees.FREE_VALUES_1.value: "free_values1",
    frees.FREE_QUERY_0.value: "free_query0", frees.FREE_QUERY_1.value: "free_query1",
    turns.TURN_0.value: "turn0", turns.TURN_1.value: "turn1",
}  # fmt: skip
HALF, BLOCK_N, NOPE, ROPE, V_DIM = 64, 128, 192, 64, 128
SOURCE = SimpleNamespace(
    q=ANY, q_rope=ANY, k_nope=ANY, k_pe=ANY, v=ANY, stride_q_head=0, stride_k_head=0, stride_v_head=0
)


class Indexed:
    """Buffers or mbarriers of one kind, by stage, warpgroup or item."""

    dtype = ANY

    def __init__(self, trace: Trace, name: str, *shape: int, count: int = 2) -> None:
        self._made = [Memory(trace, f"{name}{index}", shape) for index in range(count)]

    def index(self, index: int) -> Memory:
        return self._made[index]


def room_of(trace: Trace) -> SimpleNamespace:
    """Shared memory."""
    parts = (128, NOPE - 128, ROPE)
    values, items = Indexed(trace, "values", BLOCK_N, V_DIM), Indexed(trace, "item", 8, count=ITEM_SLOTS.value)
    query = tuple(Indexed(trace, "query", HALF, columns) for columns in parts)
    keys = tuple(Indexed(trace, "keys", BLOCK_N, columns) for columns in parts)
    return SimpleNamespace(
        query=query,
        keys=keys,
        values=values,
        query_full=query[0],
        keys_full=keys[0],
        values_full=values,
        items=items,
        addresses=Memory(trace, "addresses", (16,)),
    )


class Head(int):
    """A head's number, which strides are multiplied with."""

    def to(self, _dtype: object) -> Anything:
        return ANY


def _item(*values: object) -> SimpleNamespace:
    """PrefillItem."""
    names = ("head", "first_row", "rows", "blocks", "key_len", "sees", "first_key")
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def queue_of(queue: Queue) -> list[SimpleNamespace]:
    """The items, a slot without rows ahead of each, which owns no tile."""
    made = []
    for blocks, tail in zip(queue.blocks, queue.tails, strict=True):
        key_len = blocks * BLOCK_N - (20 if tail else 0)
        made += [_item(Head(0), 0, 0, 1, 0, 0, ANY), _item(Head(0), 0, 128, blocks, key_len, key_len, ANY)]
    return made


class QueueLanguage(Language):
    """gl of the only program of a grid, which takes all items."""

    def __init__(self) -> None:
        self._taken = itertools.count()

    def program_id(self, _axis: int) -> int:
        return 0

    def num_programs(self, _axis: int) -> int:
        return 1

    def atomic_add(self, _pointer: object, _value: int) -> int:
        return next(self._taken)


def _stand_ins(trace: Trace, items: Sequence[SimpleNamespace], suspect: bool) -> dict[str, object]:
    """For named barriers, the queue and what is read of the items in shared memory."""
    last = _item(Head(-1), 0, 0, 0, 0, 0, ANY)
    published = [item for item in items if item.rows] + [last]

    def receive_item(room: SimpleNamespace, count: int) -> SimpleNamespace:
        room.items.index(count % ITEM_SLOTS.value).load()
        return published[count]

    return trace.stand_ins(BARRIERS) | {
        "gl": QueueLanguage(), "receive_item": receive_item, "PrefillItem": _item, "store": lambda *_: suspect,
        "_find_item": lambda _work, index, *_: items[index] if index < len(items) else last,
    }  # fmt: skip


def trace(
    queue: Queue, role: int, files: Files = FILES, *, late: bool = False, causal: bool = False, suspect: bool = False
) -> list[Op]:
    """What a role of the kernel does, with the constants that it is compiled for."""
    found = Trace()
    items = queue_of(queue)
    sources = Sources(files, _stand_ins(found, items, suspect))
    room, work = room_of(found), SimpleNamespace(slots=len(items), heads=1, counter_ptr=ANY)
    if role < 2:
        attend = sources[WARPGROUPS]["attend_items"]
        attend(room, ANY, ANY, role, causal, BLOCK_N, NOPE, ROPE, V_DIM, late, queue.ahead)
    elif role == 2:
        sources[LOADERS]["load_queries_and_keys"](room, work, SOURCE, causal, BLOCK_N, NOPE, ROPE)
    else:
        sources[LOADERS]["load_values"](room, SOURCE, BLOCK_N, V_DIM)
    return found.finished()
