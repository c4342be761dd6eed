"""Tile: how one decode launch is shaped on one GPU. Rule: when a tile is used. First match wins."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from portable_mla.core.cache_format import CacheFormat

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
