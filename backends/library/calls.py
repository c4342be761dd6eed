"""Calls into a vendor library: its faults become BackendError, and its results are looked at before they are used."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from portable_mla.errors import BackendError, NoBackend

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call(library: str, function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call by keyword; whatever it raises is the cause of a BackendError."""
    return call_with(library, function, arguments)


def call_with(library: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The same, with half a microsecond less for a call of many arguments."""
    try:
        return function(**arguments)
    except Exception as error:  # a library may raise anything
        name = getattr(getattr(function, "func", function), "__name__", "its call")  # func: of a partial
        raise fault(library, name, error) from error


def fault(library: str, name: str, error: Exception) -> BackendError:
    """The error of a library's call that raised another."""
    return BackendError(f"{library}: {name} raised {type(error).__name__}: {error}")


class NamedCall:
    """A library's Python function that is given its arguments in an order of ours, beside those that are always the
    same: by keyword, since each build has an order of its own."""

    def __init__(
        self, library: str, function: Callable[..., Any], given: tuple[str, ...], constant: Mapping[str, Any]
    ) -> None:
        self._library, self._given = library, given
        self._function = functools.partial(function, **constant)

    def __call__(self, *values: Any) -> Any:
        """What it returns; whatever it raises is the cause of a BackendError."""
        return call_with(self._library, self._function, dict(zip(self._given, values, strict=True)))


class Returned(NamedTuple):
    """What a library has to return: first a tensor for out and one for LSE."""

    library: str
    out: tuple[int, ...]
    out_dtype: torch.dtype
    lse: tuple[int, ...]

    def of(self, results: Any) -> tuple[Tensor, Tensor]:
        """Both; BackendError if one is no tensor, or of another shape or dtype."""
        library, shape, dtype, lse_shape = self
        out, lse = results[0], results[1]
        right = isinstance(out, Tensor) and out.shape == shape and out.dtype is dtype
        if not (right and isinstance(lse, Tensor) and lse.shape == lse_shape and lse.dtype is torch.float32):
            result(library, "out", out, shape, dtype)
            result(library, "lse", lse, lse_shape, torch.float32)
        return out, lse


def result(library: str, name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that the library returned; BackendError if it is none, or of another shape or dtype."""
    if not isinstance(value, Tensor):
        raise BackendError(f"{library}: returned {type(value).__name__} for {name}, expected a tensor")
    if value.shape != shape or value.dtype != dtype:
        raise BackendError(
            f"{library}: returned {name} of shape {tuple(value.shape)} and {value.dtype}, expected {shape} and {dtype}"
        )
    return value


def wide(tensor: Tensor) -> bool:
    """Whether the address and the outer strides of a tensor of 3 dimensions are multiples of 16 bytes, as wide copies
    need."""
    address, size, (outer, inner, _) = tensor.data_ptr(), tensor.element_size(), tensor.stride()
    if (address | outer * size | inner * size) % 16 == 0:  # of each, at once
        return True
    strides = [stride * size for stride, extent in zip((outer, inner), tensor.shape, strict=False) if extent > 1]
    return not any([address % 16, *[stride % 16 for stride in strides]])


def wide_cache(library: str, cache: Tensor) -> Tensor:
    """The cache, if wide copies can read it; NoBackend, before anything is launched, if not."""
    if not wide(cache):
        raise NoBackend(
            f"{library}: needs a kv_cache whose address and strides are multiples of 16 bytes, got address "
            f"{cache.data_ptr():#x} and strides {cache.stride()}; triton takes any"
        )
    return cache


def keywords(
    library: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    optional: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments under the names that this release of a function has.

    optional: those that may be left out where it does not have them; renamed: other names of some. BackendError names
    what it lacks, or asks for beside these.
    """
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    chosen: dict[str, Any] = {}
    for name, value in arguments.items():
        known = next((one for one in (name, (renamed or {}).get(name)) if one in parameters), None)
        if known is not None:
            chosen[known] = value
        elif name not in optional:
            raise BackendError(f"{library}: {getattr(function, '__name__', 'its call')} has no parameter {name}")
    asked = [n for n, p in parameters.items() if p.default is p.empty and n not in chosen and p.kind in _NAMED]
    if asked:
        raise BackendError(f"{library}: {getattr(function, '__name__', 'its call')} needs {', '.join(asked)} too")
    return chosen
