"""The operations that a kernel's own source goes through, in the terms of barrier_model.py, and the changes to its
source that must show in them."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from tests.protocol.barrier_model import SYNCHRONIZES, Op
from tests.protocol.kernel_source import ANY, Anything, File, Files, tree_of

CALLS = ("arrive", "meet", "wait", "expect", "fence_async_shared", "synchronize", "tma_load", "load_once")


@dataclass
class Trace:
    """What one role of a kernel does, from the stand-ins below."""

    ops: list[Op] = field(default_factory=list)
    products: list[tuple[str, ...]] = field(default_factory=list)  # in flight, the first one first
    missing: int = 0  # bytes that the last mbarrier expects and the TMA was not asked for

    def at(self, kind: str, barriers: Mapping[int, str], barrier: int, threads: int) -> None:
        """arrive or meet."""
        self.ops.append(Op(kind, barriers[barrier], None, threads))

    def wait(self, barrier: Memory, phase: int) -> None:
        self.ops.append(Op("wait", barrier.name, None, phase & 1))

    def expect(self, barrier: Memory, count: int) -> None:
        self._check_loads()
        self.ops.append(Op("load" if count else "complete", barrier.name))
        self.missing = count

    def tma_load(self, _desc: object, _coordinates: object, barrier: Memory, tile: Memory) -> None:
        if self.ops[-1:] != [Op("load", tile.name)] or barrier.name != tile.name:
            raise AssertionError(f"{tile.name} is loaded, {barrier.name} is told, expected was {self.ops[-1:]}")
        self.missing -= 2 * math.prod(tile.shape)

    def _check_loads(self) -> None:
        if self.missing:
            raise AssertionError(f"{self.ops[-1].target}: {self.missing} bytes are expected and not loaded")

    def multiply(self, left: object, right: object, acc: Anything, **_named: object) -> Anything:
        """warpgroup_mma."""
        product = tuple(operand.name for operand in (left, right) if isinstance(operand, Memory))
        self.ops += [Op("begin", name) for name in product]
        self.products.append(product)
        return acc

    def finish(self, in_flight: int, deps: Sequence[Anything] = ()) -> Anything:
        """warpgroup_mma_wait."""
        over = max(len(self.products) - in_flight, 0)
        done, self.products = self.products[:over], self.products[over:]
        busy = {name for product in self.products for name in product}
        names = {name: None for product in done for name in product}
        self.ops += [Op("end", name) for name in names if name not in busy]
        return ANY

    def stand_ins(self, barriers: Mapping[int, str]) -> dict[str, object]:
        """By the names that kernels import. barriers: the named ones, by number."""
        return {
            "arrive": partial(self.at, "arrive", barriers), "meet": partial(self.at, "meet", barriers),
            "mbarrier": self, "tma_load": self.tma_load, "load_once": self.tma_load,
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.finish,
            "fence_async_shared": partial(self.ops.append, Op("fence")),
            "synchronize": partial(self.ops.append, Op("synchronize")), "opaque": lambda value: value,
            "reinterpret": lambda memory, shape, _layout: memory.of_shape(shape),
        }  # fmt: skip

    def finished(self) -> list[Op]:
        """All operations, where none is left half way."""
        self._check_loads()
        if any(self.products):
            raise AssertionError(f"nobody waits for {self.products}")
        return self.ops


class Memory:
    """A buffer of two-byte values, any part of one, or its mbarrier."""

    dtype = ANY

    def __init__(self, trace: Trace, name: str, shape: Sequence[int] = ()) -> None:
        self.trace = trace
        self.name = name
        self.shape = tuple(shape)

    def of_shape(self, shape: Sequence[int]) -> Memory:
        return Memory(self.trace, self.name, shape)

    def index(self, _index: int) -> Memory:
        return self.of_shape(self.shape[1:])

    def slice(self, _first: int, length: int, axis: int = 0) -> Memory:
        return self.of_shape([length if at == axis else size for at, size in enumerate(self.shape)])

    def permute(self, order: Sequence[int]) -> Memory:
        return self.of_shape([self.shape[axis] for axis in order])

    def load(self, *_layout: object) -> Anything:
        self.trace.ops += [Op("begin", self.name), Op("end", self.name)]
        return ANY

    def store(self, _value: object) -> None:
        self.trace.ops.append(Op("write", self.name))


Segment = tuple[Op | None, frozenset[tuple[str, str]]]
EXPANDED = {"rewrite": ("begin", "end", "write")}


def normal_form(ops: Iterable[Op]) -> list[Segment]:
    """Synchronizing operations in order and what lies between them in any order; repeated ones that follow each other
    are one, as those of the boxes of a load. A wait is told by its parity, contents are left out."""
    found: list[tuple[Op | None, set[tuple[str, str]]]] = [(None, set())]
    for op in ops:
        if not SYNCHRONIZES[op.kind] and op.kind != "synchronize":
            found[-1][1].update((kind, op.target) for kind in EXPANDED.get(op.kind, (op.kind,)))
            continue
        told = Op(op.kind, op.target, None, op.number)
        if told != found[-1][0] or op.kind in ("arrive", "meet"):
            found.append((told, set()))
    return [(op, frozenset(accesses)) for op, accesses in found]


def with_parity(ops: Iterable[Op]) -> Iterator[Op]:
    """A model's operations as a kernel can tell them: waits by the parity of their load."""
    for op in ops:
        yield Op("wait", op.target, None, (op.number - 1) & 1) if op.kind == "wait" else op


