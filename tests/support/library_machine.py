"""Machine: a test's own import path and GPU runtime, so that vendor libraries come and go."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from portable_mla import Explanation, MLAShape, Request, arch_named, explain, select
from portable_mla.backends.library import library
from tests.support import fake_libraries as fakes
from tests.unit.test_dispatch import CAPACITY, SHAPE


def forget() -> None:
    """Forget what was imported and chosen."""
    for name in list(sys.modules):
        if name.split(".")[0] in fakes.MODULES:
            del sys.modules[name]
    importlib.invalidate_caches()
    library.load.cache_clear()
    library.loaded_builds.cache_clear()
    select.cache_clear()


class Machine:
    """Where libraries are installed, and for which runtime torch says it was built."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(folder)

    def runs(self, runtime: str) -> None:
        """Say that torch was built for it."""
        self._monkeypatch.setattr(library, "runtime", lambda: runtime)
        forget()

    def install(self, module: str, source: str, **options: object) -> None:
        """Write a package."""
        fakes.install(self.folder, module, source, **options)  # type: ignore[arg-type]
        forget()


@contextmanager
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with a torch for CUDA 13.0 and no library."""
    forget()
    made = Machine(folder, monkeypatch)
    made.runs("CUDA 13.0")
    yield made
    forget()


def request(arch: str, shape: MLAShape = SHAPE, **changes: object) -> Request:
    """A decode of DeepSeek-V3's TP8 rank, changed."""
    from portable_mla import Phase

    asked = Request(arch_named(arch), shape, Phase.decode, 1, True, False, CAPACITY)
    return replace(asked, **changes)  # type: ignore[arg-type]


def reasons(arch: str, backend: str, **changes: object) -> tuple[str, ...]:
    """Why a backend refuses."""
    explanation: Explanation = explain(request(arch, **changes), backend)  # type: ignore[arg-type]
    return explanation.candidates[0].reasons


def shape(**changes: object) -> MLAShape:
    """The usual shape, changed."""
    return replace(SHAPE, **changes)  # type: ignore[arg-type]


FP16 = torch.float16
