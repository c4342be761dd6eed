"""The portable Triton backend with the tile rules of AMD Instinct GPUs."""

from portable_mla.backends.amd.tiles import PREFILL_RULES, RULES
from portable_mla.backends.triton.backend import TritonBackend

BACKEND = TritonBackend(RULES, PREFILL_RULES)
