"""Settings: every environment variable, typed, strict and documented; read when an attention is built or called."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from portable_mla.dispatch.registry import BACKENDS

PREFIX = "PORTABLE_MLA_"
TEST_PREFIX = "PORTABLE_MLA_TEST_"  # of variables that the tests read
_BOOLEANS = {"0": False, "false": False, "off": False, "1": True, "true": True, "on": True}


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. Explicit arguments win over it.

    backend: serve every call with this backend or raise NoBackend; never falls back.
    deterministic: as if every call said deterministic=True.
    persistent_metadata: an attention keeps its metadata buffers; off, it allocates new ones each step, which no graph
    can capture.
    overlap: a layer runs branches that do not need one another on two streams, unless its step says otherwise; None:
    where that was measured to pay.
    debug: values are checked on the host at each plan and call, which syncs, and kernels assert on the device.
    prefill_workspace: bytes of expanded context that a chunked prefill holds at once, where the caller gives no memory.
    disable: backends that are no candidates.
    """

    backend: str | None = None
    disable: frozenset[str] = frozenset()
    deterministic: bool = False
    persistent_metadata: bool = True
    overlap: bool | None = None
    debug: bool = False
    prefill_workspace: int = 256 << 20

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of `environ` (default: os.environ).

        Raises ValueError for an unknown PORTABLE_MLA_ variable or a value that is not allowed, listing what is.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for name, text in environ.items():
            if not name.startswith(PREFIX) or name.startswith(TEST_PREFIX):
                continue
            variable = VARIABLES.get(name)
            if variable is None:
                raise ValueError(f"{name}: unknown variable; allowed: {', '.join(VARIABLES)}")
            values[variable.field] = variable.read(name, text)
        return cls(**values)


@dataclass(frozen=True)
class Variable:
    """One environment variable: the Settings field it sets, its allowed values, and its line of the README table."""

    field: str
    allowed: tuple[str, ...]
    default: str
    doc: str
    parse: Callable[[str], Any] = str
    several: bool = False  # a comma list of the allowed values

    def read(self, name: str, text: str) -> Any:
        """The value that `text` says; ValueError with what is allowed for any other."""
        words = [word.strip() for word in text.lower().split(",")] if self.several else [text.lower()]
        if any(word not in self.allowed for word in words):
            kind = "a comma list" if self.several else "one"
            raise ValueError(f"{name}: expected {kind} of {', '.join(self.allowed)}, got {text!r}")
        return frozenset(words) if self.several else self.parse(words[0])

    @property
    def values(self) -> str:
        """What may be said, for a table."""
        return ("comma list of " if self.several else "") + ", ".join(self.allowed)


def _switch(field: str, default: str, doc: str) -> Variable:
    return Variable(field, tuple(_BOOLEANS), default, doc, _BOOLEANS.__getitem__)


VARIABLES: dict[str, Variable] = {
    f"{PREFIX}BACKEND": Variable(
        "backend", tuple(BACKENDS), "best supported", "serve every call with this backend, or raise `NoBackend`"
    ),
    f"{PREFIX}DISABLE": Variable(
        "disable", tuple(BACKENDS), "none", "never serve with these backends; `explain` says so", several=True
    ),
    f"{PREFIX}DETERMINISTIC": _switch("deterministic", "0", "a row's bits never depend on the rest of the batch"),
    f"{PREFIX}PERSISTENT_METADATA": _switch(
        "persistent_metadata", "1", "0: allocate metadata anew each step (same bits, slower, refuses graph capture)"
    ),
    f"{PREFIX}OVERLAP": _switch(
        "overlap", "where it pays", "a layer's independent branches run on two streams (same bits)"
    ),
    f"{PREFIX}DEBUG": _switch(
        "debug", "0", "check lengths and page ids by value at each plan and call (waits for the device)"
    ),
    f"{PREFIX}PREFILL_WORKSPACE": Variable(
        "prefill_workspace",
        tuple(str(1 << power) for power in range(4, 14)),
        "256",
        "MB of expanded context that a chunked prefill holds at once, where the caller gives no workspace",
        lambda megabytes: int(megabytes) << 20,
    ),
}
