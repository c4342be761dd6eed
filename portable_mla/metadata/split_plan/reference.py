"""The split plan by its definition, in plain Python: what plan_splits_kernel must write, bit for bit."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from portable_mla.metadata.split_plan.plan import MIN_PIECE_TILES, PlanShape


@dataclass(frozen=True)
class Unit:
    """A block of query tokens of one request. kv_len: what its last token sees."""

    request: int
    kv_len: int
    query_start: int
    query_len: int
    tiles: int
    faulty: bool


@dataclass(frozen=True)
class Piece:
    """A run of tiles of one unit, in one part."""

    part: int
    tile_lo: int
    tile_hi: int


@dataclass(frozen=True)
class Plan:
    """A plan in lists. tokens: slot_lo, slot_hi, index in the unit, position; share: tiles of a part; programs: that
    share a part."""

    part_indptr: list[int]
    items: list[tuple[int, ...]]
    tokens: list[tuple[int, int, int, int]]
    summary: tuple[int, int, int, int]
    share: int
    programs: int


def plan_splits_reference(
    kv_lens: Sequence[int],
    query_lens: Sequence[int],
    shape: PlanShape,
    *,
    max_query_len: int,
    faulty_pages: Sequence[bool] | None = None,
) -> Plan:
    """The plan of one step. faulty_pages: whether the request's page table names a page that is not there."""
    bad = faulty_pages or [False] * len(kv_lens)
    units = [
        unit
        for request, start in enumerate(_starts(query_lens))
        for unit in _units(request, kv_lens[request], start, query_lens[request], shape, max_query_len, bad[request])
    ]
    pieces, share, used = _fixed(units, shape) if shape.fixed else _balanced(units, shape)
    programs = shape.row_tiles * (2 if shape.halves and used * 2 <= shape.parts else 1)
    tokens = [(0, 0, 0, 0)] * shape.max_tokens
    items: list[tuple[tuple[int, ...], int]] = []
    slot = 0
    for unit, own in zip(units, pieces, strict=True):
        split = len(own) > 1
        low, high = (slot, slot + len(own)) if split else (0, -1 if own else 0)
        high = -2 if unit.faulty else high
        for index, piece in enumerate(own):
            stop = piece.tile_lo if unit.faulty else piece.tile_hi
            rest = (slot + index if split else -1, unit.kv_len, unit.query_start, unit.query_len, 0)
            items.append(((unit.request, piece.tile_lo, stop, *rest), piece.part))
        slot += len(own) if split else 0
        for index in range(unit.query_len):
            if unit.query_start + index < shape.max_tokens:
                position = max(unit.kv_len - unit.query_len + index, 0)
                tokens[unit.query_start + index] = (low, high, index, position)
    part_indptr = [bisect.bisect_left(items, part, key=lambda item: item[1]) for part in range(shape.parts + 1)]
    summary = (max([0, *query_lens]), sum(max(n, 0) for n in query_lens), len(items), slot)
    return Plan(part_indptr, [item for item, _ in items], tokens, summary, share, programs)


def _starts(query_lens: Sequence[int]) -> list[int]:
    return list(itertools.accumulate((max(n, 0) for n in query_lens[:-1]), initial=0))[: len(query_lens)]


def _units(
    request: int, kv_len: int, start: int, query_len: int, shape: PlanShape, max_query_len: int, faulty: bool
) -> Iterator[Unit]:
    right = 0 <= kv_len <= shape.max_context and 0 <= query_len <= max_query_len
    for block in range(shape.query_blocks):
        before = block * shape.block_q
        last = block == shape.query_blocks - 1
        tokens = max(query_len - before, 0) if last else min(max(query_len - before, 0), shape.block_q)
        seen = kv_len - max(query_len - before - tokens, 0)
        tiles = -(-max(seen, 0) // shape.block_n) if right and tokens else 0
        yield Unit(request, seen, start + before, tokens, tiles, (faulty and tiles > 0) or not right)


def _balanced(units: list[Unit], shape: PlanShape) -> tuple[list[list[Piece]], int, int]:
    """Cuts at the borders of equal shares of the cost line; the share; the parts that it takes."""
    tiles = [unit.tiles for unit in units]
    share, overhead = _share(tiles, shape)
    start, found = 0, []
    for count in tiles:
        own = []
        if count:
            origin = start + overhead
            first = min((origin + MIN_PIECE_TILES - 1) // share, shape.parts - 1)
            last = min(max((origin + count - MIN_PIECE_TILES) // share, first), shape.parts - 1)
            for part in range(first, last + 1):
                low = 0 if part == first else part * share - origin
                high = count if part == last else (part + 1) * share - origin
                own.append(Piece(part, low, high))
            start += count + overhead
        found.append(own)
    return found, share, -(-start // share)


def _share(tiles: list[int], shape: PlanShape) -> tuple[int, int]:
    """Cost of one part, and what starting a unit costs."""
    lengths = [count for count in tiles if count]
    same = len(set(lengths)) <= 1
    overhead = 0 if same and len(lengths) * 2 <= shape.parts else shape.overhead
    share = max(-(-(sum(lengths) + overhead * len(lengths)) // shape.parts), 1)
    least = max(shape.min_tiles, math.isqrt(max(lengths, default=0) * shape.merge_cost // 256))
    if share < least + overhead:
        overhead, share = 0, max(-(-sum(lengths) // shape.parts), least)
    cost = max(lengths, default=0) + overhead
    even = -(-cost // max(cost // share, 1)) if share < cost else -(-share // max(cost, 1)) * cost
    return (even if lengths and same and even * 16 <= share * 17 else share), overhead


def _fixed(units: list[Unit], shape: PlanShape) -> tuple[list[list[Piece]], int, int]:
    """Cuts that depend on the unit alone; a piece belongs to the part in whose share it starts."""
    steps = [max(shape.fixed_tiles, -(-unit.tiles // shape.max_pieces)) for unit in units]
    counts = [-(-unit.tiles // step) for unit, step in zip(units, steps, strict=True)]
    total = sum(unit.tiles + count * shape.overhead for unit, count in zip(units, counts, strict=True))
    share, start, found = max(-(-total // shape.parts), 1), 0, []
    for unit, step, count in zip(units, steps, counts, strict=True):
        starts = [start + index * (step + shape.overhead) for index in range(count)]
        found.append(
            [
                Piece(min(at // share, shape.parts - 1), index * step, min(index * step + step, unit.tiles))
                for index, at in enumerate(starts)
            ]
        )
        start += unit.tiles + count * shape.overhead
    return found, share, shape.parts
