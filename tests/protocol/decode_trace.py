"""What the sm90 decode kernel's own source does for a part of a plan, in the terms of decode_model.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from portable_mla.backends.nvidia.hopper.kernels import ptx as sync
from tests.protocol.barrier_model import Op
from tests.protocol.decode_loader_model import BLOCK, Part
from tests.protocol.kernel_source import ANY, Files, Sources, files_of
from tests.protocol.kernel_trace import Memory, Trace

WARPGROUPS, LOADERS = "decode.kernels.consumers", "decode.kernels.producers"
FILES = files_of((WARPGROUPS, LOADERS, "decode.kernels.scores", "decode.kernels.tma"))
HALF, HEADS = 256, 16
TILES_OF_A_PART = 4
BARRIERS = {
    sync.WEIGHTS_0.value: "weights0", sync.WEIGHTS_1.value: "weights1", sync.FREE_QUERY.value: "query",
    sync.FREE_LEFT_0.value: "free_left0", sync.FREE_LEFT_1.value: "free_left1",
    sync.FREE_RIGHT_0.value: "free_right0", sync.FREE_RIGHT_1.value: "free_right1",
}  # fmt: skip
ROLES = ("left_warpgroup", "right_warpgroup", "load_left", "load_right")


class Query(Memory):
    """Q, whose halves have mbarriers of their own."""

    def index(self, _index: int) -> Query:
        return Query(self.trace, self.name, self.shape[1:])

    def slice(self, first: int, length: int, axis: int = 0) -> Memory:
        return Memory(self.trace, "query1" if first >= HALF else "query0", self.shape).slice(first, length, axis)


def room_of(trace: Trace, boxes: int) -> SimpleNamespace:
    """Shared memory."""

    def tile(name: str, columns: int = BLOCK) -> Memory:
        return Memory(trace, name, (1, BLOCK, columns))

    def block(number: int) -> SimpleNamespace:
        left, right, rope = tile(f"left{number}", HALF), tile(f"right{number}", HALF), tile(f"rope{number}")
        return SimpleNamespace(
            left=left, right=right, rope=rope, left_full=(left,) * boxes, right_full=(right,) * boxes, rope_full=rope
        )

    vectors = ("level0", "level1", "sum0", "sum1", "gain0", "gain1", "peak1")
    return SimpleNamespace(
        query=Query(trace, "query", (1, BLOCK, 2 * HALF)), query_left_full=Memory(trace, "query0"),
        query_right_full=Memory(trace, "query1"), query_rope_full=Memory(trace, "weights1"), even=block(0),
        odd=block(1), weights0=tile("weights0"), weights1=tile("weights1"),
        **{name: Memory(trace, name, (BLOCK,)) for name in vectors},
    )  # fmt: skip


def item_of(blocks: int, tail: int, tokens: int) -> SimpleNamespace:
    """An item of so many blocks, of which the last one ends so many slots behind the keys."""
    kv_end = blocks * BLOCK - tail
    return SimpleNamespace(
        request=0, first_block=0, pairs=blocks // 2, lone=blocks % 2, kv_end=kv_end, kv_len=kv_end, query_start=0,
        query_len=tokens, all_see=kv_end - tokens + 1, slot=0,
    )  # fmt: skip


def _plan(part: Part, page_size: int) -> dict[str, object]:
    """Stand-ins for what the kernel reads of the plan and the page table, and for its stores."""
    items = [item_of(blocks, tail, part.tokens) for blocks, tail in zip(part.blocks, part.tails, strict=True)]
    program = SimpleNamespace(items_ptr=ANY, start=0, stop=len(items), rows=16)
    rows = (ANY,) * (2 if page_size >= BLOCK else BLOCK // page_size)

    def store_narrow(_acc: object, peak: Memory, *args: Any) -> object:
        if args[3] > 0:  # the first column
            peak.store(ANY)
        return ANY

    return {
        "open_part": lambda *_: (program, (items or [item_of(0, 0, 1)])[0], (ANY, ANY), TILES_OF_A_PART),
        "item_at": lambda _part, _item, index, _heads: items[index],
        "rows_of": lambda *_: (ANY, ANY), "open_table": lambda *_: ANY, "table_row": lambda *_: ANY,
        "block_rows": lambda *_: rows, "first_rows": lambda *_: rows, "is_wide": lambda *_: True,
        "store_narrow": store_narrow, "store_wide": lambda *_: None,
        "store_stats": lambda *args: args[4].load(),
        "mask": lambda scores, *_: scores, "_finite": lambda value, _hidden: value, "_prefetch": lambda *_: None,
    }  # fmt: skip


def trace(part: Part, role: int, files: Files = FILES, *, boxes: int = 1, once: bool = True) -> list[Op]:
    """What a role of the kernel does. once: whether keys are loaded as what L2 drops first."""
    found = Trace()
    page_size = 16 if part.small else 64
    sources = Sources(files, found.stand_ins(BARRIERS) | _plan(part, page_size))
    room, cache = room_of(found, boxes), SimpleNamespace(rows=ANY, boxes=ANY, page_rows=ANY)
    rope = 64 if part.rope else 0
    run = sources[WARPGROUPS if role < 2 else LOADERS][ROLES[role]]
    if role < 2:
        run(room, ANY, ANY, ANY, HEADS, rope, part.tokens, page_size)
    else:
        run(room, ANY, cache, ANY, HEADS, rope, page_size, BLOCK, 0 if once else TILES_OF_A_PART, 0)
    return found.finished()
