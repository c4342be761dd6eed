"""select and explain: which backend serves a request, and why."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass

from portable_mla.core.arch import Vendor
from portable_mla.core.shape import Request
from portable_mla.dispatch.interface import Backend, LibraryBackend
from portable_mla.dispatch.registry import BACKENDS, ORDER
from portable_mla.errors import NoBackend

_LOG = logging.getLogger("portable_mla")
DISABLED = "disabled by PORTABLE_MLA_DISABLE"


@dataclass(frozen=True)
class Candidate:
    """A backend that was asked, and every reason why it cannot serve; no reasons means that it can."""

    name: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The answer of dispatch to a request: every candidate in order of preference, and the one chosen."""

    request: Request
    candidates: tuple[Candidate, ...]
    forced: bool = False

    @property
    def chosen(self) -> str | None:
        """The first candidate without reasons; None if there is none."""
        return next((candidate.name for candidate in self.candidates if not candidate.reasons), None)

    def __str__(self) -> str:
        lines = [str(self.request)]
        for candidate in self.candidates:
            verdict = "chosen" if candidate.name == self.chosen else "supported, comes after the chosen one"
            lines.append(f"  {candidate.name}: {'; '.join(candidate.reasons) or verdict}")
        return "\n".join(lines)


def load(name: str, vendor: Vendor) -> Backend:
    """The backend called `name`, for the architectures of `vendor`."""
    module, attribute = BACKENDS[name].format(vendor=vendor).split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)
    return backend


def explain(request: Request, backend: str | None = None, disabled: frozenset[str] = frozenset()) -> Explanation:
    """Ask every backend registered for the request's architecture, or only `backend`, which never falls back.

    disabled: names that are refused without being asked. A vendor library is imported only where it would be chosen.
    Raises ValueError with the known names for an unknown `backend`.
    """
    known = ORDER[request.arch.name]
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend is not None and backend not in known:
        reason = f"not registered for {request.arch.name}, whose backends are {', '.join(known)}"
        return Explanation(request, (Candidate(backend, (reason,)),), forced=True)
    candidates: list[Candidate] = []
    for name in known if backend is None else (backend,):
        chosen = any(not candidate.reasons for candidate in candidates)
        candidates.append(Candidate(name, (DISABLED,) if name in disabled else _reasons(name, request, chosen)))
    return Explanation(request, tuple(candidates), forced=backend is not None)


@functools.lru_cache(maxsize=1024)
def select(request: Request, backend: str | None = None, disabled: frozenset[str] = frozenset()) -> Backend:
    """The best backend for `request`, or exactly `backend`; none that is `disabled`.

    Raises NoBackend, with the request and every reason, when none can serve.
    """
    return chosen_backend(explain(request, backend, disabled))


def chosen_backend(explanation: Explanation) -> Backend:
    """The backend that an explanation chose; NoBackend, with the request and every reason, where it chose none."""
    if explanation.chosen is None:
        alone = " (it was asked for by name, so no other was tried)" if explanation.forced else ""
        raise NoBackend(f"no backend can serve{alone}: {explanation}")
    if explanation.chosen == "reference" and not explanation.forced:
        _LOG.warning("the reference serves this request, which is right but slow: %s", explanation)
    return load(explanation.chosen, explanation.request.arch.vendor)


def _reasons(name: str, request: Request, chosen: bool) -> tuple[str, ...]:
    """Why a backend cannot serve; one that comes after the chosen one is not made to import its library."""
    backend = load(name, request.arch.vendor)
    reasons = backend.reasons_unavailable() + backend.reasons_unsupported(request)
    if reasons or chosen or not isinstance(backend, LibraryBackend):
        return reasons
    return backend.reasons_not_loadable()
