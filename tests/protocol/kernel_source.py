"""Gluon kernels run as plain Python: their syntax trees with stand-ins for whatever is not control flow, so that a test
sees which barriers and buffers a kernel's own source goes through, and what it would go through without some line."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from triton.language import constexpr

import portable_mla.backends

PACKAGE = "portable_mla.backends.nvidia.hopper"
FOLDER = Path(portable_mla.backends.__file__).parent / "nvidia" / "hopper"


class Anything:
    """A value that nothing depends on: every operation on it gives it back, a branch on it is an error."""

    def _same(self, *_args: object, **_named: object) -> Anything:
        return self

    __call__ = __getitem__ = __neg__ = __invert__ = _same
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _same
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same
    __eq__ = __ne__ = _same  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self) -> bool:
        raise TypeError("a branch on a value that the test does not know")


ANY = Anything()


def _if_known(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of plain values; Anything of others."""
    return lambda *args: ANY if any(arg is ANY for arg in args) else function(*args)


class Language:
    """gl: control flow and integers as they are, Anything else."""

    constexpr = staticmethod(lambda value: value)
    static_range = range
    static_assert = staticmethod(lambda *_args: None)
    where = staticmethod(_if_known(lambda condition, yes, no: yes if condition else no))
    maximum = staticmethod(_if_known(max))
    minimum = staticmethod(_if_known(min))

    def __getattr__(self, _name: str) -> Any:
        return ANY


class _Plain(ast.NodeTransformer):
    """Without decorators, annotations and classes."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        node.returns = None
        for argument in (*node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        return None

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        assert node.value is not None
        return ast.copy_location(ast.Assign([node.target], node.value), node)


@dataclass(frozen=True)
class File:
    """A kernel file ready to run: what it imports, as module and name, and its code without decorators."""

    imports: tuple[tuple[str, str], ...]
    code: CodeType

    @classmethod
    def of(cls, name: str, tree: ast.Module) -> File:
        """The file of a syntax tree, which is changed."""
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        names = tuple((node.module or "", alias.asname or alias.name) for node in imports for alias in node.names)
        return cls(names, compile(ast.fix_missing_locations(_Plain().visit(tree)), f"{name}.py", "exec"))


def tree_of(name: str) -> ast.Module:
    """The syntax tree of a kernel file."""
    return ast.parse(FOLDER.joinpath(*name.split(".")).with_suffix(".py").read_text())


Files = Mapping[str, File]


def files_of(names: Sequence[str]) -> dict[str, File]:
    """Kernel files as they are."""
    return {name: File.of(name, tree_of(name)) for name in names}


class Sources:
    """Kernel files that run as plain Python, imports from one to another included."""

    def __init__(self, files: Files, stand_ins: Mapping[str, object]) -> None:
        self._files = files
        self._stand_ins = {"gl": Language(), **stand_ins}
        self._loaded: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """A file's names."""
        if name not in self._loaded:
            names = {found: self._imported(module, found) for module, found in self._files[name].imports}
            exec(self._files[name].code, names)
            names |= {key: value for key, value in self._stand_ins.items() if key in names}
            self._loaded[name] = names
        return self._loaded[name]

    def _imported(self, module: str, name: str) -> Any:
        if name in self._stand_ins:
            return self._stand_ins[name]
        file = module.removeprefix(f"{PACKAGE}.")
        if file in self._files:
            return self[file].get(name, ANY)  # of a class, Anything
        if module.startswith("portable_mla"):
            value = getattr(importlib.import_module(module), name)
            return value.value if isinstance(value, constexpr) else ANY
        return ANY
