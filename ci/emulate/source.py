"""Where the emulator is: a tinygrad source tree, neither vendored nor a dependency, that TINYGRAD_SRC points at."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "TINYGRAD_SRC"
COMMIT = "a9069c177a9da9cca18593edf55acd2e6073cca6"
EMULATOR = Path("test/mockgpu/amd/emu.py")  # in the source tree alone, not in the wheel
GET_IT = f"git clone https://github.com/tinygrad/tinygrad && git -C tinygrad checkout {COMMIT}"


class NoEmulator(RuntimeError):
    """The emulator cannot run here; the message says why, and what to do."""


def check_source() -> Path:
    """The source tree. Raises NoEmulator where it, or the compiler that it calls, is missing."""
    given = os.environ.get(VARIABLE)
    if not given:
        raise NoEmulator(f"{VARIABLE} is unset: point it at a tinygrad source tree ({GET_IT})")
    if not (Path(given) / EMULATOR).is_file():
        raise NoEmulator(f"{VARIABLE} is {given!r}, which has no {EMULATOR}: expected a source tree ({GET_IT})")
    compiler = os.environ.get("CC", "clang")
    if shutil.which(compiler) is None:
        raise NoEmulator(f"the emulator compiles instructions with {compiler}, which is not on PATH: install clang")
    return Path(given)


@functools.cache
def emulator() -> Any:
    """tinygrad's module of the emulator."""
    return _imported("test.mockgpu.amd.emu")


@functools.cache
def decoder() -> Callable[[bytes, str], Any]:
    """tinygrad's decoder of instructions."""
    found: Callable[[bytes, str], Any] = _imported("tinygrad.renderer.amd").decode_inst
    return found


def _imported(name: str) -> Any:
    source = str(check_source())
    os.environ["DEV"] = "CPU"  # tinygrad's own device, on which instructions run
    if source not in sys.path:
        sys.path.insert(0, source)
    return importlib.import_module(name)
