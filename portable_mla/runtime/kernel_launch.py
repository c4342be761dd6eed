"""KernelLaunch: one Triton kernel with fixed constants, cheap to launch and never compiled in a capture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from portable_mla.core.device import built_for_amd
from portable_mla.errors import GraphCaptureError
from portable_mla.runtime.direct_launch import direct_launcher

WIDEST = 16  # bytes: what Triton specialises pointers on
_FARTHEST = 2**31 - 1  # bytes
_MAX_GRIDS = 1024
_MAX_KEYS = 4096


def alignment(*tensors: Tensor | None, amd: bool | None = None) -> tuple[bool | None, ...]:
    """What Triton specialises on in each pointer: None for no tensor, else whether its address allows wide access; on
    AMD also whether its storage ends within 31 bits, since loads of such a tensor have offsets of 32 bits.

    amd: what torch was built for, if unsaid.
    """
    wide = tuple([None if tensor is None else tensor.data_ptr() % WIDEST == 0 for tensor in tensors])
    if not (built_for_amd() if amd is None else amd):
        return wide
    near = [None if tensor is None else tensor.untyped_storage().nbytes() <= _FARTHEST for tensor in tensors]
    return (*wide, *near)


class KernelLaunch:
    """A kernel whose constants are the last parameters of its signature.

    The first launch of a key goes through Triton, which binds, specialises and compiles; later ones go straight to the
    compiled kernel, at a fifth of the host time. The key must tell apart whatever Triton specialises on: dtypes,
    alignment of pointers, values of strides. Every other runtime scalar is in the kernel's do_not_specialize, whose
    value Triton never bakes in. compiling: entered around each first launch.
    """

    def __init__(
        self, kernel: Any, constants: Mapping[str, Any],
        compiling: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        self._kernel, self._constants, self._compiling = kernel, dict(constants), compiling
        self._trailing = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[Hashable, Any] = {}
        self._at: dict[tuple[Hashable, tuple[int, ...]], Callable[..., None]] = {}

    def ready(self, key: Hashable) -> Any:
        """The compiled kernel of `key`, None before its first launch.

        Raises GraphCaptureError where the first launch would happen inside a graph capture.
        """
        compiled = self._compiled.get(key)
        if compiled is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            name = self._kernel.__name__
            raise GraphCaptureError(f"{name} is not compiled yet for these tensors, and a capture cannot compile it")
        return compiled

    def at(self, key: Hashable, grid: tuple[int, ...]) -> Callable[..., None]:
        """A launch on the current stream of the current device, to be given the arguments before the constants, in
        order. Raises as `ready` does."""
        return self._at.get((key, grid)) or self._launch_at(key, grid)

    def __call__(self, key: Hashable, grid: tuple[int, ...], *arguments: Any) -> None:
        """Launch at once."""
        self.at(key, grid)(*arguments)

    def _launch_at(self, key: Hashable, grid: tuple[int, ...]) -> Callable[..., None]:
        compiled = self.ready(key)
        if compiled is None:
            return functools.partial(self._first, key, grid)
        if len(self._at) >= _MAX_GRIDS:
            self._at.clear()
        launch: Callable[..., None] = direct_launcher(compiled, grid, self._trailing)
        self._at[key, grid] = launch
        return launch

    def _first(self, key: Hashable, grid: tuple[int, ...], *arguments: Any) -> None:
        with self._compiling():
            compiled = self._kernel[grid](*arguments, **self._constants)
        if compiled is not None:  # Triton's interpreter compiles nothing
            if len(self._compiled) >= _MAX_KEYS:
                self._compiled.pop(next(iter(self._compiled)))  # the oldest: Triton's own cache still has it
            self._compiled[key] = compiled
