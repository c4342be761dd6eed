"""Backend and Runner: what a backend is to the rest of the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from torch import Tensor

from portable_mla.core.device import is_capturing
from portable_mla.core.shape import Phase, Request
from portable_mla.metadata import DecodeMetadata, Needs


class CallMemo:
    """What a runner has worked out for calls whose inputs and results have the same shapes, strides, dtypes, device and
    alignment: numbers and launches, for it keeps no tensor of a caller. None before the runner says so.

    tokens, pages: of their q and kv_cache.
    """

    __slots__ = ("layout", "pages", "tokens")

    def __init__(self, tokens: int = 0, pages: int = 0) -> None:
        self.layout: Any = None
        self.tokens, self.pages = tokens, pages


class DecodeInputs(NamedTuple):
    """One layer's inputs of a decode step.

    memo: the same one for calls that are alike, if they are told apart; capturing: what `in_capture` answers, if the
    caller has asked torch already.
    """

    q: Tensor  # [tokens, heads, latent + rope]
    kv_cache: Tensor  # [pages, page_size, row_width], any outer strides
    memo: CallMemo | None = None
    capturing: bool | None = None

    @property
    def remembered(self) -> Any:
        """What a runner has worked out for calls like this one; None before, or where they are not told apart."""
        return None if self.memo is None else self.memo.layout

    def remember(self, layout: object) -> None:
        """For the calls that are like this one."""
        if self.memo is not None:
            self.memo.layout = layout

    def in_capture(self) -> bool:
        """Whether a graph captures this call."""
        if self.capturing is None:
            return is_capturing(self.q)
        return self.capturing


@dataclass(frozen=True)
class PrefillInputs:
    """One layer's inputs of a prefill: per-head keys and values of ragged sequences, one after another.

    Sequence i has the query tokens [cu_seqlens_q[i], cu_seqlens_q[i + 1]) of q and the keys [cu_seqlens_k[i],
    cu_seqlens_k[i + 1]) of k_nope, k_pe and v. Both start at 0 and never decrease; a sequence may have no tokens, no
    keys, or more query tokens than keys. Tensors may end past the last sequence: such rows of q are padding, such keys
    belong to nobody and may hold anything. k_nope and v are usually views of one projection, k_pe of a latent cache
    row: outer strides are any, last dimensions are dense.

    causal: query token i of n sees keys <= kv_len - n + i of its sequence; without it, all of them.
    """

    q: Tensor  # [tokens, heads, nope + rope]
    k_nope: Tensor  # [keys, heads, nope], q's dtype
    k_pe: Tensor  # [keys, rope], q's dtype, shared by all heads
    v: Tensor  # [keys, heads, v_dim], q's dtype
    cu_seqlens_q: Tensor  # [sequences + 1] int32
    cu_seqlens_k: Tensor  # [sequences + 1] int32
    causal: bool = True

    @property
    def sequences(self) -> int:
        """Sequences of this call, at most the request's capacity.max_batch."""
        return self.cu_seqlens_q.shape[0] - 1


class Backend(Protocol):
    """A stateless provider of one implementation."""

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Why this machine's software cannot run it (a missing, old or broken package); empty if it can."""
        ...

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        """Every reason why it cannot serve `request`, each quoting what it needs and what it got; pure."""
        ...

    def needs(self, request: Request) -> Needs:
        """The metadata forms that its runner reads in a decode; only those are built."""
        ...

    def bind(self, request: Request) -> Runner | PrefillRunner:
        """A runner of the request's phase for every step that fits `request`; allocates what outlives a step."""
        ...


@runtime_checkable
class LibraryBackend(Backend, Protocol):
    """A backend whose kernels come from a library that is imported when it is about to be chosen, and not before."""

    def reasons_not_loadable(self) -> tuple[str, ...]:
        """Import the library, once: why that fails, or what the calls it offers lack; empty if it can serve."""
        ...


class Runner(Protocol):
    """A backend bound to one decode request; owns what outlives a step."""

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


class PrefillRunner(Protocol):
    """A backend bound to one prefill request. It needs no plan: lengths are read on the device, call by call."""

    @property
    def graph_safe(self) -> bool:
        """Whether run reads no value on the host, so that a graph may capture it."""
        ...

    def memory(self) -> dict[str, int]:
        """Device bytes that outlive a call, by part."""
        ...

    def run(self, inputs: PrefillInputs, out: Tensor, lse: Tensor, *, softmax_scale: float) -> None:
        """Attend once.

        out: [tokens, heads, v_dim] in q's dtype, or float32 where request.float32_out; lse: [tokens, heads] float32,
        natural log. Any outer strides. Rows with nothing to see, and rows past the last query token, become 0 and
        -inf. Offsets that contradict one another or the tensors leave wrong rows, but touch no memory outside them.
        """
        ...


def decode_runner(backend: Backend, request: Request) -> Runner:
    """The backend bound to a decode request."""
    assert request.phase is Phase.decode
    return cast(Runner, backend.bind(request))


def prefill_runner(backend: Backend, request: Request) -> PrefillRunner:
    """The backend bound to a prefill request."""
    assert request.phase is Phase.prefill
    return cast(PrefillRunner, backend.bind(request))
