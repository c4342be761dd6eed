"""Keys of one tile as the decode kernel attends to them: loaded by pointer, and dequantised."""

import triton
import triton.language as tl

from portable_mla.core import cache_format
from portable_mla.runtime.kernels.float8 import float8_values

GROUP = tl.constexpr(cache_format.GROUP)


@triton.jit
def load_key(kv_ptr, offset, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of one tile's rows, zeros where they are not valid. offset: of each row."""
    column = FIRST + tl.arange(0, WIDTH)
    return tl.load((kv_ptr + offset)[:, None] + column[None, :], mask=valid[:, None], other=0.0)


@triton.jit
def dequantise(stored, dtype: tl.constexpr, FLOAT8: tl.constexpr):
    """Stored values in another dtype, without a scale: exact. Through float32, since from float16 to bfloat16, which
    the compiler would take, Hopper converts a value at a time (F2F), and from float32 two (F2FP)."""
    if FLOAT8 is None:
        return stored.to(dtype)
    elif FLOAT8 == "hardware":
        return stored.to(tl.float32).to(dtype)
    else:
        return float8_values(stored, FLOAT8 == "e4m3fnuz").to(dtype)


@triton.jit
def load_stored(kv_ptr, offset, valid, WIDTH: tl.constexpr, FLOAT8: tl.constexpr, GROUPED: tl.constexpr):
    """The first WIDTH latents of rows as they are stored, in a dtype that `dequantise` takes."""
    if GROUPED and FLOAT8 == "hardware":
        kv_ptr = kv_ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    return load_key(kv_ptr, offset, valid, 0, WIDTH)


@triton.jit
def load_latent(
    kv_ptr, offset, valid, dtype: tl.constexpr, LATENT: tl.constexpr, BLOCK_N: tl.constexpr, FLOAT8: tl.constexpr,
    GROUPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Latents of one tile, each group times its scale where rows carry them, else without the scale of the tensor."""
    stored = load_stored(kv_ptr, offset, valid, LATENT, FLOAT8, GROUPED)
    if GROUPED:
        latent = dequantise(stored, tl.float32, FLOAT8)
        group_ptr = (kv_ptr + LATENT).to(tl.pointer_type(tl.float32), bitcast=True)
        scales = load_key(group_ptr, offset // 4, valid, 0, LATENT // GROUP)
        groups = tl.reshape(latent, [BLOCK_N, LATENT // GROUP, GROUP]) * scales[:, :, None]
        return tl.reshape(groups.to(dtype), [BLOCK_N, LATENT])
    elif EARLY:
        # a factor by row keeps the compiler from moving the conversion behind the copy to shared memory
        values = dequantise(stored, tl.float32, FLOAT8)
        return (values * tl.where(valid, 1.0, 0.0)[:, None]).to(dtype)
    else:
        return dequantise(stored, dtype, FLOAT8)


@triton.jit
def load_rope(
    kv_ptr, offset, valid, dtype: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, FLOAT8: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Rope values of one tile: bfloat16 behind the scales where rows carry those, else stored like the latents."""
    if GROUPED:
        rope_ptr = (kv_ptr + LATENT + LATENT // GROUP * 4).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        return load_key(rope_ptr, offset // 2, valid, 0, ROPE).to(dtype)
    else:
        return dequantise(load_key(kv_ptr, offset, valid, LATENT, ROPE), dtype, FLOAT8)
