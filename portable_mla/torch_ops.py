"""The library's torch ops: one torch.library.Library, and one way to register an op, for inference alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "portable_mla"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op of the namespace, with its results as torch.compile and torch.export need them (`fake`).

    No gradient flows through it: results never require grad, and what the implementation computes in torch is not
    recorded. A call that could ask for a gradient is warned of once; one that would write to a tensor which requires
    grad is a ValueError.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(name, _without_gradients(name), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


def _without_gradients(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        if torch.is_grad_enabled():
            _check_gradients(op, arguments, keywords)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments, **keywords)

    return call


def _check_gradients(op: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    schema = op._schema
    given = dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)) | keywords
    asking = [name for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad]
    written = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
    for name in asking:
        if name in written:
            raise ValueError(
                f"{name}: requires grad, and portable_mla is for inference: it cannot be written to. Use "
                "torch.no_grad() or detach it"
            )
    if asking:
        warn_of_gradients(op.name().partition("::")[2], asking[0])


def warn_of_gradients(entry: str, name: str) -> None:
    """Say once that an entry point was given what requires grad, and that its results do not."""
    warnings.warn(
        f"portable_mla is for inference: {entry} was given {name}, which requires grad, and no gradient flows through "
        "it. Use torch.no_grad() where none is wanted",
        stacklevel=2,
    )
