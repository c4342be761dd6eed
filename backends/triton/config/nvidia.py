"""Decode and prefill tiles of NVIDIA GPUs.

Comments: registers, bytes of stack where there are any, shared KB and matrix instructions of the widest geometry of the
row on Triton 3.6.0, then on 3.9, when the row was chosen (ci/compile/budgets.json has today's); microseconds are of an
H100, bf16, page 64, at (batch, heads, context).
"""

from portable_mla.backends.triton.backend import TritonBackend
from portable_mla.backends.triton.config.decode import FP8, GROUPED, DecodeRules, Rule, Tile, when
from portable_mla.backends.triton.config.prefill import PrefillRule, PrefillRules, PrefillTile, when_prefill

# mma.sync, 99 KB of shared memory: the tile of Q and two or three tiles of K
_SM86_HALF = (
    # 255 regs, 74 KB, 136 HMMA. Forced on an H100, (128, 128, 4096): 1322 us; 16x32 1551, 32x16 2447
    Rule(when(latent_above=256, rows_above=16), Tile(32, 32, 4, 2)),
    # 186 regs, 91 KB, 68 HMMA; 3.9: 189
    Rule(when(latent_above=256), Tile(16, 32, 4, 3)),
    # 185 regs, 84 KB, 112 HMMA; 3.9: 171
    Rule(when(latent_above=128, rows_above=32), Tile(64, 32, 8, 3)),
    # 168 regs, 82 KB, 72 HMMA; 3.9: 168
    Rule(when(latent_above=128, rows_above=16), Tile(32, 32, 4, 4)),
    # 148 regs, 92 KB, 72 HMMA; 3.9: 167
    Rule(when(latent_above=128), Tile(16, 64, 4, 3)),
    # 164 regs, 88 KB, 72 HMMA; 3.9: 160
    Rule(when(rows_above=32), Tile(64, 64, 8, 4)),
    # 168 regs, 74 KB, 72 HMMA; 3.9: 168
    Rule(when(rows_above=16), Tile(32, 64, 4, 4)),
    # 126 regs, 67 KB, 36 HMMA; 3.9: 126
    Rule(when(), Tile(16, 64, 4, 4)),
)
_SM86 = (
    # 254 regs, 91 KB, 68 HMMA; 32x32 spills 307 times in the loop, its scales beside two row tiles
    Rule(when(formats=GROUPED), Tile(16, 32, 4, 3)),
    *_SM86_HALF,
)
_SM89 = (
    # 236 regs, 63 KB, 68 HMMA; 32x32 spills 9 times in the loop
    Rule(when(formats=FP8, latent_above=256), Tile(16, 32, 4, 3, conversion="pairs")),
    *_SM86_HALF,
)
# mma.sync, 163 KB
_SM80 = (
    # 32x32 spills 203 times in the loop
    Rule(when(formats=GROUPED), Tile(16, 32, 4, 3)),
    # 255 regs, 8 B, 148 KB, 208 HMMA; 3.9: 255, 8 B
    Rule(when(latent_above=256, rows_above=32), Tile(64, 32, 8, 3)),
    # 228 regs, 146 KB, 104 HMMA; 3.9: 218
    Rule(when(latent_above=256, rows_above=16), Tile(32, 32, 8, 4)),
    # 255 regs, 127 KB, 68 HMMA; 3.9: 248
    Rule(when(latent_above=256), Tile(16, 32, 4, 4)),
    # 246 regs, 128 KB, 144 HMMA; 3.9: 245
    Rule(when(latent_above=128, rows_above=32), Tile(64, 64, 8, 3)),
    # 252 regs, 144 KB, 144 HMMA; 3.9: 255
    Rule(when(latent_above=128, rows_above=16), Tile(32, 64, 4, 4)),
    # 168 regs, 132 KB, 72 HMMA; 3.9: 168
    Rule(when(latent_above=128), Tile(16, 64, 4, 4)),
    # 181 regs, 88 KB, 72 HMMA; 3.9: 171
    Rule(when(rows_above=32), Tile(64, 64, 8, 4)),
    # 168 regs, 74 KB, 72 HMMA; 3.9: 167
    Rule(when(rows_above=16), Tile(32, 64, 4, 4, programs_per_unit=2)),
    # 128 regs, 67 KB, 36 HMMA; 3.9: 128
    Rule(when(), Tile(16, 64, 4, 4, programs_per_unit=2)),
)
# wgmma from 64 rows on, mma.sync below; 227 KB
_SM90 = (
    # 255 regs, 149 KB, 74 HGMMA; 32x64 spills 216 times in the loop, 32x32 203, 64x64 5
    Rule(when(formats=GROUPED, rows_above=16), Tile(64, 32, 8, 3)),
    # 238 regs, 76 KB, 136 HMMA; 64x32 spills 58 times in the loop
    Rule(when(formats=FP8, latent_above=256, rows_above=16), Tile(32, 64, 8, 2, conversion="pairs")),
    # 255 regs, 32 B, 67 KB, 136 HMMA, 1106 instructions a tile
    Rule(when(formats=GROUPED), Tile(16, 64, 4, 2, conversion="pairs", programs_per_unit=2)),
    # 245 regs, 92 KB, 136 HMMA, 961 instructions a tile; converted late, 2598: values went to PV a byte at a time
    Rule(when(formats=FP8, latent_above=256), Tile(16, 64, 4, 3, conversion="pairs", programs_per_unit=2)),
    # 255 regs, 24 B, 216 KB, 76 HGMMA; 3.9: 255, 424 B. Predicted 542 us at (128, 128, 4096), measured 534; 64x32 took
    # 648, 32x64 784, 16x32 957. Branching around the mask of whole tiles was predicted to gain 10 % (it stops the two
    # warpgroups from scoring twice) and lost 3 %: the weights then cross shared memory. Dropped
    Rule(when(latent_above=256, rows_above=32, whole_tiles=64), Tile(64, 64, 8, 2, "descriptor")),
    # 255 regs, 32 B, 216 KB, 76 HGMMA; 3.9: 255, 400 B. 572 us at (128, 128, 4096), page 16: 709, where 64x32 took 769
    Rule(when(latent_above=256, rows_above=32), Tile(64, 64, 8, 2)),
    # 211 regs, 184 KB, 136 HMMA; 3.9: 209
    Rule(when(latent_above=256, rows_above=16, whole_tiles=64), Tile(32, 64, 8, 3, "descriptor")),
    # 173 regs, 184 KB, 136 HMMA; 3.9: 194
    Rule(when(latent_above=256, rows_above=16), Tile(32, 64, 8, 3)),
    # 255 regs, 8 B, 164 KB, 136 HMMA. Twice 16x32 a unit was predicted to hide more latency: (128, 16, 4096) 229 us,
    # (1, 16, 81920) 51.7, (8, 16, 8192) 41.1; this one 228, 47.1, 38.0
    Rule(when(latent_above=256, whole_tiles=64), Tile(16, 64, 4, 3, "descriptor")),
    # 145 regs, 164 KB, 68 HMMA. Page 16: (128, 16, 4096) 234 us, (1, 16, 81920) 49.4; twice 16x32 237, 54.4
    Rule(when(latent_above=256), Tile(16, 64, 8, 3)),
    # 255 regs, 8 B, 200 KB, 24 HGMMA. 186 us at (128, 128, 4096), with 8 warps 295
    Rule(when(latent_above=128, rows_above=32, whole_tiles=64), Tile(64, 64, 4, 4, "descriptor")),
    # 255 regs, 200 KB, 44 HGMMA; 3.9: 255, 72 B. With 4 warps it spills in the loop
    Rule(when(latent_above=128, rows_above=32), Tile(64, 64, 8, 4)),
    # 166 regs, 92 KB, 72 HMMA. (128, 32, 4096) 140 us, (1, 32, 65536) 27.5; 32x64 144, 33.0
    Rule(when(latent_above=128, whole_tiles=64), Tile(16, 64, 4, 3, "descriptor", programs_per_unit=2)),
    # 147 regs, 92 KB, 72 HMMA; 3.9: 145
    Rule(when(latent_above=128), Tile(16, 64, 4, 3, programs_per_unit=2)),
    # 229 regs, 100 KB, 14 HGMMA; 3.9: 217
    Rule(when(rows_above=32, whole_tiles=64), Tile(64, 64, 4, 4, "descriptor", programs_per_unit=2)),
    # 245 regs, 100 KB, 14 HGMMA; 3.9: 249
    Rule(when(rows_above=32), Tile(64, 64, 4, 4, programs_per_unit=2)),
    # 168 regs, 74 KB, 72 HMMA; 3.9: 167
    Rule(when(rows_above=16), Tile(32, 64, 4, 4, programs_per_unit=2)),
    # 128 regs, 67 KB, 36 HMMA; 3.9: 100
    Rule(when(), Tile(16, 64, 4, 4, programs_per_unit=2)),
)
# 227 KB; mma.sync on purpose: pipelined tcgen05 tiles of 64 rows spill hundreds of bytes inside the loop
_SM100 = (
    # 255 regs, 93 KB, 136 HMMA
    Rule(when(formats=FP8, latent_above=256, rows_above=16), Tile(32, 64, 8, 2, conversion="pairs")),
    # 236 regs, 63 KB, 68 HMMA; 16x64 spills once in the loop
    Rule(when(formats=GROUPED), Tile(16, 32, 4, 3, conversion="pairs", programs_per_unit=2)),
    # 239 regs, 92 KB, 136 HMMA; the sm90 row's reason
    Rule(when(formats=FP8, latent_above=256), Tile(16, 64, 4, 3, conversion="pairs", programs_per_unit=2)),
    # 212 regs, 184 KB, 136 HMMA; 3.9: 212
    Rule(when(latent_above=256, rows_above=16, whole_tiles=64), Tile(32, 64, 8, 3, "descriptor")),
    # 194 regs, 184 KB, 136 HMMA; 3.9: 194
    Rule(when(latent_above=256, rows_above=16), Tile(32, 64, 8, 3)),
    # 255 regs, 8 B, 164 KB, 136 HMMA; the sm90 row's measurement, for the same instructions
    Rule(when(latent_above=256, whole_tiles=64), Tile(16, 64, 4, 3, "descriptor")),
    # 145 regs, 164 KB, 68 HMMA
    Rule(when(latent_above=256), Tile(16, 64, 8, 3)),
    # 226 regs, 104 KB, 144 HMMA; 3.9: 184
    Rule(when(latent_above=128, rows_above=16), Tile(32, 64, 4, 3, programs_per_unit=2)),
    # 144 regs, 92 KB, 72 HMMA; 3.9: 172
    Rule(when(latent_above=128), Tile(16, 64, 4, 3, programs_per_unit=2)),
    # 168 regs, 74 KB, 72 HMMA; 3.9: 168
    Rule(when(rows_above=16), Tile(32, 64, 4, 4, programs_per_unit=2)),
    # 128 regs, 67 KB, 36 HMMA; 3.9: 98
    Rule(when(), Tile(16, 64, 4, 4, programs_per_unit=2)),
)
# mma.sync, 99 KB, descriptor loads
_SM120 = (
    # 16x64 by pointer for 64 and 128 heads, 92 KB, 280 B of stack, none of it in the loop: the model of an RTX PRO 6000
    # says 951 -> 856 us at (128, 128, 4096), as queries cross shared memory half as often. Forced on an H100 1311 ->
    # 1875: the model does not know what gathers without TMA cost. Dropped
    # 228 regs, 8 B, 91 KB, 68 HMMA; 3.9: 199. Forced on an H100, (128, 128, 4096): 1314 us; 32x16 2374, and 32x32 1210,
    # which spills in the loop here
    Rule(when(latent_above=256, whole_tiles=32), Tile(16, 32, 4, 3, "descriptor")),
    *_SM89,
)
RULES: dict[str, DecodeRules] = {
    "sm80": _SM80,
    "sm86": _SM86,
    "sm89": _SM89,
    "sm90": _SM90,
    "sm100": _SM100,
    "sm103": _SM100,
    "sm120": _SM120,
    "sm121": _SM120,
}

