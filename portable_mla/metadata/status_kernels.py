"""Device side of the status words."""

import triton
import triton.language as tl

from portable_mla.metadata import status

NO_FAULT = tl.constexpr(status.NO_FAULT)
PAGE_ID = tl.constexpr(int(status.Fault.page_id))
KV_LEN = tl.constexpr(int(status.Fault.kv_len))
QUERY_LEN = tl.constexpr(int(status.Fault.query_len))
QUERY_TOKENS = tl.constexpr(int(status.Fault.query_tokens))
SLOT = tl.constexpr(int(status.Fault.slot))
POSITION = tl.constexpr(int(status.Fault.position))
KV_SCALE = tl.constexpr(int(status.Fault.kv_scale))


@triton.jit
def report_fault(status_ptr, FAULT: tl.constexpr, request, value, faulty):
    """Keep the first faulty request, and the smallest of its values, in the status word of this kind of fault."""
    word = (request.to(tl.int64) << 32) | (value.to(tl.int64) & 0xFFFFFFFF)
    word = tl.min(tl.where(faulty, word, NO_FAULT), 0)
    if word != NO_FAULT:
        tl.atomic_min(status_ptr + FAULT, word)
