"""Pairs: fp8 values that are loaded two at a time, as an int16, and become float16 in the operands of products.

A pair is adjacent columns of one key. As 16 bits it takes the road of bfloat16 from shared memory to the operands of
both products, in registers (ldmatrix, transposed for the second), which bytes cannot: they were loaded one at a time.
One instruction then converts two e4m3 values to float16, which holds each of them exactly.
"""

import triton
import triton.language as tl

# Two keys' pairs become their even columns and their odd ones
SPLIT_PAIRS = tl.constexpr(
    "{ .reg .b32 both; .reg .b16 even, odd; prmt.b32 both, $2, 0, 0x3120; mov.b32 {even, odd}, both;"
    " cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd; }"
)


@triton.jit
def split_pairs(pairs):
    """Even and odd columns in float16 of pairs of e4m3 values."""
    return tl.inline_asm_elementwise(
        SPLIT_PAIRS, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


@triton.jit
def split_columns(values):
    """Even and odd columns."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.split(tl.reshape(values, [ROWS, values.shape[1] // 2, 2]))


@triton.jit
def join_columns(even, odd):
    """What `split_columns` splits."""
    ROWS: tl.constexpr = even.shape[0]
    return tl.reshape(tl.join(even, odd), [ROWS, even.shape[1] * 2])


@triton.jit
def _split_halves(values):
    ROWS: tl.constexpr = values.shape[0]
    return tl.split(tl.permute(tl.reshape(values, [ROWS, 2, values.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _join_halves(first, second):
    ROWS: tl.constexpr = first.shape[0]
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [ROWS, first.shape[1] * 2])


@triton.jit
def split_quarters(values):
    """The columns in four runs."""
    first, second = _split_halves(values)
    a, b = _split_halves(first)
    c, d = _split_halves(second)
    return a, b, c, d


@triton.jit
def join_quarters(a, b, c, d):
    """What `split_quarters` splits."""
    return _join_halves(_join_halves(a, b), _join_halves(c, d))


@triton.jit
def query_units(q_latent, q_rope):
    """A power of two for each row, and its inverse: over it, the row's largest magnitude is in [1, 2).

    So float16 holds every digit of bfloat16 values down to 2^-17 of the largest, and 2^-24 of it is the last place.
    """
    latent, rope = tl.abs(q_latent.to(tl.float32)), tl.abs(q_rope.to(tl.float32))
    largest = tl.maximum(tl.max(latent, 1), tl.max(rope, 1))
    power = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    inverse = (254 << 23) - power
    return power.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)
