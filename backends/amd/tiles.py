"""Decode and prefill tiles of AMD Instinct GPUs, none of which spills on Triton 3.6.0, but for gfx950's fp8_656.

Comments: vector registers (of 512), LDS KB on gfx942 for the widest geometry of the row (Triton 3.6.0).
"""

from dataclasses import replace

from portable_mla.backends.triton.prefill_tile import PrefillRule, PrefillRules, PrefillTile, when_prefill
from portable_mla.backends.triton.tile import FP8, GROUPED, DecodeRules, Rule, Tile, when

# converted late, fp8 takes 437 registers of a narrow tile, early 297
_WIDE = Tile(64, 32, 4, 1, conversion="early", waves_per_eu=1, matrix_instr_nonkdim=16, kpack=2, num_xcds=8)
_MIDDLE = replace(_WIDE, block_h=32, num_stages=2)
_NARROW = replace(_WIDE, block_h=16, num_stages=2)
_SMALL = Tile(16, 32, 4, 2, matrix_instr_nonkdim=16, kpack=2, num_xcds=8)

# Candidates for 16 rows of 512+64, by the compiler alone, on Triton 3.6 and 3.9 (registers with buffer loads, of caches
# up to 2 GiB, and with 64-bit addresses). All warps of a row group score the same keys: four issue 2.6 times the
# products that there are, two 1.5 times. 16x32, two warps, one stage: 355 / 344, 311 / 329 on gfx942, no spills,
# two workgroups a unit; on gfx950 also with two stages (36 KB): 363 / 406, 389 / 379. Predicted by the model (explain
# --estimate) to take 2470 cycles a tile on gfx942, where four warps take 3950: not chosen before it ran on silicon.
# 16x16, four warps, waves_per_eu=2: 214 / 212, 209 / 204, two workgroups; the model has no word on tiles of 16 keys,
# which took twice as long on an H100. 16x32 with waves_per_eu=2 spills (gfx942: 9 / 61, 46 / 53). Dropped.
# 64 rows on gfx950 with two stages: 9 / 83 spilled on 3.6, none on 3.9; 64x64 spills in the loop on both. Dropped.
# 64 KiB of LDS
_GFX942 = (
    # 490 regs, 36 KB; 64x32 spills 62 times in the loop
    Rule(when(formats=GROUPED, rows_above=32), _MIDDLE),
    # 455 regs, 64 KB, 136 16x16x16_bf16; 3.9: 371
    Rule(when(latent_above=256, rows_above=32), _WIDE),
    # 437 regs, 38 KB, 208 16x16x16_bf16; 3.9: 371
    Rule(when(latent_above=256, rows_above=16), _MIDDLE),
    # 348 regs, 36 KB, 264 16x16x16_bf16; 3.9: 310, 4 spilled
    Rule(when(latent_above=256), _NARROW),
    # 362 regs, 32 KB, 216 16x16x16_bf16; 3.9: 317
    Rule(when(latent_above=128, rows_above=32), replace(_SMALL, block_h=64)),
    # 284 regs, 22 KB, 168 16x16x16_bf16; 3.9: 252
    Rule(when(latent_above=128, rows_above=16), replace(_SMALL, block_h=32)),
    # 232 regs, 20 KB, 144 16x16x16_bf16; 3.9: 220
    Rule(when(latent_above=128), replace(_SMALL, programs_per_unit=2)),
    # 320 regs, 20 KB, 216 16x16x16_bf16; 3.9: 301
    Rule(when(rows_above=32), replace(_SMALL, block_h=64, block_n=64)),
    # 256 regs, 24 KB, 168 16x16x16_bf16; 3.9: 246
    Rule(when(rows_above=16), replace(_SMALL, block_h=32, block_n=64)),
    # 208 regs, 20 KB, 144 16x16x16_bf16; 3.9: 207
    Rule(when(), replace(_SMALL, block_n=64, programs_per_unit=2)),
)
# 160 KiB of LDS; kpack has no effect
_GFX950 = (
    # 512 regs, 17 spilled outside the loop, 20 KB; 32x32 spills 8 times in it
    Rule(when(formats=GROUPED), replace(_NARROW, kpack=1)),
    # 397 regs, 32 KB; 64x32 spills 4 times in the loop
    Rule(when(formats=FP8, latent_above=256, rows_above=32), replace(_MIDDLE, kpack=1)),
    *(Rule(rule.when, replace(rule.tile, kpack=1)) for rule in _GFX942[1:]),
)
# one L2 for all compute units of a die
_GFX90A = tuple(Rule(rule.when, replace(rule.tile, kpack=1, num_xcds=1)) for rule in _GFX942)
RULES: dict[str, DecodeRules] = {"gfx90a": _GFX90A, "gfx942": _GFX942, "gfx950": _GFX950}

_PREFILL = PrefillTile(128, 64, 8, 1, matrix_instr_nonkdim=16, kpack=2, num_xcds=8)
# 8 warps, so that two waves fit a SIMD: with 4, 192+64/256 spills in the loop
_PREFILL_GFX942 = (
    # 236 regs, 32 KB, 256 16x16x16_bf16
    PrefillRule(when_prefill(qk_above=192), _PREFILL),
    # 188 regs, 32 KB, 160 16x16x16_bf16
    PrefillRule(when_prefill(qk_above=96), _PREFILL),
    # 256 regs, 16 KB, 160 16x16x16_bf16
    PrefillRule(when_prefill(), replace(_PREFILL, num_warps=4)),
)
_PREFILL_GFX950 = tuple(PrefillRule(rule.when, replace(rule.tile, kpack=1)) for rule in _PREFILL_GFX942)
_PREFILL_GFX90A = tuple(PrefillRule(rule.when, replace(rule.tile, kpack=1, num_xcds=1)) for rule in _PREFILL_GFX942)
PREFILL_RULES: dict[str, PrefillRules] = {
    "gfx90a": _PREFILL_GFX90A,
    "gfx942": _PREFILL_GFX942,
    "gfx950": _PREFILL_GFX950,
}

# AITER's decode kernels that return LSE for rows of 512 + 64, by how the cache is stored: heads -> query tokens.
# Other rows of its table write no LSE, or have open reports of wrong results: see the adapter.
AITER_KERNELS = {
    "gfx942": {"bf16": {16: (1,), 32: (1,), 64: (1,), 128: (1,)}},
    "gfx950": {"bf16": {16: (1,), 32: (1,), 64: (1,), 128: (1,)}},
}
# The same for its persistent kernels, which keep LSE where no request was split in variants of their own alone.
AITER_PERSISTENT_KERNELS = {"gfx950": {"bf16": {32: (1, 2, 3, 4), 64: (1, 2, 3, 4)}}}
