"""attend_paged: the attention function of transformers' continuous batching, over one pool of latent rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from portable_mla.core.device import is_capturing
from portable_mla.decode.api import mla_decode
from portable_mla.integrations.transformers.attention import (
    NAME,
    check_latents,
    refuse_keywords,
    softmax_scale_of,
)
from portable_mla.integrations.transformers.cache import prefill_expanded, up_projections
from portable_mla.layer.projections import absorb, expand
from portable_mla.runtime.torch_ops import without_gradients

PAGED_NAME = f"paged|{NAME}"
_KNOWN = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
)


@without_gradients()
def attend_paged(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Store the new rows and attend. query [1, heads, tokens, nope + rope]; key [1, 1, tokens, latent]; value
    [1, 1, tokens, rope]; the keywords are those of transformers' PagedAttentionCache.

    Returns [1, tokens, heads, v_dim]. Steps whose requests all begin take the expanded form, others the absorbed one.
    """
    if cache is None:
        raise ValueError(f"cache: {PAGED_NAME} serves continuous batching alone, got None; use {NAME}")
    refuse_keywords({name: value for name, value in keywords.items() if name != "dropout"}, *_KNOWN)
    if keywords.get("dropout") or attention_mask is not None:
        raise NotImplementedError(f"{PAGED_NAME}: expected no dropout and no mask")
    if is_capturing(query):
        raise NotImplementedError(f"{PAGED_NAME}: a step's lengths are read on the host; pass use_cuda_graph=False")
    check_latents(module, key)
    scale = softmax_scale_of(module, scaling)
    group, index = cache.layer_index_to_group_indices[module.layer_idx]
    if cache.sliding_windows[module.layer_idx] != 1:
        raise NotImplementedError(f"layer {module.layer_idx}: {PAGED_NAME} serves full attention, not a sliding window")
    pool = _pool(cache, index, key.shape[3] + value.shape[3])
    q, latent, k_pe = query[0].transpose(0, 1), key[0, 0], value[0, 0]
    write, read = keywords["write_index"][group], keywords["read_index"][group]
    pool.index_copy_(0, write, torch.cat([latent, k_pe], dim=1))
    starts_q, starts_k = keywords["cu_seq_lens_q"], keywords["cu_seq_lens_k"]
    longest_q, longest_k = keywords["max_seqlen_q"], keywords["max_seqlen_k"]
    if isinstance(starts_k, dict):
        starts_k, longest_k = starts_k["full_attention"], longest_k["full_attention"]
    if read.numel() == 0:
        return prefill_expanded(module, q, latent, k_pe, starts_q, longest_q, scale)[None], None
    w_uk, w_uv = up_projections(module, q.shape[1])
    out, _ = mla_decode(
        absorb(q, w_uk), pool.unflatten(0, (-1, cache.block_size)),
        _block_table(read, starts_k, longest_k, cache.block_size), starts_k.diff(), softmax_scale=scale,
        latent_dim=latent.shape[1], query_lens=starts_q.diff(), max_query_len=longest_q,
    )  # fmt: skip
    return expand(out, w_uv)[None], None


def _pool(cache: Any, index: int, width: int) -> Tensor:
    """One layer's rows [slots, width]. transformers allocates a pool of keys and one of values: both become the first,
    which holds the whole row."""
    rows = cache.key_cache[index]
    if tuple(rows.shape[1:]) != (1, width):
        raise ValueError(
            f"cache: expected rows of 1 head of {width}, got {list(rows.shape[1:])}; wrap generate_batch in "
            "portable_mla.integrations.transformers.continuous_batching(model)"
        )
    cache.value_cache[index] = rows
    only: Tensor = rows[:, 0]
    return only


def _block_table(read: Tensor, starts: Tensor, longest: int, block_size: int) -> Tensor:
    """[requests, width] int32 from the slots of all tokens, request by request; a block's tokens are adjacent."""
    columns = torch.arange(0, longest, block_size, device=read.device, dtype=torch.int64)
    first = (starts[:-1, None].long() + columns).clamp(max=read.shape[0] - 1)
    return (read[first] // block_size).int()