def with_sizes(ops: Iterable[Op], sizes: Mapping[str, int]) -> Iterator[Op]:
    """Arrivals by how many the barrier opens at, which is what bar.sync and bar.arrive are told."""
    for op in ops:
        yield Op(op.kind, op.target, None, sizes[op.target]) if op.kind in ("arrive", "meet") else op


def _called(statement: ast.stmt) -> str:
    """The synchronizing call that a statement is, or that it assigns; else nothing."""
    value = statement.value if isinstance(statement, (ast.Expr, ast.Assign)) else None
    if not isinstance(value, ast.Call):
        return ""
    name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
    return name if (name in CALLS and isinstance(statement, ast.Expr)) or name == "warpgroup_mma_wait" else ""


def _calls(tree: ast.AST) -> list[tuple[list[ast.stmt], int]]:
    """Every synchronizing call: the statements that it is among, and its index there."""
    bodies = (getattr(node, part, None) for node in ast.walk(tree) for part in ("body", "orelse"))
    return [
        (body, index)
        for body in bodies
        if isinstance(body, list)
        for index, statement in enumerate(body)
        if _called(statement)
    ]


Changed = Iterator[tuple[str, Files]]


def without_each_call(files: Files) -> Changed:
    """For each synchronizing call: where it was, and the files without it."""
    for name in files:
        for number in range(len(_calls(tree_of(name)))):
            tree = tree_of(name)
            body, index = _calls(tree)[number]
            gone, body[index] = body[index], ast.copy_location(ast.Pass(), body[index])
            yield f"{name}.py:{gone.lineno}: {ast.unparse(gone)}", {**files, name: File.of(name, tree)}


def with_calls_exchanged(files: Files) -> Changed:
    """For each two synchronizing calls that differ and follow each other: where they are, and the files with them the
    other way round."""
    for name in files:
        for number in range(len(_calls(tree_of(name)))):
            tree = tree_of(name)
            body, index = _calls(tree)[number]
            if index and _called(body[index - 1]) and ast.dump(body[index - 1]) != ast.dump(body[index]):
                body[index - 1 : index + 1] = body[index], body[index - 1]
                place = f"{name}.py:{body[index].lineno}: {ast.unparse(body[index])}"
                yield place, {**files, name: File.of(name, tree)}
