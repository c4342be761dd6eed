"""Stand-ins for compiled kernels that note what they are launched with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import pytest
from torch import Tensor

from portable_mla.runtime.kernel_launch import KernelLaunch

Launched = list[tuple[str, dict[str, Any]]]  # kernel, arguments by name


def noted(argument: Any) -> Any:
    """An argument as it is now: a descriptor is given another tensor by the next call."""
    return argument if isinstance(argument, Tensor) else copy.copy(argument)


class _Instant:
    """A compiled kernel that runs nothing."""

    def __init__(self, name: str, names: list[str], launched: Launched) -> None:
        self.name, self.names, self.launched = name, names, launched

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launched.append((self.name, dict(zip(self.names, map(noted, arguments), strict=True))))

        return launch


def note_launches(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Launches from now on; the first of each key compiles, and is none."""
    launched: Launched = []

    def first(self: KernelLaunch, key: Hashable, grid: object, *arguments: Any) -> None:
        self._compiled[key] = _Instant(self._kernel.__name__, self._kernel.arg_names, launched)

    monkeypatch.setattr(KernelLaunch, "_first", first)
    return launched