# Prefill: the figures are of 192+64/256, 128+64/128, 64+64/128 and 64+32/64 in causal bf16, Triton 3.6.0.
_PREFILL_SM89 = (
    # 204 regs, 68 KB, 192 HMMA; 64x64 takes 104 KB, 128x32 spills 65 times in the loop
    PrefillRule(when_prefill(qk_above=192), PrefillTile(64, 32, 8, 2)),
    # 255 regs, 88 KB, 160 HMMA; 128x64 spills in the loop
    PrefillRule(when_prefill(qk_above=128), PrefillTile(128, 32, 8, 3)),
    # 236 regs, 64 KB, 256 HMMA
    PrefillRule(when_prefill(qk_above=96), PrefillTile(128, 64, 8, 2)),
    # 205 regs, 64 KB, 160 HMMA
    PrefillRule(when_prefill(), PrefillTile(128, 64, 8, 3)),
)
_PREFILL_SM80 = (
    # 245 regs, 104 KB, 256 HMMA
    PrefillRule(when_prefill(qk_above=192), PrefillTile(64, 64, 8, 2)),
    *_PREFILL_SM89[1:],
)
# Warpgroups of 64 rows each, two in turns at the tensor cores: half as many rows took 1.2 to 1.6 times as long. H100,
# causal TFLOP/s at 1 x 4096 x 128 heads and 4 x 2048 x 128, where cuDNN has 595 and 553, 659 and 615, 601 and 553; the
# kernel then fused scale and difference, which it no longer does (predicted: 2 to 5 % slower).
_PREFILL_SM90 = (
    # 479 and 413; 128x32 383 and 366, 64x64 with 4 warps 329 and 289, loads by pointer 388 and 357
    PrefillRule(when_prefill(qk_above=192), PrefillTile(128, 64, 8, 2, "descriptor")),
    # 128+64/128: 427 and 356; 128x128 was predicted to win by fewer rescales: 412 and 351, by pointer 402 and 326; a
    # fourth stage 421 and 355, 4 warps 257 and 213. 64+64/128: 405 and 346, 128x128 386 and 331
    PrefillRule(when_prefill(), PrefillTile(128, 64, 8, 3, "descriptor")),
)
_PREFILL_SM100 = (
    # 226 regs, 161 KB, 152 UTCHMMA; 128x64 spills in the loop
    PrefillRule(when_prefill(qk_above=192), PrefillTile(64, 64, 8, 2, "descriptor")),
    # 233 regs, 129 KB, 104 UTCHMMA
    PrefillRule(when_prefill(qk_above=128), PrefillTile(128, 64, 8, 2, "descriptor")),
    # 236 regs, 97 KB, 72 UTCHMMA
    PrefillRule(when_prefill(), PrefillTile(128, 64, 8, 2, "descriptor")),
)
PREFILL_RULES: dict[str, PrefillRules] = {
    "sm80": _PREFILL_SM80,
    "sm86": _PREFILL_SM89,
    "sm89": _PREFILL_SM89,
    "sm90": _PREFILL_SM90,
    "sm100": _PREFILL_SM100,
    "sm103": _PREFILL_SM100,
    "sm120": _PREFILL_SM89,
    "sm121": _PREFILL_SM89,
}

BACKEND = TritonBackend(RULES, PREFILL_RULES)
