"""Which of AITER's decode kernels serve on which architecture."""

# AITER's decode kernels that return LSE for rows of 512 + 64, by how the cache is stored: heads -> query tokens.
# Other rows of its table write no LSE, or have open reports of wrong results: see the adapter.
AITER_KERNELS = {
    "gfx942": {"bf16": {16: (1,), 32: (1,), 64: (1,), 128: (1,)}},
    "gfx950": {"bf16": {16: (1,), 32: (1,), 64: (1,), 128: (1,)}},
}
# The same for its persistent kernels, which keep LSE where no request was split in variants of their own alone.
AITER_PERSISTENT_KERNELS = {"gfx950": {"bf16": {32: (1, 2, 3, 4), 64: (1, 2, 3, 4)}}}
