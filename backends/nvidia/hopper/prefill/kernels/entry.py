"""Prefill on Hopper: ragged attention in the expanded form, two warpgroups of 64 query rows and two warps that load.

A program takes items, 128 query rows of one head, off a queue, and walks their blocks of keys from the last to the
first, so that the end of the keys and the diagonal are met first. Within a warpgroup the next block's Q K^T is issued
before this block's P V, and both run under this block's softmax; the two warpgroups take turns at issuing, so that one
computes its softmax while the other's products run. The schedule is FlashAttention-3's (Shah et al., 2024).

Decisions, in TFLOP/s of an H100 80GB HBM3 at (sequences x tokens x heads), causal, 128 + 64 and 128, bf16, Triton
3.6.0. Bursts of 8 ms after 0.1 s of rest: at full load the chip throttles, and figures of one kernel vary by 10 %.
- A queue instead of a fixed share of the items: predicted to even out items of unequal length. In single runs, under
  throttling: 1x16384x16 558 -> 676, 1x8192x128 460 -> 670. Kept.
- Turns: predicted 3 to 5 %. 4x2048x128 636 -> 651, 1x16384x128 805 -> 808. Kept.
- Where P V is waited for (settle): ptxas puts the wait before the softmax, 1x16384x16 789; behind the row maxima 809;
  in the middle of the exponentials 810; behind all of them, before the changes below, 759 where the maxima gave 794.
- A warp for values alone, so that keys do not wait until values may be overwritten; not measured by itself. Kept.
- The rope part of Q in registers: predicted 1 % of shared memory's time. 1x16384x16 794 -> 797, and after the changes
  below 784 -> 781, 1x4096x128 731 -> 726. Dropped.
- Rescaling acc behind the next Q K^T (LATE): predicted 3 %. Lost 1 % alone, 1x16384x16 800 -> 794, and is part of
  the best measured set; instead of it, levels as in the decode (kernels/softmax.py): 1x8192x128 760 -> 748.
- Levels where V is 256 wide: predicted 2 to 3 %. 192+64 and 256+0, 1x8192x64 729 -> 781 and 737 -> 785. Kept there.
- Maxima and sums in four chains, sums across lanes once an item: predicted 2 %. 1x16384x16 800 -> 799. Kept with LATE:
  both, and the wait in the middle, 805.
- The first scores of an item run while the one before is stored (AHEAD): predicted 1 %. 1x16384x16 805 -> 810. Kept.
- The next item is looked up before the last block's keys are asked for: 4x2048x128 643 -> 651. Kept.
- Heads whose keys and values are 20 MiB together, not 32: 1x4096x128 732 -> 738, 4x2048x128 651 -> 657; 14 MiB 718.
- Scores scaled before the maximum is subtracted, so that equal logits weigh the same however large they are: predicted
  to cost up to 1 %, cost 6 to 10 %. Dropped for one fused operation a score, and a factor a row: see
  kernels/softmax.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.hopper.kernels.ptx import publish_barriers
from portable_mla.backends.nvidia.hopper.prefill.kernels.consumers import attend_items
from portable_mla.backends.nvidia.hopper.prefill.kernels.producers import load_queries_and_keys, load_values
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import (
    PrefillResults,
    PrefillSource,
    PrefillWork,
    new_prefill_room,
    publish_addresses,
)
from portable_mla.backends.triton.decode.kernels.decode import LOG2_E


@gluon.jit(
    do_not_specialize=[
        "softmax_scale", "batch", "tokens", "keys", "slots", "heads", "head_group", "stride_q_token",
        "stride_k_token", "stride_pe_token", "stride_v_token", "stride_q_head", "stride_k_head", "stride_v_head",
        "stride_lse_token", "stride_lse_head",
    ]
)  # fmt: skip
def sm90_prefill_kernel(
    q_desc,  # of q as [tokens, heads * (NOPE + ROPE)], box [64, 64]; here and below a head's columns may be wider apart
    q_rope_desc,  # the same, box [64, ROPE]
    k_nope_desc,  # of k_nope as [keys, heads * NOPE], box [BLOCK_N, 64]
    k_pe_desc,  # of k_pe [keys, ROPE], box [BLOCK_N, ROPE]; anything where ROPE is 0
    v_desc,  # of v as [keys, heads * V_DIM], box [BLOCK_N, 64]
    cu_seqlens_q_ptr,  # [batch + 1] int32
    cu_seqlens_k_ptr,  # [batch + 1] int32
    counter_ptr,  # one int32, 0 before and after each launch
    out_ptr,  # [tokens, heads, V_DIM]
    lse_ptr,  # [tokens, heads] float32, natural log
    softmax_scale,  # positive
    batch,
    tokens,
    keys,
    slots,  # tokens // 128 + batch + 1
    heads,
    head_group,  # heads whose keys and values fit L2
    q_ptr,  # what the descriptors describe
    k_nope_ptr,
    k_pe_ptr,
    v_ptr,
    stride_q_token,
    stride_k_token,
    stride_pe_token,
    stride_v_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_lse_token,
    stride_lse_head,
    NOPE: gl.constexpr,
    ROPE: gl.constexpr,
    V_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LATE: gl.constexpr,  # acc is rescaled behind the next block's Q K^T
    AHEAD: gl.constexpr,  # an item's first scores are computed while the one before is stored
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """Attention of every sequence's queries over its keys, and 0 and -inf for rows behind the last sequence.

    grid: at most slots * heads programs.
    """
    room = new_prefill_room(q_desc.dtype, BLOCK_N, NOPE, ROPE, V_DIM)
    publish_barriers()
    if CAUSAL:
        pointers = (q_ptr, k_nope_ptr, k_pe_ptr, v_ptr)
        strides = (stride_q_token, stride_k_token, stride_pe_token, stride_v_token)
        publish_addresses(room, pointers + strides + (stride_q_head, stride_k_head, stride_v_head))
    work = PrefillWork(cu_seqlens_q_ptr, cu_seqlens_k_ptr, counter_ptr, batch, tokens, keys, slots, heads, head_group)
    source = PrefillSource(
        q_desc, q_rope_desc, k_nope_desc, k_pe_desc, v_desc, stride_q_head, stride_k_head, stride_v_head
    )
    results = PrefillResults(out_ptr, lse_ptr, stride_out_token, stride_out_head, stride_lse_token, stride_lse_head)
    scale = softmax_scale * LOG2_E
    gl.warp_specialize(
        [
            (attend_items, (room, results, scale, gl.constexpr(0), CAUSAL, BLOCK_N, NOPE, ROPE, V_DIM, LATE, AHEAD)),
            (attend_items, (room, results, scale, gl.constexpr(1), CAUSAL, BLOCK_N, NOPE, ROPE, V_DIM, LATE, AHEAD)),
            (load_queries_and_keys, (room, work, source, CAUSAL, BLOCK_N, NOPE, ROPE)),
            (load_values, (room, source, BLOCK_N, V_DIM)),
        ],
        [4, 1, 1],
        [REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )
