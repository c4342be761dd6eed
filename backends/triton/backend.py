"""TritonBackend: when the portable Triton kernels serve, and with which tile."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from portable_mla.backends.triton.config.decode import DecodeRules, Tile, TileRequest, choose_tile
from portable_mla.backends.triton.config.prefill import PrefillRules, PrefillTile, PrefillTileRequest
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import PrefillRunner, Runner
from portable_mla.metadata import Needs

GEOMETRIES = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32))  # latent, rope: those the compile gate covers
MAX_HEADS = 128
# Query tokens that one unit of a split plan may hold; longer queries, an absorbed prefill, are cut into blocks. Where
# cuts are fixed, each block has room for all its pieces, which would take gigabytes of long queries.
MAX_QUERY_LEN = 8
MAX_PLANNED_TOKENS = 1 << 18  # each plan program scans the blocks of all requests
PREFILL_GEOMETRIES = ((128, 64, 128), (192, 64, 256), (256, 0, 256), (64, 64, 128), (64, 32, 64))  # nope, rope, v
HALF_DTYPES = (torch.bfloat16, torch.float16)


Checks = tuple[tuple[bool, str], ...]  # what must hold, and the reason where it does not


@dataclass(frozen=True)
class TritonBackend:
    """Split-KV decode and ragged prefill in plain Triton, for the architectures of one vendor that have tile rules."""

    rules: Mapping[str, DecodeRules]
    prefill_rules: Mapping[str, PrefillRules]

    def reasons_unavailable(self) -> tuple[str, ...]:
        """Triton comes with torch's GPU builds; elsewhere it is an extra."""
        if importlib.util.find_spec("triton") is None:
            return ("needs the package triton (pip install portable-mla[triton]; ROCm's torch brings its own)",)
        return ()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        """Geometries, dtypes and sizes that the kernels are compiled and tested for."""
        checks = self._prefill_checks(request) if request.phase is Phase.prefill else self._decode_checks(request)
        return tuple(reason for holds, reason in checks if not holds)

    def _decode_checks(self, request: Request) -> Checks:
        shape = request.shape
        geometry = (shape.latent_dim, shape.rope_dim)
        known = ", ".join(f"{latent}+{rope}" for latent, rope in GEOMETRIES)
        cache_format, flavour = shape.cache_format, request.arch.float8
        planned = request.capacity.max_batch * request.max_query_len
        return (
            (request.arch.name in self.rules, f"needs tile rules, {request.arch.name} has none"),
            (geometry in GEOMETRIES, f"needs latent+rope of {known}, got {geometry[0]}+{geometry[1]}"),
            (cache_format is not CacheFormat.fp32, f"needs a bf16, fp16 or fp8 cache, got {cache_format.name}"),
            (
                not cache_format.needs_scale or cache_format.dtype == flavour,
                f"needs an fp8 cache of {flavour}, got {cache_format.name}",
            ),
            (shape.q_dtype in HALF_DTYPES, f"needs bf16 or fp16 queries, got {shape.q_dtype}"),
            (shape.heads <= MAX_HEADS, f"needs at most {MAX_HEADS} heads, got {shape.heads}"),
            (
                request.max_query_len <= MAX_QUERY_LEN or not request.deterministic,
                f"needs at most {MAX_QUERY_LEN} query tokens a request where bits must not depend on the batch, "
                f"got {request.max_query_len}",
            ),
            (
                request.max_query_len <= MAX_QUERY_LEN or planned <= MAX_PLANNED_TOKENS,
                f"needs max_batch * max_query_len of at most {MAX_PLANNED_TOKENS}, got {planned}",
            ),
        )

    def _prefill_checks(self, request: Request) -> Checks:
        shape = request.shape
        geometry = (shape.nope_dim, shape.rope_dim, shape.v_dim)
        known = ", ".join(f"{nope}+{rope}/{v}" for nope, rope, v in PREFILL_GEOMETRIES)
        got = f"{geometry[0]}+{geometry[1]}/{geometry[2]}"
        return (
            (request.arch.name in self.prefill_rules, f"needs prefill tile rules, {request.arch.name} has none"),
            (geometry in PREFILL_GEOMETRIES, f"needs nope+rope/v of {known}, got {got}"),
            (shape.q_dtype in HALF_DTYPES, f"needs bf16 or fp16 queries, got {shape.q_dtype}"),
        )

    def needs(self, request: Request) -> Needs:
        """Page tables are walked in place, where the split plan says."""
        from portable_mla.backends.triton.decode.runner import plan_shape

        return Needs(split_plan=plan_shape(request, self.tile(request)))

    def bind(self, request: Request) -> Runner | PrefillRunner:
        """A runner; a decode's buffers are allocated by the first plan, on the device of the batch, and stay."""
        if request.phase is Phase.prefill:
            from portable_mla.backends.triton.prefill.runner import TritonPrefill

            return TritonPrefill(request, self.prefill_tile(request))
        from portable_mla.backends.triton.decode.runner import TritonRunner

        return TritonRunner(request, self.tile(request))

    def tile(self, request: Request) -> Tile:
        """The tile of a request: of its heads alone where results must not depend on the rest of the batch."""
        shape = request.shape
        rows = shape.heads * (1 if request.deterministic else request.max_query_len)
        return choose_tile(
            self.rules[request.arch.name],
            TileRequest(rows, shape.latent_dim, shape.rope_dim, shape.page_size, shape.cache_format),
        )

    def prefill_tile(self, request: Request) -> PrefillTile:
        """The tile of a prefill."""
        shape = request.shape
        assert shape.nope_dim is not None and shape.v_dim is not None, "refused by dispatch"
        asked = PrefillTileRequest(shape.nope_dim + shape.rope_dim, shape.v_dim)
        return choose_tile(self.prefill_rules[request.arch.name], asked)
