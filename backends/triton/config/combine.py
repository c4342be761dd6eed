"""CombineTile: how the launch that merges partial results is shaped."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CombineTile:
    """The shape of one combine launch."""

    block_d: int  # columns
    block_r: int  # heads
    block_s: int  # splits of one step
    few: int  # splits that are merged in one step of this many instead
    num_warps: int
    rehearsed: bool = False  # a dependent launch goes through the code once while it waits


def combine_tiles(latent_dim: int, wave: int, *, narrow: bool = False) -> dict[str, CombineTile]:
    """The combines that a launch is chosen from. narrow: of float16 partial results, else float32.

    H100, us at (batch, heads, context), of a tile (block_d, block_r, block_s, few): spread, rows, grouped.
    (8, 16, 8192) 41.0 42.4 46.9; (32, 64, 4096) 78.0 75.6 80.8; (32, 128, 4096) 87.8 83.6 85.2; a ragged batch of 256
    with 128 heads 226 230 221. Steps of 32 splits take 160 registers, those of 4 take 40: predicted to hide the loads
    of 4 pieces better, which they did. Two heads a program (512, 2, 2, 2): within 2 % of rows. Splits unrolled one by
    one, with one to four heads a program: predicted 3 us at a ragged batch of 32 with 128 heads, 0; (1, 16, 8192) 14.5
    -> 16.9. Dropped. Pieces merged in one step, by four warps (128, 1, 128, 32): predicted 2 us at (1, 16, 8192), 12.9
    -> 13.0, (1, 64, 8192) 15.5 -> 17.6; thin 12.6 and 15.6. The code gone through once while the decode ends, so that
    it need not be fetched after: predicted 0.4 at (1, 128, 1024), 10.4 -> 10.3, (1, 128, 8192) 16.5 -> 16.2, (1, 16,
    8192) 12.6 -> 12.4; of rows and grouped too, Azure, 32 requests of 128 heads 33.6 -> 35.7. Up to 16 pieces
    of spread in one step, where it was 4: predicted 0.1, (1, 128, 1024) 9.1 -> 9.05, (4, 128, 1024) 13.5 -> 12.8; with
    64 columns, (4, 128, 1024) 14.1, (1, 128, 8192) 14.6 -> 15.2; with 256, 12.8 and 15.8.
    """
    warps = max(latent_dim // ((8 if narrow else 4) * wave), 1)  # a lane loads 16 bytes
    return {
        # many pieces of few rows, and of very few
        "spread": CombineTile(block_d=128, block_r=1, block_s=32, few=16, num_warps=1, rehearsed=True),
        "thin": CombineTile(block_d=64, block_r=1, block_s=64, few=16, num_warps=1, rehearsed=True),
        "rows": CombineTile(block_d=latent_dim, block_r=1, block_s=4, few=4, num_warps=warps),
        # very many rows; more heads of float16 take 254 registers
        "grouped": CombineTile(block_d=latent_dim, block_r=2 if narrow else 8, block_s=2, few=2, num_warps=warps),
    }
