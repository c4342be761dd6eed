"""Library: one build of a vendor library, found on disk, imported when it is about to be chosen, known by signature."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portable_mla.core.device import runtime
from portable_mla.runtime.packages import Package, state_of


@dataclass(frozen=True)
class Library:
    """A build of a vendor library.

    module: what to import; functions: dotted names in it, each with the parameters that must be there; part: a path in
    the package's folder, for a build inside a larger package; runtime: of the torch it needs, "CUDA" or "HIP"; extras:
    functions that are used where they are there with these parameters; operator: the torch operator behind its
    decode, "namespace.name".
    """

    package: Package
    module: str
    functions: tuple[tuple[str, tuple[str, ...]], ...]
    runtime: str
    part: str = ""
    extras: tuple[tuple[str, tuple[str, ...]], ...] = ()
    operator: str = ""

    @property
    def name(self) -> str:
        """The package, with the part of it that matters."""
        return f"{self.package.name}/{self.part}" if self.part else self.package.name

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Why this machine cannot have it, as far as files and torch's build tell; runs none of its code."""
        state = state_of(self.package)
        checks = [] if state.state == "installed" else [f"{self.name}: {state}"]
        if state.state == "installed" and self.part and not self._has_part():
            checks.append(f"{self.name}: {self.package.name} {state.detail} is a build without it")
        if not runtime().startswith(self.runtime):
            checks.append(f"{self.name}: needs a torch built for {self.runtime}, this one is built for {runtime()}")
        return tuple(checks)

    def _has_part(self) -> bool:
        spec = importlib.util.find_spec(self.package.module)
        folders = spec.submodule_search_locations if spec is not None else None
        return any((Path(folder) / self.part).exists() for folder in folders or ())


@dataclass(frozen=True)
class Loaded:
    """A library that was imported: its functions by their names, or why it cannot be used."""

    library: Library
    functions: dict[str, Callable[..., Any]]
    reasons: tuple[str, ...]

    def takes(self, function: str, *parameters: str) -> bool:
        """Whether a function has all these parameters."""
        return not missing_parameters(self.functions[function], parameters)

    def takes_anything(self, function: str) -> bool:
        """Whether a function has no arguments that mean something, and takes whatever is given."""
        parameters = inspect.signature(inspect.unwrap(self.functions[function])).parameters.values()
        return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


@functools.cache
def load(library: Library) -> Loaded:
    """Import a library, once a process, and look at the calls that it offers."""
    try:
        module = importlib.import_module(library.module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (an import may raise anything: undefined symbols, exits)
        why = f"{library.name}: broken at import: {type(error).__name__}: {error}"
        return Loaded(library, {}, (why,))
    functions: dict[str, Callable[..., Any]] = {}
    reasons: list[str] = []
    for path, parameters in library.functions:
        try:
            function: Any = functools.reduce(getattr, path.split("."), module)
        except AttributeError:
            reasons.append(f"{library.name}: too old, or too new: {library.module} has no {path}")
            continue
        missing = missing_parameters(function, parameters) if parameters else ()
        if missing:
            reasons.append(f"{library.name}: too old, or too new: {path} has no parameter {', '.join(missing)}")
        functions[path] = function
    for name, parameters in library.extras:
        extra = getattr(module, name, None)
        if extra is not None and not missing_parameters(extra, parameters):
            functions[name] = extra
    return Loaded(library, functions, tuple(reasons))


def missing_parameters(function: Callable[..., Any], parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `parameters` that a function would not take by keyword."""
    have = inspect.signature(inspect.unwrap(function)).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in have.values()):
        return ()
    return tuple(name for name in parameters if name not in have)


@dataclass(frozen=True)
class Builds:
    """The builds of one library, best first; any of them will do.

    check: what else may be wrong with a build that was imported.
    """

    libraries: tuple[Library, ...]
    check: Callable[[Loaded], tuple[str, ...]] = lambda loaded: ()

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Empty if any build is on this machine."""
        found = [library.reasons_unavailable() for library in self.libraries]
        return () if any(not reasons for reasons in found) else sum(found, ())

    def reasons_not_loadable(self) -> tuple[str, ...]:
        """Empty if any build can be imported and offers what is called."""
        found = loaded_builds(self)
        return () if any(not loaded.reasons for loaded in found) else sum((one.reasons for one in found), ())

    def first(self) -> Loaded:
        """The build that serves; asked for only after both answers above were empty."""
        return next(loaded for loaded in loaded_builds(self) if not loaded.reasons)


@functools.cache
def loaded_builds(builds: Builds) -> tuple[Loaded, ...]:
    """The builds on this machine up to the first that can be used, imported; once a process, since looking takes
    milliseconds."""
    found: list[Loaded] = []
    for library in builds.libraries:
        if not library.reasons_unavailable():
            loaded = load(library)
            reasons = loaded.reasons or builds.check(loaded)
            found.append(Loaded(library, loaded.functions, reasons))
            if not reasons:
                break
    return tuple(found)
