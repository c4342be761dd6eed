"""LayerStep: where a step's tokens stand and are stored, worked out once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.scalars import check_bound
from portable_mla.decode.attention import MLAAttention
from portable_mla.metadata import PagedBatch
from portable_mla.mixed.attention import MixedAttention
from portable_mla.settings import Settings


@dataclass(frozen=True)
class LayerStep:
    """What all layers of a step share. attention: planned for this step.

    slots: [tokens] int64, `page * page_size + offset` of each new token, -1 for padding; positions: [tokens] int32 or
    int64, 0 for padding; cos_sin: `rope_table`, None without rope; longest_context: upper bound of what a prefill has
    in the cache before its new tokens, None for `MixedAttention.longest_context`; overlap: a layer computes its queries
    beside its cache rows, None: where `overlap_pays`.
    """

    attention: MLAAttention | MixedAttention
    slots: Tensor
    positions: Tensor
    cos_sin: Tensor | None
    longest_context: int | None = None
    overlap: bool | None = None

    @classmethod
    def of(
        cls, attention: MLAAttention | MixedAttention, batch: PagedBatch, tokens: int, cos_sin: Tensor | None,
        *, longest_context: int | None = None, overlap: bool | None = None,
    ) -> LayerStep:  # fmt: skip
        """From the batch that the attention was planned for and a `rope_table`; reads no length on the host.

        longest_context: a bound that the caller knows; one that is too small is a ValueError where lengths are on the
        host, and NaN rows and a fault of `MixedAttention.check` elsewhere. Without it the attention's own is used.
        overlap: PORTABLE_MLA_OVERLAP if unsaid. Raises IndexError for lengths in host memory over the page table.
        """
        if longest_context is not None:
            check_bound("longest_context", longest_context)
        slots, positions = token_places(batch, tokens, attention.request.shape.page_size)
        if batch.positions is not None:
            given = batch.positions[:tokens]
            positions = torch.nn.functional.pad(given, (0, tokens - len(given)))
        overlap = Settings.from_env().overlap if overlap is None else overlap
        return cls(attention, slots, positions, cos_sin, longest_context, overlap)


def token_places(batch: PagedBatch, tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Slots [tokens] int64, -1 for padding, and positions [tokens] int64, 0 for padding, of a batch's query tokens.

    A token beyond the page table has slot -1 on a GPU, where the plan reports its request; on a CPU it is an IndexError
    that names the request.
    """
    if not batch.size:
        nowhere = torch.full((tokens,), -1, dtype=torch.int64, device=batch.device)
        return nowhere, torch.zeros_like(nowhere)
    kv_lens, width = batch.kv_lens.long(), batch.block_table.shape[1]
    if batch.device.type == "cpu" and int(kv_lens.max()) > width * page_size:
        longest = int(kv_lens.argmax())
        raise IndexError(
            f"kv_lens: request {longest}: expected 0 to {width * page_size} (block_table holds {width * page_size} "
            f"tokens a request), got {int(kv_lens[longest])}"
        )
    lens = torch.full_like(kv_lens, batch.max_query_len) if batch.query_lens is None else batch.query_lens.long()
    ends = torch.cumsum(lens.clamp(min=0), 0)  # as the plan counts them
    token = torch.arange(tokens, dtype=torch.int64, device=batch.device)
    request = torch.searchsorted(ends, token, right=True)
    padding = request >= batch.size
    request = request.clamp(max=batch.size - 1)
    position = kv_lens[request] - ends[request] + token
    padding = padding | (position < 0)
    position = position.masked_fill(padding, 0)
    column = position // page_size
    slots = batch.block_table[request, column.clamp(max=width - 1)].long() * page_size + position % page_size
    return slots.masked_fill(padding | (column >= width), -1), position
