"""Vendor libraries as they behave towards a caller, computed by the reference on a CPU, and packages on disk that hold
them. Each keeps its own conventions of LSE, of empty rows and of schedules, and fails where a real one would be wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portable_mla.backends import reference

MODULES = ("flash_mla", "flash_attn_interface", "flashinfer", "aiter", "vllm")
RELEASES: dict[str, dict[str, str | None]] = json.loads(
    (Path(__file__).parent / "data" / "aiter_signatures.json").read_text()
)
GARBAGE = -12345.0  # in what a library leaves unwritten


def install(
    folder: Path, module: str, source: str, *, distribution: tuple[str, str] | None = None, files: Sequence[str] = ()
) -> None:
    """Write a module, dotted names as packages; files: other files of its top package."""
    *packages, _ = (*module.split("."), "")
    place = folder
    for package in packages:
        place = place / package
        place.mkdir(exist_ok=True)
        (place / "__init__.py").touch()
    (place / "__init__.py").write_text(source)
    for file in files:
        path = folder / module.split(".")[0] / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if distribution is not None:
        metadata = folder / f"{distribution[0].replace('-', '_')}-{distribution[1]}.dist-info"
        metadata.mkdir()
        name, version = distribution
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def paged(cache: Tensor, pages: Tensor, kv_len: int) -> Tensor:
    """[kv_len, width]: one request's rows. Page ids must be in the cache, also those that are not read."""
    assert bool(((pages >= 0) & (pages < cache.shape[0])).all()), "a page that is not there"
    size = cache.shape[1]
    return cache[pages[: -(-kv_len // size)].long()].reshape(-1, cache.shape[-1])[:kv_len]


# FlashMLA


class Schedule:
    """What the newer FlashMLA plans in its first call, if nothing was planned before: the lengths that it saw."""

    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None


def flash_mla(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int, schedule: Any,
    softmax_scale: float, causal: bool, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [b, s, h, 512]; LSE [b, h, s], +inf for rows that see nothing."""
    if isinstance(schedule, Schedule):
        if schedule.tile_scheduler_metadata is None:
            schedule.tile_scheduler_metadata = cache_seqlens.clone()
        schedule = schedule.tile_scheduler_metadata
    assert torch.equal(schedule, cache_seqlens), "the schedule is stale"
    batch, queries, heads, _ = q.shape
    assert causal is (queries > 1)
    assert k_cache.shape[1:3] == (64, 1)
    result = torch.full((batch, queries, heads, head_dim_v), torch.nan, dtype=q.dtype) if out is None else out
    lse = torch.full((batch, heads, queries), torch.nan)
    for request in range(batch):
        rows = paged(k_cache[:, :, 0], block_table[request], int(cache_seqlens[request]))
        own, own_lse = reference.attend(q[request].double(), rows.double(), head_dim_v, softmax_scale)
        result[request] = own.to(q.dtype)
        lse[request] = own_lse.T.masked_fill(own_lse.T.isneginf(), torch.inf)
    return result, lse


FLASH_MLA_PLANS = {
    "first": "def get_mla_metadata(cache_seqlens, num_heads_per_head_k, num_heads_k):\n"
    "    return cache_seqlens.clone(), cache_seqlens\n",
    "second": "def get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, num_heads_q=None,\n"
    "    is_fp8_kvcache=False, topk=None):\n    return cache_seqlens.clone(), cache_seqlens\n",
    "third": "def get_mla_metadata(*args, **kwargs):\n    return fakes.Schedule(), None\n",
}


def flash_mla_source(plan: str = "third", *, extra: str = "", checks: str = "pass", out: str = "None") -> str:
    """A FlashMLA of one dialect of planning. extra: parameters of its own; checks: what it asserts of them."""
    return (
        "from tests.support import fake_libraries as fakes\n"
        f"{FLASH_MLA_PLANS[plan]}"
        "def flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, \n"
        f"    num_splits=None, softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None{extra}):\n"
        f"    assert is_fp8_kvcache is False\n    {checks}\n"
        "    return fakes.flash_mla(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,\n"
        f"        softmax_scale, causal, {out})\n"
    )


SGL_FLASH_MLA = flash_mla_source(extra=", use_legacy=False", checks="assert use_legacy") + (
    "def get_mla_decoding_metadata(seqlens_k, num_q_tokens_per_head_k, h_k, h_q=None, is_fp8_kvcache=False,\n"
    "    topk=None, use_legacy=False):\n    assert use_legacy\n    return seqlens_k.clone(), seqlens_k.clone()\n"
)
VLLM_FLASH_MLA = flash_mla_source(extra=", out=None, enable_batch_invariant=False", out="out")
UPSTREAM_WITHOUT_DENSE = flash_mla_source(extra=", enable_batch_invariant=False")

# FlashAttention 3


def flash_attn3(
    q: Tensor, k: Tensor, v: Tensor, q_v: Tensor, cu_seqlens_q: Tensor, lens: Tensor, table: Tensor, scale: float,
    schedule: Tensor, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [tokens, h, 512], unwritten past the last request; LSE [h, tokens], -inf for rows that see nothing."""
    assert torch.equal(schedule, torch.cat([lens, cu_seqlens_q])), "the schedule is stale"
    assert table.shape[0] == lens.shape[0] == cu_seqlens_q.shape[0] - 1
    assert cu_seqlens_q[-1] <= q.shape[0], "rows past the end of q"
    result = torch.full((*q.shape[:2], v.shape[-1]), GARBAGE, dtype=q.dtype) if out is None else out
    lse = torch.full((q.shape[1], q.shape[0]), GARBAGE)
    for request in range(len(lens)):
        tokens = slice(int(cu_seqlens_q[request]), int(cu_seqlens_q[request + 1]))
        pages = torch.cat([v, k], -1)[:, :, 0]
        rows = paged(pages, table[request], int(lens[request]))
        query = torch.cat([q_v, q], -1)[tokens].double()
        own, own_lse = reference.attend(query, rows.double(), v.shape[-1], scale)
        result[tokens], lse[:, tokens] = own.to(q.dtype), own_lse.T.float()
    return result, lse


_SCHEDULER = """
import torch
from tests.support import fake_libraries as fakes
def get_scheduler_metadata(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens,
    qkv_dtype=None, headdim_v=None, cu_seqlens_q=None, page_size=None, causal=False, num_splits=0):
    assert batch_size == len(cache_seqlens) and num_splits >= 1 and causal
    return torch.cat([cache_seqlens, cu_seqlens_q])
"""
FLASH_ATTN_UPSTREAM = f"""{_SCHEDULER}
def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, qv=None, cache_seqlens=None, page_table=None,
    cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None, causal=False, scheduler_metadata=None, num_splits=0,
    return_softmax_lse=False):
    return fakes.flash_attn3(q, k_cache, v_cache, qv, cu_seqlens_q, cache_seqlens, page_table, softmax_scale,
        scheduler_metadata)
"""
FLASH_ATTN_VLLM = f"""{_SCHEDULER}
def fa_version_unsupported_reason(fa_version):
    return None
def flash_attn_varlen_func(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=None, q_v=None,
    softmax_scale=None, causal=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
    num_splits=0, fa_version=2):
    assert fa_version == 3
    return fakes.flash_attn3(q, k, v, q_v, cu_seqlens_q, seqused_k, block_table, softmax_scale, scheduler_metadata, out)
"""

# FlashInfer


class PlannedWrapper:
    """The wrapper's behaviour: it keeps host copies of row pointers and lengths from its plan, and the indices."""

    def plan_csr(self, form: dict[str, Tensor], **arguments: Any) -> None:
        """Keep what a plan keeps."""
        self.host = {name: form[name].tolist() for name in ("qo_indptr", "kv_indptr", "kv_len_arr")}
        self.indices, self.arguments = form["kv_indices"], arguments

    def attend(self, q: Sequence[Tensor], kv: Sequence[Tensor], out: Tensor, lse: Tensor, base_e: bool) -> None:
        """Write out and LSE; rows of requests without keys, and past the last request, stay as they were."""
        queries, cache = torch.cat(list(q), -1), torch.cat(list(kv), -1)
        assert cache.shape[1] == self.arguments["page_size"]
        assert self.host["qo_indptr"][-1] <= queries.shape[0], "rows past the end of q"
        assert lse.is_contiguous(), "its kernels write LSE as if it were dense"
        for request, kv_len in enumerate(self.host["kv_len_arr"]):
            tokens = slice(*self.host["qo_indptr"][request : request + 2])
            if kv_len:
                rows = paged(
                    cache, self.indices[self.host["kv_indptr"][request] :][: -(-kv_len // cache.shape[1])], kv_len
                )
                own, own_lse = reference.attend(
                    queries[tokens].double(), rows.double(), out.shape[-1], self.arguments["sm_scale"]
                )
                out[tokens] = own.to(out.dtype)
                lse[tokens] = (own_lse if base_e else own_lse / math.log(2)).float()


_TABLE_CALL = """
def trtllm_batch_decode_with_kv_cache_mla(query, kv_cache, workspace_buffer, qk_nope_head_dim, kv_lora_rank,
    qk_rope_head_dim, block_tables, seq_lens, max_seq_len, out=None, bmm1_scale=1.0, bmm2_scale=1.0, backend="auto",
    lse=None, return_lse=False):
    return fakes.table_call(query, kv_cache, block_tables, seq_lens, out, lse, bmm1_scale)
"""
FLASHINFER_06 = f"""
from tests.support import fake_libraries as fakes
class BatchMLAPagedAttentionWrapper(fakes.PlannedWrapper):
    def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto"):
        assert backend in ("fa2", "fa3")
    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size,
        causal, sm_scale, q_data_type, kv_data_type, use_profiler=False):
        form = dict(qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr)
        self.plan_csr(form, page_size=page_size, sm_scale=sm_scale)
    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, return_lse_base_on_e=False):
        self.attend((q_nope, q_pe), (ckv_cache, kpe_cache), out, lse, return_lse_base_on_e)
        return out, lse
{_TABLE_CALL}"""
FLASHINFER_07 = f"""
from tests.support import fake_libraries as fakes
class MLAPlanMetadata:
    @classmethod
    def csr(cls, qo_indptr, kv_indptr, kv_indices, kv_len_arr):
        return dict(qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_len_arr=kv_len_arr)
class BatchMLAPagedAttentionWrapper(fakes.PlannedWrapper):
    def __init__(self, float_workspace_buffer, use_cuda_graph=False, backend="auto"):
        assert backend in ("fa2", "fa3")
    def plan(self, qo_indptr=None, num_heads=None, head_dim_ckv=None, head_dim_kpe=None, page_size=None, causal=None,
        sm_scale=None, q_data_type=None, kv_data_type=None, *, metadata=None, query_layout=None, kv_cache_layout=None,
        lse_mode="none"):
        assert qo_indptr is None and query_layout == kv_cache_layout == "split" and lse_mode == "basee"
        self.plan_csr(metadata, page_size=page_size, sm_scale=sm_scale)
    def run(self, q_nope=None, q_pe=None, out=None, lse=None, return_lse=False, return_lse_base_on_e=False, *,
        query=None, kv_cache=None):
        assert q_nope is None and return_lse_base_on_e
        self.attend(query, kv_cache, out, lse, return_lse_base_on_e)
        return out, lse
{_TABLE_CALL}"""


def table_call(
    query: Tensor, cache: Tensor, table: Tensor, lens: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """LSE in base 2, [tokens, heads]; empty requests are not written."""
    assert table.shape[1] % (128 // cache.shape[1]) == 0
    queries = query.shape[1]
    for request in range(query.shape[0]):
        kv_len = int(lens[request])
        if kv_len:
            rows = paged(cache, table[request], kv_len)
            own, own_lse = reference.attend(query[request].double(), rows.double(), out.shape[-1], scale)
            out[request] = own.to(out.dtype)
            lse[request * queries : (request + 1) * queries] = (own_lse / math.log(2)).float()
    return out, lse


# AITER


class Kernel:
    """Stands for a Triton kernel."""

    def __init__(self, *arg_names: str) -> None:
        self.arg_names = list(arg_names)


def aiter_decode(given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Writes o; the first value returned means nothing; LSE is [tokens, heads]; empty requests are NaN."""
    q, o, lens = given["q"], given["o"], given["kv_indptr"].diff()
    assert q.is_contiguous() and o.is_contiguous() and given["kv_buffer"].is_contiguous()
    assert given.get("page_size", 1) == 1 and given.get("nhead_kv", 1) == 1
    assert q.shape[1] in (16, 32, 64, 128), "no kernel has such heads"
    work = given.get("work_meta_data")
    if work is None:
        splits = given["num_kv_splits"]
        expected = torch.arange(len(lens) + 1, dtype=torch.int32) * splits
        assert splits > 1 and torch.equal(given["num_kv_splits_indptr"], expected)
    else:
        assert work[0] == given["max_seqlen_q"], "the work was cut for another query length"
    lse = torch.full(q.shape[:2], torch.nan)
    cache = given["kv_buffer"][:, 0, 0]
    for request in range(len(lens)):
        first, last = given["kv_indptr"][request : request + 2].tolist()
        rows = cache[given["kv_indices"][first:last].long()]
        tokens = slice(*given["qo_indptr"][request : request + 2].tolist())
        own, own_lse = reference.attend(q[tokens].double(), rows.double(), o.shape[-1], given["sm_scale"])
        empty = own_lse == -torch.inf
        o[tokens] = own.masked_fill(empty[..., None], torch.nan).to(o.dtype)
        lse[tokens] = own_lse.masked_fill(empty, torch.nan).float()
    return torch.full_like(o, GARBAGE), lse if given.get("return_lse") else None


def aiter_metadata(given: dict[str, Any]) -> None:
    """Note the query length that the work is cut for."""
    assert given["max_seqlen_qo"] == given["uni_seqlen_qo"]
    given["work_metadata_ptrs"].fill_(given["max_seqlen_qo"])


def aiter_source(release: str, *, writes_lse: bool = True) -> str:
    """aiter.mla with the signatures of a release, `aiter` being itself."""
    signatures: dict[str, str | None] = {}
    for name, changes in RELEASES.items():
        signatures |= changes
        if name == release:
            break
    bodies = {
        "mla_decode_fwd": "return fakes.aiter_decode(dict(locals()))",
        "get_mla_metadata_info_v1": "return tuple(((4,), torch.int32) for _ in range(6))",
        "get_mla_metadata_v1": "fakes.aiter_metadata(dict(locals()))",
    }
    names = "'Mid_O', 'Final_lse'" if writes_lse else "'Mid_O'"
    lines = ["import sys, torch", "from tests.support import fake_libraries as fakes", "aiter = sys.modules[__name__]"]
    lines += [f"_fwd_kernel_stage2_asm = fakes.Kernel({names})"]
    lines += [f"def {n}({text}):\n    {bodies[n]}" for n, text in signatures.items() if text is not None]
    return "\n".join(lines) + "\n"


FLASH_MLA_FILES = ("flash_mla_interface.py",)
FLASHINFER_FILES = ("decode.py",)
AITER_FILES = ("ops/__init__.py",)


def install_aiter(folder: Path, release: str, **options: Any) -> None:
    """AMD's package, of a release."""
    install(folder, "aiter", "", distribution=("amd-aiter", release.removeprefix("v")), files=AITER_FILES)
    (folder / "aiter" / "mla.py").write_text(aiter_source(release, **options))
