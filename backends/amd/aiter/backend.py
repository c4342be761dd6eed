"""AITER: AMD's decode kernels, behind an allow-list, since what its table leaves out faults or is silently wrong.

Refusals with a report behind them, all of ROCm/aiter unless said: more than one query token in a split that is masked
for the early ones (#4711) or at lengths that are no power of 2 (#2720); pages of more than one token (#2996, #3095), so
token indices are all it is given; caches of 4 GiB and more (#4452, #4341); rows other than 512 + 64 (vllm#56314);
heads that no kernel has (#548, #726, #1468), so heads are padded to the next that has one; LSE from its single-split
shortcut, so a request always has two splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from portable_mla.backends.amd.aiter.kernels_by_arch import AITER_KERNELS, AITER_PERSISTENT_KERNELS
from portable_mla.backends.amd.aiter.runner import DECODE, METADATA, METADATA_INFO, AiterRunner
from portable_mla.backends.library.library import Builds, Library, Loaded
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.shape import Phase, Request
from portable_mla.dispatch.interface import Runner
from portable_mla.metadata import Needs
from portable_mla.runtime.packages import Package

GEOMETRY = (512, 64)
MOST_CACHE_BYTES = 2**32
_CALLED = (
    "q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens", "max_seqlen_q", "sm_scale",
    "num_kv_splits", "num_kv_splits_indptr", "return_lse",
)  # fmt: skip
_WORK = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
_PACKAGE = Package("aiter", "aiter", ("amd-aiter", "aiter"), marks=("mla.py", "ops"))
_SECOND_STAGE = "_fwd_kernel_stage2_asm"  # a Triton kernel: its parameters say whether it writes LSE

Kernels = Mapping[str, Mapping[str, Mapping[int, tuple[int, ...]]]]


def _without_lse(loaded: Loaded) -> tuple[str, ...]:
    """Releases took return_lse before the second stage of the usual path wrote it."""
    names = getattr(loaded.functions[_SECOND_STAGE], "arg_names", ())
    return () if "Final_lse" in names else (f"{loaded.library.name}: too old: its second stage writes no LSE",)


@dataclass(frozen=True)
class AiterBackend:
    """Decode with AITER, one of its two families of kernels; the persistent one is asked for by name."""

    kernels: Kernels
    builds: Builds
    persistent: bool = False

    def reasons_unavailable(self) -> tuple[str, ...]:
        """AMD's package is told from PyPI's unrelated aiter by its files."""
        return self.builds.reasons_unavailable()

    def reasons_not_loadable(self) -> tuple[str, ...]:
        """Its import asks rocminfo for the GPU, and may end the process."""
        return self.builds.reasons_not_loadable()

    def reasons_unsupported(self, request: Request) -> tuple[str, ...]:
        """What the allow-list leaves out."""
        shape = request.shape
        geometry, by_format = (shape.latent_dim, shape.rope_dim), self.kernels.get(request.arch.name, {})
        by_heads = by_format.get(shape.cache_format.name, {})
        heads = padded_heads(shape.heads, by_heads)
        queries = by_heads.get(heads, ())
        checks = (
            (request.phase is Phase.decode, f"needs phase decode, got {request.phase.value}"),
            (bool(by_format), f"needs {', '.join(self.kernels)}, got {request.arch.name}"),
            (
                not by_format or bool(by_heads),
                f"needs a cache in {', '.join(by_format)} (its others return no LSE), got {shape.cache_format.name}",
            ),
            (shape.q_dtype is CacheFormat.bf16.dtype, f"needs bf16 queries, got {shape.q_dtype}"),
            (geometry == GEOMETRY, f"needs latent+rope of 512+64, got {geometry[0]}+{geometry[1]} (vllm#56314)"),
            (heads > 0 or not by_heads, f"needs at most {max(by_heads, default=0)} heads, got {shape.heads}"),
            (
                not queries or request.max_query_len in queries,
                f"needs {', '.join(map(str, queries))} query token(s) a request with {heads} heads, got "
                f"{request.max_query_len} (ROCm/aiter#2720, #4711)",
            ),
            (request.uniform_queries, "needs uniform_queries, got ragged: one length picks the kernel"),
            (
                request.cache_bytes < MOST_CACHE_BYTES,
                f"needs a cache below {MOST_CACHE_BYTES} bytes, got {request.cache_bytes} (ROCm/aiter#4452)",
            ),
            (not request.deterministic, "needs deterministic off: where a context is split depends on the batch"),
        )
        return tuple(reason for holds, reason in checks if not holds)

    def needs(self, request: Request) -> Needs:
        """Token indices, whatever the cache's pages."""
        return Needs(query_indptr=True, index_size=1)

    def bind(self, request: Request) -> Runner:
        """A runner; imports the library."""
        by_heads = self.kernels[request.arch.name][request.shape.cache_format.name]
        heads = padded_heads(request.shape.heads, by_heads)
        return AiterRunner(request, self.builds.first(), heads, persistent=self.persistent)


def padded_heads(heads: int, kernels: Mapping[int, tuple[int, ...]]) -> int:
    """The fewest heads of a kernel that holds so many; 0 if none does."""
    return min((count for count in kernels if count >= heads), default=0)


def _builds(*extra: tuple[str, tuple[str, ...]]) -> Builds:
    functions = ((DECODE, (*_CALLED, *(_WORK if extra else ()))), (_SECOND_STAGE, ()), *extra)
    return Builds((Library(_PACKAGE, "aiter.mla", functions, "HIP"),), _without_lse)


BACKEND = AiterBackend(AITER_KERNELS, _builds())
PERSISTENT = AiterBackend(
    AITER_PERSISTENT_KERNELS,
    _builds((METADATA_INFO, ("batch_size", "max_seqlen_qo", "num_head_qo", "q_dtype", "kv_dtype")), (METADATA, ())),
    persistent=True,
)
