"""LayerStep: where a step's tokens stand and are stored, worked out once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.attention import MLAAttention
from portable_mla.metadata import PagedBatch
from portable_mla.mixed import MixedAttention
from portable_mla.settings import Settings


@dataclass(frozen=True)
class LayerStep:
    """What all layers of a step share. attention: planned for this step.

    slots: [tokens] int64, `page * page_size + offset` of each new token, -1 for padding; positions: [tokens] int32 or
    int64, 0 for padding; cos_sin: `rope_table`, None without rope; longest_context: upper bound of what a prefill has
    in the cache before its new tokens, 0 if none has any; overlap: a layer computes its queries beside its cache rows,
    None: where `overlap_pays`.
    """

    attention: MLAAttention | MixedAttention
    slots: Tensor
    positions: Tensor
    cos_sin: Tensor | None
    longest_context: int = 0
    overlap: bool | None = None

    @classmethod
    def of(
        cls, attention: MLAAttention | MixedAttention, batch: PagedBatch, tokens: int, cos_sin: Tensor | None,
        *, longest_context: int = 0, overlap: bool | None = None,
    ) -> LayerStep:  # fmt: skip
        """From the batch that the attention was planned for and a `rope_table`; reads no length on the host. overlap:
        PORTABLE_MLA_OVERLAP if unsaid."""
        slots, positions = token_places(batch, tokens, attention.request.shape.page_size)
        if batch.positions is not None:
            positions = batch.positions[:tokens]
        overlap = Settings.from_env().overlap if overlap is None else overlap
        return cls(attention, slots, positions, cos_sin, longest_context, overlap)


def token_places(batch: PagedBatch, tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Slots [tokens] int64, -1 for padding, and positions [tokens] int64, 0 for padding, of a batch's query tokens."""
    kv_lens = batch.kv_lens.long()
    lens = torch.full_like(kv_lens, batch.max_query_len) if batch.query_lens is None else batch.query_lens.long()
    ends = torch.cumsum(lens, 0)
    token = torch.arange(tokens, device=batch.device)
    request = torch.searchsorted(ends, token, right=True)
    padding = request >= batch.size
    request = request.clamp(max=max(batch.size - 1, 0))
    position = kv_lens[request] - ends[request] + token
    padding = padding | (position < 0)
    position = position.masked_fill(padding, 0)
    slots = batch.block_table[request, position // page_size].long() * page_size + position % page_size
    return slots.masked_fill(padding, -1), position
