"""The portable Triton backend with the tile rules of NVIDIA GPUs."""

from portable_mla.backends.nvidia.tiles import PREFILL_RULES, RULES
from portable_mla.backends.triton.backend import TritonBackend

BACKEND = TritonBackend(RULES, PREFILL_RULES)
