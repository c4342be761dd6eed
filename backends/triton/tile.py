"""Tile: how one decode launch is shaped on one GPU. Rule: when a tile is used. First match wins."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from portable_mla.cache_format import CacheFormat

Asked = TypeVar("Asked")
Shape = TypeVar("Shape")
# How fp8 becomes the dtype of the products: converted by each of its readers; once, before it is shared, where there is
# one scale; or in pairs to float16, which takes NVIDIA's instruction for it and is "late" elsewhere.
Conversion = Literal["late", "early", "pairs"]


@dataclass(frozen=True)
class Tile:
    """The shape and the launch options of one decode launch."""

    block_h: int  # rows (query token x head) of one program
    block_n: int  # KV positions of one step
    num_warps: int
    num_stages: int
    loads: Literal["pointer", "descriptor"] = "pointer"
    programs_per_unit: int = 1  # resident programs on one SM or CU, the plan's parts are sized by it
    conversion: Conversion = "late"
    min_tokens: int = 128  # a part shorter than this is not worth its partial result
    waves_per_eu: int = 0  # AMD only, as the three fields below
    matrix_instr_nonkdim: int = 0
    kpack: int = 1
    num_xcds: int = 1

    @property
    def name(self) -> str:
        """As the compile gate calls it: rows x keys, warps, stages, waves a SIMD where AMD's compiler is told."""
        waves = f"e{self.waves_per_eu}" if self.waves_per_eu else ""
        return f"{self.block_h}x{self.block_n}w{self.num_warps}s{self.num_stages}{waves}"

    @property
    def min_tiles(self) -> int:
        """Tiles of the shortest part."""
        return max(self.min_tokens // self.block_n, 2)


@dataclass(frozen=True)
class TileRequest:
    """What a rule may look at."""

    rows: int  # heads * max_query_len
    latent_dim: int
    rope_dim: int
    page_size: int
    cache_format: CacheFormat = CacheFormat.bf16

    def whole_tiles(self, block_n: int) -> bool:
        """Whether tiles of block_n positions never cross a page, as descriptor loads need; fp8 is never loaded so."""
        return not self.cache_format.quantised and self.page_size % block_n == 0


@dataclass(frozen=True)
class Rule(Generic[Asked, Shape]):
    """A tile, and the requests that it is for."""

    when: Callable[[Asked], bool]
    tile: Shape


FP8 = tuple(cache_format for cache_format in CacheFormat if cache_format.quantised)
GROUPED = (CacheFormat.fp8_656,)  # whose scales are applied to each tile in registers
DecodeRules = Sequence[Rule[TileRequest, Tile]]


def when(
    *,
    rows_above: int = 0,
    latent_above: int = 0,
    whole_tiles: int = 0,
    formats: Collection[CacheFormat] = tuple(CacheFormat),
) -> Callable[[TileRequest], bool]:
    """A rule's condition: more rows than, a latent wider than, pages that tiles of this length never cross, and one of
    these formats."""

    def matches(request: TileRequest) -> bool:
        wide = request.rows > rows_above and request.latent_dim > latent_above
        return wide and request.cache_format in formats and (whole_tiles == 0 or request.whole_tiles(whole_tiles))

    return matches


def choose_tile(rules: Sequence[Rule[Asked, Shape]], request: Asked) -> Shape:
    """The tile of the first rule that matches. Raises LookupError if none does: every table ends in a catch-all."""
    for rule in rules:
        if rule.when(request):
            return rule.tile
    raise LookupError(f"no tile rule matches {request}")


def query_block(heads: int, max_query_len: int, tile: Tile) -> int:
    """Query tokens of a unit whose rows fill the row tiles that one token's heads need anyway."""
    return min(max(row_tiles(heads, tile) * tile.block_h // heads, 1), max_query_len)


def row_tiles(rows: int, tile: Tile) -> int:
    """Row tiles of one unit."""
    return -(-rows // tile.block_h)


def count_parts(rows: int, tile: Tile, units: int) -> int:
    """Parts of the split plan, so that parts * row tiles fill the GPU once."""
    return max(units * tile.programs_per_unit // row_tiles(rows, tile), 1)


class AmdOptions(Protocol):
    """What a tile says to AMD's compiler."""

    @property
    def waves_per_eu(self) -> int: ...
    @property
    def matrix_instr_nonkdim(self) -> int: ...
    @property
    def kpack(self) -> int: ...


def amd_options(tile: AmdOptions) -> dict[str, int]:
    """Launch options that only AMD's compiler takes."""
    return {"waves_per_eu": tile.waves_per_eu, "matrix_instr_nonkdim": tile.matrix_instr_nonkdim, "kpack": tile.kpack}


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
