"""The order in which programs are dealt over a GPU."""

import triton
import triton.language as tl


@triton.jit
def grouped_program_id(NUM_XCDS: tl.constexpr):
    """Program index under which neighbours share an L2: AMD deals consecutive workgroups over its XCDs in turn."""
    pid = tl.program_id(0)
    if NUM_XCDS == 1:
        return pid
    programs = tl.num_programs(0)
    per_xcd = programs // NUM_XCDS
    longer = programs % NUM_XCDS
    xcd = pid % NUM_XCDS
    return xcd * per_xcd + tl.minimum(xcd, longer) + pid // NUM_XCDS
