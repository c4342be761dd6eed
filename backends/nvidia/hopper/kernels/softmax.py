"""The softmax of the Hopper kernels: weights in one fused operation a score, and what makes up for its rounding.

A weight is exp2(fma(score, scale, -rounded(row_max * scale))). The product's rounding is common to a row's weights and
to their sum, so it cancels, but it leaves the largest weight beside 1, by up to 2**-8 at logits of 1e5, which the
weight loses when it is rounded for P V and the sum does not. A product that is rounded before the subtraction has no
such error and costs an instruction a score: prefills lost 6 to 10 %. So a row is divided by what the rounding left of
its largest weight instead, once: equal logits weigh the same, however large they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.hopper.kernels.ptx import multiply

MOST_LOG2 = gl.constexpr(8.0)


@gluon.jit
def raise_level(level, largest, scale):
    """What the next weights are relative to: the largest score so far, or an older one while weights stay below 2**8,
    for sums of a level that stays need no rescaling."""
    return gl.where((largest - level) * scale > MOST_LOG2, largest, level)


@gluon.jit
def weigh(scores, log2_max, scale):
    """Weights of unscaled scores relative to a maximum or level that was multiplied by scale and rounded."""
    return gl.exp2(scores * scale - log2_max[:, None])


@gluon.jit
def growth(level, higher, scale):
    """What sums relative to a level are in units of a higher one; both unscaled."""
    return gl.exp2(multiply(level, scale) - multiply(higher, scale))


@gluon.jit
def _kept(level, scale, DTYPE: gl.constexpr):
    """What rounding to DTYPE leaves of the weight of a score that is the level."""
    weight = gl.exp2(level * scale - multiply(level, scale))
    return weight.to(DTYPE).to(gl.float32) / weight


@gluon.jit
def rounding_gain(largest, level, scale, DTYPE: gl.constexpr):
    """What rounding adds to the weight of the largest score, which may be above the level: beside what it leaves of all
    of the level, which `normaliser` knows."""
    weight = gl.exp2(largest * scale - multiply(level, scale))
    return weight.to(DTYPE).to(gl.float32) - weight * _kept(level, scale, DTYPE)


@gluon.jit
def normaliser(level, row_sum, gain, scale, DTYPE: gl.constexpr):
    """What a row's sum of values is multiplied by, 1 for a row that saw no key. gain: `rounding_gain`; DTYPE: what
    weights are rounded to."""
    kept = _kept(level, scale, DTYPE)
    return gl.where(row_sum == 0.0, gl.full_like(row_sum, 1.0), 1.0 / (row_sum * kept + gain))
