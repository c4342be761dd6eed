"""How metadata kernels read the lengths of a batch.

They pass them on as `lens`: kv_lens_ptr, query_lens_ptr or None, requests, longest kv_len and query_len allowed, most
query tokens counted of one request.
"""

import triton
import triton.language as tl


@triton.jit
def load_lens(lens, request, exists):
    """kv_len and query_len of each request as given, 0 for those that do not exist."""
    kv_len = tl.load(lens[0] + request, mask=exists, other=0)
    if lens[1] is None:  # noqa: SIM108 (the compiler takes one branch)
        query_len = tl.where(exists, lens[4], 0)
    else:
        query_len = tl.load(lens[1] + request, mask=exists, other=0)
    return kv_len, query_len
