"""Backend and Runner: what a backend is to the rest of the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from portable_mla.metadata import DecodeMetadata, Needs
from portable_mla.shape import Request


@dataclass(frozen=True)
class DecodeInputs:
    """One layer's inputs of a decode step."""

    q: Tensor  # [tokens, heads, latent + rope]
    kv_cache: Tensor  # [pages, page_size, row_width], any outer strides


class Backend(Protocol):
    """A stateless provider of one implementation."""

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Why this machine's software cannot run it (a missing, old or broken package); empty if it can."""
        ...

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        """Every reason why it cannot serve `request`, each quoting what it needs and what it got; pure."""
        ...

    def needs(self, request: Request) -> Needs:
        """The metadata forms that its runner reads; only those are built."""
        ...

    def bind(self, request: Request) -> Runner:
        """A runner for every step that fits `request`; allocates what outlives a step."""
        ...


@runtime_checkable
class LibraryBackend(Backend, Protocol):
    """A backend whose kernels come from a library that is imported when it is about to be chosen, and not before."""

    def reasons_not_loadable(self) -> tuple[str, ...]:
        """Import the library, once: why that fails, or what the calls it offers lack; empty if it can serve."""
        ...


class Runner(Protocol):
    """A backend bound to one request shape; owns what outlives a step."""

    @property
    def graph_safe(self) -> bool:
        """Whether plan and run read no value on the host, so that a graph may capture them."""
        ...

    def plan(self, metadata: DecodeMetadata) -> None:
        """Prepare one step, in place; once a step."""
        ...

    def memory(self) -> dict[str, int]:
        """Device bytes that outlive a step, by part."""
        ...

    def run(
        self, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, softmax_scale: float, kv_scale: Tensor | None = None
    ) -> None:
        """Attend once, for one layer.

        out: [tokens, heads, latent] in q's dtype; lse: [tokens, heads] float32, natural log. Rows with nothing to see
        and rows past the last query token become 0 and -inf.
        """
        ...
