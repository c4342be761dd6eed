"""Package: a package to look for, and PackageState: whether it is there, found out without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package to look for.

    distributions: names it is installed under; marks: files of the real package, which a namesake lacks;
    by_distribution: several distributions bring the same module, so only the distribution's name tells.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    marks: tuple[str, ...] = ()
    by_distribution: bool = False


@dataclass(frozen=True)
class PackageState:
    """state: installed, missing, unrelated namesake or broken; detail: the version, or what is wrong."""

    state: str
    detail: str = ""

    def __str__(self) -> str:
        separator = ": " if self.state == "broken" else " "
        return f"{self.state}{separator}{self.detail}" if self.detail else self.state


def state_of(package: Package) -> PackageState:
    """Look for a package without running any of its code; whatever that raises is reported as broken."""
    try:
        return _look(package)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (import hooks may raise anything, and this reports it)
        return PackageState("broken", f"{type(error).__name__}: {error}")


def _look(package: Package) -> PackageState:
    distribution, version = _distribution(package)
    if package.by_distribution and distribution is None:
        return PackageState("missing")
    spec = importlib.util.find_spec(package.module)
    if spec is None:
        if distribution is None:
            return PackageState("missing")
        return PackageState("broken", f"{distribution} {version} is installed, but there is no module {package.module}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if spec.origin is None:
        where = ", ".join(map(str, folders)) or "nowhere"
        return PackageState("broken", f"a folder without __init__.py stands for it: {where}")
    if package.marks and not any(all((folder / mark).exists() for mark in package.marks) for folder in folders):
        return PackageState("unrelated namesake", f"{version} without {' and '.join(package.marks)}, {_place(spec)}")
    origin = f" (from {distribution})" if distribution not in (None, package.distributions[0]) else ""
    return PackageState("installed", f"{version}{origin}")


def _distribution(package: Package) -> tuple[str | None, str]:
    """The first of a package's distributions that is installed, and its version."""
    for name in package.distributions:
        try:
            return name, importlib.metadata.version(name) or "of unknown version"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None, "of unknown version"


def _place(spec: ModuleSpec) -> str:
    return f"at {spec.origin}"
