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
CONTEXT_LEN = tl.constexpr(int(status.Fault.context_len))


@triton.jit
def report_fault(status_ptr, FAULT: tl.constexpr, request, value, faulty):
    """Keep the first faulty request, and the smallest of its values, in the status word of this kind of fault."""
    word = (request.to(tl.int64) << 32) | (value.to(tl.int64) & 0xFFFFFFFF)
    word = tl.min(tl.where(faulty, word, NO_FAULT), 0)
    if word != NO_FAULT:
        tl.atomic_min(status_ptr + FAULT, word)


@triton.jit
def load_kv_scale(kv_scale_ptr):
    """The per-tensor scale of a cache; NaN unless it is positive and finite."""
    kv_scale = tl.load(kv_scale_ptr)
    return tl.where((kv_scale > 0.0) & (kv_scale < float("inf")), kv_scale, float("nan"))


@triton.jit
def report_kv_scale(kv_scale_ptr, status_ptr, reports):
    """A fault, if this program reports, unless the scale, if there is one, is positive and finite. For a decode's end:
    in front of its loop it cost sm80 36 spills in the loop."""
    if kv_scale_ptr is not None and status_ptr is not None:
        kv_scale = tl.load(kv_scale_ptr, volatile=True)
        one = tl.arange(0, 1)
        right = (kv_scale > 0.0) & (kv_scale < float("inf"))
        bits = kv_scale.to(tl.int32, bitcast=True) + one
        report_fault(status_ptr, KV_SCALE, one, bits, one == tl.where(reports & (right == 0), 0, 1))
