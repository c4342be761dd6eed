"""The library's torch ops: one torch.library.Library, and one way to register an op, for inference alone."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

NAMESPACE = "portable_mla"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
P = ParamSpec("P")
R = TypeVar("R")


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op of the namespace, with its results as torch.compile and torch.export need them (`fake`).

    No gradient flows through it: results never require grad, and what the implementation computes in torch is not
    recorded. A call that could ask for a gradient is warned of once; one that would write to a tensor which requires
    grad is a ValueError.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _below_autograd(name), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def _below_autograd(name: str) -> Callable[..., Any]:
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    schema = op._schema.arguments
    written = {argument.name for argument in schema if argument.alias_info and argument.alias_info.is_write}
    names = [argument.name for argument in schema]

    def call(*arguments: Any, **keywords: Any) -> Any:
        if torch.is_grad_enabled():
            _check_gradients(name, dict(zip(names, arguments, strict=False)) | keywords, written)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **keywords)

    return call


def without_gradients(*written: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """An entry point that is no op, for inference alone as ops are. written: the arguments that it writes to."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        code = function.__code__
        names, entry = code.co_varnames[: code.co_argcount], function.__qualname__

        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            if not torch.is_grad_enabled():
                return function(*arguments, **keywords)
            _check_gradients(entry, dict(zip(names, arguments, strict=False)) | keywords, written)
            with torch.no_grad():
                return function(*arguments, **keywords)

        return call

    return decorate


def _check_gradients(entry: str, given: Mapping[str, object], written: Collection[str]) -> None:
    asking = [name for name, value in given.items() if _requires_grad(value)]
    for name in asking:
        if name in written:
            raise ValueError(
                f"{name}: requires grad, and portable_mla is for inference: it cannot be written to. Use "
                "torch.no_grad() or detach it"
            )
    if asking:
        warn_of_gradients(entry, asking[0])


def _requires_grad(value: object) -> bool:
    """Whether a tensor does, or a tensor of a dataclass, such as the weights of a context."""
    if isinstance(value, Tensor):
        return value.requires_grad
    parts = vars(value).values() if dataclasses.is_dataclass(value) else ()
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def warn_of_gradients(entry: str, name: str) -> None:
    """Say once that an entry point was given what requires grad, and that its results do not."""
    warnings.warn(
        f"portable_mla is for inference: {entry} was given {name}, which requires grad, and no gradient flows through "
        "it. Use torch.no_grad() where none is wanted",
        stacklevel=2,
    )


# torch.compile cannot trace a warning: marked so, it calls this while it traces. torch.compiler.assume_constant_result
# sets the same mark and imports all of the compiler.
warn_of_gradients._dynamo_marked_constant = True  # type: ignore[attr-defined]
