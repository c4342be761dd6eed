"""Decode and prefill tiles of AMD Instinct GPUs, none of which spills on Triton 3.6.0, but for gfx950's fp8_656, and 2
registers of gfx90a's fp8, outside the loop.

Comments: vector registers (of 512), LDS KB on gfx942 for the widest geometry of the row (Triton 3.6.0).
"""

from dataclasses import replace

from portable_mla.backends.triton.backend import TritonBackend
from portable_mla.backends.triton.config.decode import FP8, GROUPED, DecodeRules, Rule, Tile, when
from portable_mla.backends.triton.config.prefill import PrefillRule, PrefillRules, PrefillTile, when_prefill

# converted late, fp8 takes 437 registers of a narrow tile, early 297
_WIDE = Tile(64, 32, 4, 1, conversion="early", waves_per_eu=1, matrix_instr_nonkdim=16, kpack=2, num_xcds=8)
_MIDDLE = replace(_WIDE, block_h=32, num_stages=2)
_NARROW = replace(_WIDE, block_h=16, num_stages=2)
# two workgroups a unit
_TWICE = replace(_NARROW, num_warps=2, num_stages=1, programs_per_unit=2)
_SMALL = Tile(16, 32, 4, 2, matrix_instr_nonkdim=16, kpack=2, num_xcds=8)

# Chosen by the model (explain --estimate) of candidates that do not spill in the loop on Triton 3.6 and 3.9: rows 16 to
# 64, keys 16 to 64, 2 to 8 warps, 1 to 3 stages, waves_per_eu 0 to 2; none ran on silicon. "model: a -> b us" is the
# geometric mean over seven shapes of 1 to 128 requests and 1k to 82k tokens, from the tile before to the one named.
# 16 rows, gfx942: 16x32, four warps, two stages -> 16x32, two warps, one stage. Model: 46.2 -> 47.8 us, of which all is
# partial results of twice as many parts; two workgroups a unit hide one another's latency, of which the model has no
# word, and score a key twice instead of four times, 2470 cycles a tile instead of 3950. Kept, for its occupancy of 2.
# 16 rows, gfx950: the same, with two stages. Model: 33.3 -> 34.5 us. Kept for the same reason.
# 16 rows, fp8 with one scale: the same tiles. The model has no fp8; its cycles of a tile, over half as many bytes, are
# what four warps would wait for: 101 us of (128, 16, 4096) on gfx942, two 63, memory 75. Kept.
# 16 rows: 16x32, two warps, two stages on gfx942 has room for one workgroup, two SIMDs idle. Model: 46.2 -> 45.7 us;
# 16x16, four warps, which the model is twice too fast for: 48.4 us; waves_per_eu=2 with four warps spills. Dropped.
# 32 rows: 16x32, two warps, two workgroups. Model: gfx942 44.5 -> 42.9 us, gfx950 31.3 -> 30.7 us, if both row tiles
# find a key in L2, which the model takes for granted: dropped.
# 64 rows of 64 heads, gfx942: 32x32, two warps. Model: 58.3 -> 57.0 us, but 314 -> 331 us at (64, 64, 16384). Dropped.
# 64 rows of 128 heads, gfx942: 64x16 is 79.7 -> 78.8 us for a model that is twice too fast for 16 keys. Dropped.
# 64 rows, gfx950: 64x32 is the model's choice, 39.0 us for 64 heads and 47.4 us for 128 (32x32: 39.5, 61.3); with two
# stages it spills 9 to 83 registers on 3.6, and 64x64, 39.0 and 47.4 us, spills 40 on it. Dropped.
# fp8_656, gfx950, 16 rows: 16x32, four warps, two stages spills 18 registers outside the loop on 3.6, 127 and in it on
# 3.9; with one stage 25, and 51, once in it; 16x16 none (406, 392), of which the model has no word. Left as it was.
_UNGROUPED = (
    # 455 regs, 64 KB, 136 16x16x16_bf16; 3.9: 371
    Rule(when(latent_above=256, rows_above=32), _WIDE),
    # 437 regs, 38 KB, 208 16x16x16_bf16; 3.9: 371
    Rule(when(latent_above=256, rows_above=16), _MIDDLE),
    # 355 regs, 32 KB, 104 16x16x16_bf16; 3.9: 329; fp8: 448, 32 KB; 3.9: 384
    Rule(when(latent_above=256), _TWICE),
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
# 64 KiB of LDS
_GFX942 = (
    # 490 regs, 36 KB; 64x32 spills 62 times in the loop
    Rule(when(formats=GROUPED, rows_above=16), _MIDDLE),
    # 394 regs, 36 KB; two warps spill 2 registers with two stages, 156 with one
    Rule(when(formats=GROUPED), _NARROW),
    *_UNGROUPED,
)


def _on_gfx950(tile: Tile) -> Tile:
    """160 KiB hold two stages of two workgroups, 407 registers, fp8 473; 3.9: 389, 447. kpack has no effect."""
    return replace(tile, kpack=1, num_stages=2 if tile is _TWICE else tile.num_stages)


_GFX950 = (
    # 512 regs, 17 spilled outside the loop, 20 KB; 32x32 spills 8 times in it
    Rule(when(formats=GROUPED), replace(_NARROW, kpack=1)),
    # 397 regs, 32 KB; 64x32 spills 4 times in the loop
    Rule(when(formats=FP8, latent_above=256, rows_above=32), replace(_MIDDLE, kpack=1)),
    *(Rule(rule.when, _on_gfx950(rule.tile)) for rule in _UNGROUPED),
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
    # 226 regs, 16 KB, 224 16x16x16_bf16; left alone, the compiler takes 284, with which one wave fits
    PrefillRule(when_prefill(), replace(_PREFILL, num_warps=4, waves_per_eu=2)),
)
_PREFILL_GFX950 = tuple(PrefillRule(rule.when, replace(rule.tile, kpack=1)) for rule in _PREFILL_GFX942)
_PREFILL_GFX90A = tuple(PrefillRule(rule.when, replace(rule.tile, kpack=1, num_xcds=1)) for rule in _PREFILL_GFX942)
PREFILL_RULES: dict[str, PrefillRules] = {
    "gfx90a": _PREFILL_GFX90A,
    "gfx942": _PREFILL_GFX942,
    "gfx950": _PREFILL_GFX950,
}

BACKEND = TritonBackend(RULES, PREFILL_RULES)
