"""Status: wrong lengths and page ids that a kernel met, kept on the device until somebody asks."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from portable_mla.errors import GraphCaptureError

NO_FAULT = 2**63 - 1


class Fault(IntEnum):
    """Kinds of fault; the value is the index of the kind's status word."""

    page_id = 0
    kv_len = 1
    query_len = 2
    query_tokens = 3
    slot = 4
    position = 5
    kv_scale = 6
    context_len = 7


@dataclass(frozen=True)
class Limits:
    """What is allowed, for the message."""

    max_pages: int
    max_context: int
    max_query_len: int
    max_query_tokens: int


@dataclass(frozen=True)
class Status:
    """One sticky word a kind of fault. Kernels only ever lower a word, so that the first faulty request stays; writing
    it needs no sync and works in captured graphs.

    words: [8] int64, NO_FAULT or `request << 32 | value & 0xffffffff`; of slots and positions, a token's index is in
    the request's place; of a kv_scale the value is the bits of its float32.
    """

    words: Tensor

    @classmethod
    def allocate(cls, device: torch.device) -> Status:
        """Words without a fault."""
        return cls(torch.full((len(Fault),), NO_FAULT, dtype=torch.int64, device=device))

    def check(self, limits: Limits) -> None:
        """Wait for the device, all of its streams, and forget and raise what it met since the last check.

        Raises IndexError naming the request, the value and what is allowed, of every kind of fault, and
        GraphCaptureError in a capture, which cannot wait.
        """
        if self.words.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                raise GraphCaptureError("check() waits for the device", hint="Check after a replay")
            torch.cuda.synchronize(self.words.device)
        found = self.words.clone()
        words = found.tolist()
        if all(word == NO_FAULT for word in words):
            return
        # What another stream reports from now on stays.
        self.words.copy_(torch.where(self.words == found, NO_FAULT, self.words))
        faults = [describe(Fault(kind), word, limits) for kind, word in enumerate(words) if word != NO_FAULT]
        raise IndexError(f"{'; '.join(faults)}. Rows that need them are NaN")


def describe(fault: Fault, word: int, limits: Limits) -> str:
    """One fault in words."""
    request, value = word >> 32, word & 0xFFFFFFFF
    value -= (value >> 31) << 32
    messages = {
        Fault.page_id: f"block_table: request {request}: expected a page in [0, {limits.max_pages}), got {value}",
        Fault.kv_len: f"kv_lens: request {request}: expected 0 to {limits.max_context}, got {value}",
        Fault.query_len: (
            f"query_lens: request {request}: expected 0 to {limits.max_query_len}, that is max_query_len, got {value}"
        ),
        Fault.query_tokens: (
            f"query_lens: request {request}: its query tokens end at {value}, "
            f"past q or past max_query_tokens {limits.max_query_tokens}"
        ),
        Fault.slot: f"slots: token {request}: expected -1 or a slot of the {limits.max_pages} pages, got {value}",
        Fault.position: f"positions: token {request}: expected a row of cos_sin, got {value}",
        Fault.kv_scale: f"kv_scale: expected a positive finite float, got {_float_of(value)}",
        Fault.context_len: (
            f"context: sequence {request}: expected at least 0 cached tokens, within the bounds that were given "
            f"(max_len, max_tokens), got {value}"
        ),
    }
    return messages[fault]


def _float_of(bits: int) -> float:
    """The float32 of these bits, as a signed number."""
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return value
