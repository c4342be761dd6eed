"""The softmax of the Hopper kernels: weights in one fused operation a score, and what makes up for its rounding.

A weight is exp2(fma(score, scale, -rounded(row_max * scale))). The product's rounding is common to a row's weights and
to their sum, so it cancels, but it leaves the largest weight beside 1, by up to 2**-8 at logits of 1e5, which the
weight loses when it is rounded for P V and the sum does not. A product that is rounded before the subtraction has no
such error and costs an instruction a score: prefills lost 6 to 10 %. So a row is divided by what the rounding left of
its largest weight instead, once: equal logits weigh the same, however large they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from portable_mla.backends.nvidia.sm90_sync_kernels import multiply


@gluon.jit
def weigh(scores, log2_max, scale):
    """Weights of unscaled scores relative to a maximum that was multiplied by scale and rounded."""
    return gl.exp2(scores * scale - log2_max[:, None])


@gluon.jit
def growth(row_max, higher, scale):
    """What sums relative to row_max are in units of a higher one; both unscaled."""
    return gl.exp2(multiply(row_max, scale) - multiply(higher, scale))


@gluon.jit
def normaliser(row_max, log2_max, row_sum, scale, DTYPE: gl.constexpr):
    """What a row's sum of values is multiplied by, 1 for a row that saw no key. log2_max: row_max, unscaled, multiplied
    by scale and rounded; DTYPE: what weights are rounded to."""
    largest = gl.exp2(row_max * scale - log2_max)
    kept = largest.to(DTYPE).to(gl.float32) / largest
    return gl.where(row_sum == 0.0, gl.full_like(row_sum, 1.0), 1.0 / (row_sum * kept))
