"""What the warps of the sm90 decode kernel share, role by role: each warpgroup follows its
function in decode/kernels/consumers.py. tests/protocol/test_decode_protocol.py holds the two against each other."""

from __future__ import annotations

from collections.abc import Sequence

from tests.protocol.barrier_model import (
    Role,
    arrive,
    begin,
    begin_scores,
    end,
    fence,
    meet,
    rewrite,
    synchronize,
    wait,
    write,
)
from tests.protocol.decode_loader_model import Part, load_left, load_right


def read(*buffers: str, content: object) -> Role:
    """Loads from shared memory."""
    for buffer in buffers:
        yield begin(buffer, content)
        yield end(buffer)


def ends(*buffers: str) -> Role:
    """Products have been waited for."""
    return (end(buffer) for buffer in buffers)


def zero_tail(buffer: str, content: object, count: int) -> Role:
    """zero_tail."""
    yield wait(buffer, count)
    yield rewrite(buffer, content)
    yield fence()
    yield synchronize()


def drop(*buffers: str, content: object) -> Role:
    """_drop_hidden of halves of blocks: nobody else may read them, for a row that sees what is dropped must find it."""
    for buffer in buffers:
        yield from read(buffer, content=content)
        yield write(buffer, content)


def show() -> Role:
    """The end of drop_hidden."""
    yield fence()
    yield synchronize()


def take_query(part: Part, item: int) -> Role:
    """wait_query."""
    if part.rope:
        yield wait("weights1", item + 1)
        yield from read("weights1", content=("q", item))
    yield wait("query0", item + 1)
    yield wait("query1", item + 1)


def score(item: int, query: str, buffer: str, key: object, count: int) -> Role:
    """score_half."""
    yield wait(buffer, count)
    yield begin(query, item)
    yield begin_scores(buffer, key)


def score_rope(part: Part, buffer: str, key: object, count: int) -> Role:
    """score_rope."""
    if part.rope:
        yield wait(buffer, count)
        yield begin_scores(buffer, key)


def weigh_even(key: object) -> Role:
    """_weigh_even, and the left warpgroup's product with its weights."""
    yield write("level0", key)
    yield write("weights0", key)
    yield fence()
    yield arrive("weights0")
    yield begin("left0", key)
    yield end("left0")
    yield arrive("free_left0")


def score_even(part: Part, item: int, key: object, count: int, odd_in_flight: bool) -> Role:
    """_score_even, and the same within the loop, where the pair before is let go of behind its first products."""
    yield from score(item, "query0", "left0", key, count)
    if odd_in_flight:
        yield from ends("weights1", "left1")
        yield arrive("free_left1")
    yield from score(item, "query1", "right0", key, count)
    yield from score_rope(part, "rope0", key, count)
    yield from ends("query0", "query1", "left0", "right0", *(("rope0",) if part.rope else ()))


def left(part: Part) -> Role:
    """left_warpgroup."""
    count = 0
    for item, pairs, lone, tail, hides, hides_before in part.items():
        if lone:
            count += 1
            key: tuple[int, object] = (item, "lone")
            yield from take_query(part, item)
            yield from score_even(part, item, key, count, odd_in_flight=False)
            if not pairs:
                yield arrive("query")
            if hides:
                yield from drop("left0", content=key)
                yield from show()
            if tail:
                yield from zero_tail("left0", key, count)
            yield from weigh_even(key)
            if part.fault != "no meeting":
                yield meet("weights1")
        if pairs:
            yield from take_query(part, item)
        for pair in range(pairs):
            count += 1
            key = (item, pair)
            yield from score_even(part, item, key, count, odd_in_flight=pair > 0)
            if hides_before and not lone and pair == 0:
                yield from drop("left0", content=key)
                yield from show()
            if pair == pairs - 1:
                yield arrive("query")
            yield from weigh_even(key)
            yield meet("weights1")
            yield from read("level1", content=key)
            yield begin("weights1", key)
            yield begin("left1", key)
        if pairs:
            yield from ends("weights1", "left1")
            yield arrive("free_left1")
        yield write("sum0", item)
        yield write("gain0", item)
        yield arrive("weights0")
        yield meet("weights1")
        yield from read("sum1", "gain1", "peak1", content=item)


def fold_right(part: Part, item: int, pair: int, count: int, last: bool, hides: Sequence[bool]) -> Role:
    """_fold_right. hides: whether some token does not see all keys of its odd block, and of its even one."""
    key = (item, pair)
    yield from score(item, "query1", "right1", key, count)
    yield from score_rope(part, "rope1", key, count)
    yield from score(item, "query0", "left1", key, count)
    yield meet("weights0")
    yield from read("level0", content=key)
    yield from ends("query0", "query1", "right1", "left1", *(("rope1",) if part.rope else ()))
    if last:
        yield arrive("query")
    if hides[0]:
        yield from drop("left1", "right1", *(("right0",) if hides[1] else ()), content=key)
        yield from show()
        yield from read("level0", content=key)
    yield begin("weights0", key)
    yield begin("right0", key)
    yield write("level1", key)
    yield write("weights1", key)
    yield fence()
    yield arrive("weights1")
    if part.fault == "early release":
        yield arrive("free_right0")
    yield from ends("weights0", "right0")
    if part.fault != "early release":
        yield arrive("free_right0")
    yield begin("right1", key)
    yield end("right1")
    yield arrive("free_right1")


def right(part: Part) -> Role:
    """right_warpgroup."""
    odds = evens = 0
    for item, pairs, lone, tail, *hides in part.items():
        if lone:
            evens += 1
            key = (item, "lone")
            if tail:
                yield from zero_tail("right0", key, evens)
            if part.fault != "drop before meeting":
                yield meet("weights0")
            if hides[0]:
                yield from drop("right0", content=key)
                yield from show()
            if part.fault == "drop before meeting":
                yield meet("weights0")
            yield from read("level0", "weights0", "right0", content=key)
            yield arrive("free_right0")
            if part.fault != "no meeting":
                yield arrive("weights1")
            if not pairs:
                yield arrive("query")
        elif tail:
            for buffer in ("left1", "right1"):
                yield from zero_tail(buffer, (item, 0), odds + 1)
        if pairs:
            yield from take_query(part, item)
        for pair in range(pairs):
            odds, evens = odds + 1, evens + 1
            hidden = (False, False) if pair else (hides[1], False) if lone else hides
            yield from fold_right(part, item, pair, odds, pair == pairs - 1, hidden)
        for vector in ("sum1", "gain1", "peak1"):
            yield write(vector, item)
        if part.fault == "arrive before meeting":
            yield arrive("weights1")
        yield meet("weights0")
        if part.fault != "arrive before meeting":
            yield arrive("weights1")
        yield from read("sum0", "gain0", content=item)


def roles_of(part: Part) -> list[Role]:
    """The two warpgroups and the two loaders."""
    return [left(part), right(part), load_left(part), load_right(part)]
