"""Operator: the torch operator behind a library's Python call, known by its schema and given its arguments in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from portable_mla.backends.library.calls import fault


class Operator:
    """An operator that is given `given`, in that order, beside arguments that are always the same."""

    def __init__(self, library: str, function: Any, given: tuple[str, ...], constant: Mapping[str, Any]) -> None:
        names = [argument.name for argument in function._schema.arguments]
        self._library, self._name = library, str(function)
        self._function = getattr(function, "_op", function)  # what its own Python method calls, and nothing else
        self._positions = tuple(names.index(name) for name in given)
        self._arguments = [constant.get(name) for name in names]

    def __call__(self, *values: Any) -> Any:
        """What it returns; whatever it raises is the cause of a BackendError."""
        arguments = self._arguments.copy()
        for position, value in zip(self._positions, values, strict=True):
            arguments[position] = value
        try:
            return self._function(*arguments)
        except Exception as error:  # a library may raise anything
            raise fault(self._library, self._name, error) from error


def find_operator(
    library: str,
    path: str,
    given: tuple[str, ...],
    constant: Mapping[str, Any],
    neutral: Mapping[str, Any] | None = None,
) -> Operator | None:
    """The operator of a path "namespace.name", if there is one and its schema is understood: it takes what is given and
    the constants, and of the rest each has a neutral value here or a default of its own.

    neutral: arguments that need not be there, with the values that ask for nothing.
    """
    if not path:
        return None
    namespace, name = path.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name, None), "default", None)
    if function is None:
        return None
    schema = {argument.name: argument for argument in function._schema.arguments}
    known = {**(neutral or {}), **constant}
    own = {
        name: argument.default_value
        for name, argument in schema.items()
        if name not in known and argument.has_default_value()
    }
    lacking = {*given, *constant} - schema.keys()
    unknown = schema.keys() - {*given, *known, *own}
    if lacking or unknown or any(argument.kwarg_only for argument in schema.values()):
        return None
    return Operator(library, function, given, known | own)
