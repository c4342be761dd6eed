"""Device side of the status words."""

import triton
import triton.language as tl

NO_FAULT = tl.constexpr(2**63 - 1)
PAGE_ID = tl.constexpr(0)
KV_LEN = tl.constexpr(1)
QUERY_LEN = tl.constexpr(2)
QUERY_TOKENS = tl.constexpr(3)


@triton.jit
def report_fault(status_ptr, FAULT: tl.constexpr, request, value, faulty):
    """Keep the first faulty request, and the smallest of its values, in the status word of this kind of fault."""
    word = (request.to(tl.int64) << 32) | (value.to(tl.int64) & 0xFFFFFFFF)
    word = tl.min(tl.where(faulty, word, NO_FAULT), 0)
    if word != NO_FAULT:
        tl.atomic_min(status_ptr + FAULT, word)
