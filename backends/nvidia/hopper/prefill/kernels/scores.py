"""Scores, softmax and results of one block of the sm90 prefill kernel: layouts, Q K^T, masks, row statistics, and what
lies behind the keys."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language import core

from portable_mla.backends.nvidia.hopper.kernels.ptx import multiply, opaque, synchronize
from portable_mla.backends.nvidia.hopper.kernels.softmax import normaliser, rounding_gain
from portable_mla.backends.nvidia.hopper.prefill.kernels.shared_memory import BOX, HALF
from portable_mla.backends.triton.decode.kernels.decode import LN_2


@gluon.constexpr_function
def accumulator(columns):
    """The layout of 64 rows that wgmma sums into."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def wide(columns):
    """The accumulator after exchanges between neighbouring lanes: each holds 8 columns, 16 bytes of a row of out."""
    bases = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]]
    return gl.DistributedLinearLayout(
        reg_bases=[base for base in bases if base[1] < columns],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )


@core.extern
def settle(value, count, _semantic=None):
    """The values, the first of each `count` of a thread computed before what follows: ptxas moves waits for wgmma over
    arithmetic, but not over a barrier. This one is arrived at for a NaN that no arithmetic makes: it has a payload."""
    count = int(getattr(count, "value", count))
    moves = " ".join(f"mov.b32 ${index}, ${count + index};" for index in range(count))
    return core.inline_asm_elementwise(
        f"{{ .reg .pred p; setp.eq.b32 p, ${count}, 0x7F80DEAD; @p bar.arrive 15, 256; {moves} }}",
        ",".join(["=f"] * count + ["f"] * count), [value], dtype=core.float32, is_pure=False, pack=count,
        _semantic=_semantic,
    )  # fmt: skip


@gluon.jit
def score(room, stage, BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr):
    """Q K^T, left in flight."""
    half = opaque(0) + WARPGROUP
    scores = gl.zeros([HALF, BLOCK_N], gl.float32, accumulator(BLOCK_N))
    for part in gl.static_range(len(room.query)):
        keys = room.keys[part].index(stage).permute((1, 0))
        scores = warpgroup_mma(room.query[part].index(half), keys, scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def row_maxima(scores, BLOCK_N: gl.constexpr):
    """In chains of every fourth value of a thread: one chain of all would wait for each comparison."""
    highest = gl.max(gl.max(scores.reshape([HALF, BLOCK_N // 8, 8]), 1), 1)
    return gl.convert_layout(highest, gl.SliceLayout(1, accumulator(BLOCK_N)))


@gluon.jit
def partial_sums(weights, BLOCK_N: gl.constexpr):
    """[64, 8]: what each thread has of a row, left to be summed across lanes when the item ends."""
    return gl.convert_layout(gl.sum(weights.reshape([HALF, BLOCK_N // 8, 8]), 1), accumulator(8))


@gluon.jit
def mask(scores, position, item, BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr):
    """-inf where a row does not see the key."""
    layout: gl.constexpr = accumulator(BLOCK_N)
    key = position + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    row = gl.arange(0, HALF, gl.SliceLayout(1, layout))
    end = item.key_len + gl.zeros_like(row)
    if CAUSAL:
        end = gl.minimum(item.sees + WARPGROUP * HALF + row, item.key_len)
    return gl.where(key[None, :] < end[:, None], scores, gl.full_like(scores, float("-inf")))


@gluon.jit
def zero_tail(values, valid, BLOCK_N: gl.constexpr, V_DIM: gl.constexpr):
    """Zero the rows from `valid` on: they may hold NaN, and 0 times NaN is NaN. Both warpgroups do it, each in time
    for its own products; what the other still reads or writes there is the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    for box in gl.static_range(V_DIM // BOX):
        part = values.slice(box * BOX, BOX, 1)
        value = part.load(layout)
        part.store(gl.where((row < valid)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    synchronize()


@gluon.jit
def _is_suspect(acc, norm, item, V_DIM: gl.constexpr, WARPGROUP: gl.constexpr):
    """Whether any row of the warpgroup has a value that is not finite and a sum that is."""
    row = WARPGROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, accumulator(V_DIM)))
    infinite = gl.sum(acc * 0.0, 1) != 0.0  # NaN, if anything is
    return gl.max((infinite & (norm == norm) & (row < item.rows)).to(gl.int32), 0) > 0


@gluon.jit
def store(
    acc, level, largest, row_sum, scale, item, results, DTYPE: gl.constexpr, CAUSAL: gl.constexpr, V_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Normalises and writes the rows that the item has. Whether a row's values are not finite though its sum is, which
    `mend_rows` then looks into."""
    layout: gl.constexpr = wide(V_DIM)
    log2_level = multiply(level, scale)
    gain = rounding_gain(largest, level, scale, DTYPE)
    norm = normaliser(level, row_sum, gain, scale, DTYPE)
    acc_norm = gl.convert_layout(norm, gl.SliceLayout(1, accumulator(V_DIM)))
    acc = acc * acc_norm[:, None]
    suspect = False
    if CAUSAL:
        suspect = _is_suspect(acc, acc_norm, item, V_DIM, WARPGROUP)
    out = gl.convert_layout(acc.to(results.out_ptr.dtype.element_ty), layout)
    row = WARPGROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    column = gl.arange(0, V_DIM, gl.SliceLayout(0, layout))
    token = item.first_row + row
    out_row = token.to(gl.int64) * results.stride_out_token + item.head.to(gl.int64) * results.stride_out_head
    gl.store(results.out_ptr + out_row[:, None] + column[None, :].to(gl.int64), out, mask=(row < item.rows)[:, None])
    row = WARPGROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, accumulator(BLOCK_N)))
    token = item.first_row + row
    # opaque: widened once for all items, the strides would be spilled through the loop over keys
    lse_row = token.to(gl.int64) * opaque(results.stride_lse_token)
    lse_row += item.head.to(gl.int64) * opaque(results.stride_lse_head)
    empty = row_sum == 0.0
    log2_sum = log2_level + gl.log2(gl.where(empty, gl.full_like(row_sum, 1.0), row_sum))
    lse = gl.where(empty, gl.full_like(row_sum, float("-inf")), log2_sum * LN_2)
    gl.store(results.lse_ptr + lse_row, lse, mask=row < item.rows)
    return suspect
