"""LatentCache: a cache of transformers whose layers are pages of latent rows, attended to by this library's kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from portable_mla.cache.paged_cache import PagedLatentCache
from portable_mla.cache.write import write_latent
from portable_mla.core.cache_format import cache_format_of
from portable_mla.core.shape import Capacity, MLAShape
from portable_mla.decode.attention import MLAAttention
from portable_mla.errors import CacheFull
from portable_mla.integrations.transformers.masks import padding_of
from portable_mla.layer.projections import absorb, check_plain_linear, expand, split_up_projection
from portable_mla.layer.step import token_places
from portable_mla.prefill.api import mla_prefill
from portable_mla.runtime.torch_ops import without_gradients


@dataclass(frozen=True)
class NewRows:
    """What a layer's `update` gives in place of all latents so far: the new ones, still to be stored."""

    layer: LatentLayer
    latent: Tensor  # [batch, 1, n, latent]

    def attend(self, module: nn.Module, query: Tensor, k_pe: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Store the rows and attend to all: [batch, n, heads, v_dim]."""
        return self.layer.cache.attend(self, module, query, k_pe, mask, scale)

    @property
    def shape(self) -> NoReturn:
        """Asked for by modules that expect a tensor."""
        raise RuntimeError("a LatentCache serves patched models: call portable_mla.integrations.transformers.patch")


class LatentLayer(CacheLayerMixin):
    """One layer of a LatentCache."""

    is_sliding = False

    def __init__(self, cache: LatentCache, index: int) -> None:
        super().__init__()
        self.cache, self.index, self.seen = cache, index, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The cache allocates all layers at once, when the first attends."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Tensor]:
        """NewRows of the latents [batch, 1, n, latent], which are still to be stored, and the rotated keys."""
        self.is_initialized = True
        self.seen += key_states.shape[2]
        return NewRows(self, key_states), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask must cover, and where they begin."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far, those of left padding too."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: pages are the limit, and CacheFull is raised there."""
        return -1


@dataclass(frozen=True)
class _Step:
    """What the layers of one forward pass share."""

    n: int  # query tokens of a request, those of left padding too
    lens: list[int]  # without padding
    tokens: Tensor | None  # indices into [batch * n] of those that are no padding; None: all
    slots: Tensor  # [tokens] int64
    cu_seqlens: Tensor  # [batch + 1] int32
    attention: MLAAttention | None  # None: a prefill that has no context


class LatentCache(Cache):
    """Pages of latent rows for one batch of `generate`, which takes it as past_key_values. The model must be patched.

    config: the model's; pages, page_size: of each layer's pool, allocated in the model's dtype on its device when it is
    first used. Left padding takes no room. backend: as in MLAAttention. Beam search works and copies pages; cropping,
    which assisted generation needs, does not. A mask that is not causal with left padding is refused by ValueError, a
    pool that is too small by CacheFull.
    """

    def __init__(self, config: Any, *, pages: int, page_size: int = 64, backend: str | None = None) -> None:
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
        if not hasattr(config, "kv_lora_rank") or kinds:
            found = (
                f"layers of {', '.join(sorted(kinds))}" if kinds else f"{type(config).__name__} without kv_lora_rank"
            )
            raise ValueError(f"config: expected a model whose layers are all MLA with full attention, got {found}")
        if pages < 1 or page_size < 1:
            raise ValueError(f"pages, page_size: expected at least 1, got {pages} and {page_size}")
        super().__init__(layers=[LatentLayer(self, index) for index in range(config.num_hidden_layers)])
        self._pages, self._page_size, self._backend = pages, page_size, backend
        self._paged: PagedLatentCache | None = None
        self._names = itertools.count()
        self._requests: list[int] = []  # names in the pool, in the batch's order
        self._planned = 0  # tokens that the latest step covers
        self._step: _Step | None = None
        self._attention: MLAAttention | None = None

    @property
    def backend(self) -> str | None:
        """Name of the backend that serves decodes; None before the first."""
        return None if self._attention is None else self._attention.backend

    def memory(self) -> dict[str, int]:
        """Bytes of all layers: of the pages in use, and of the pool."""
        if self._paged is None:
            return {"in use": 0, "pool": 0}
        pool, storage = self._paged.pool, self._paged.storage
        return {"in use": storage.nbytes // pool.total * (pool.total - pool.free_pages), "pool": storage.nbytes}

    @without_gradients()
    def attend(
        self, rows: NewRows, module: Any, query: Tensor, k_pe: Tensor, mask: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        """Store one layer's new rows and attend: query [batch, heads, n, nope + rope] -> [batch, n, heads, v_dim]."""
        if module.training:
            raise NotImplementedError("a LatentCache serves inference: call model.eval()")
        batch, heads, n, _ = query.shape
        paged = self._open(module, query)
        if self._planned < rows.layer.seen:
            try:
                self._step = self._begin(paged, mask, n, rows.layer.seen)
            except (CacheFull, ValueError):
                rows.layer.seen -= n  # nothing was stored: the step may be tried again
                raise
            self._planned = rows.layer.seen
        step, kv_cache = self._step, paged[rows.layer.index]
        assert step is not None and step.n == n, "the first layer planned this step"
        q, latent, new_pe = (
            tensor.transpose(1, 2).flatten(0, 1) if step.tokens is None
            else tensor.transpose(1, 2).flatten(0, 1)[step.tokens]
            for tensor in (query, rows.latent, k_pe)
        )  # fmt: skip
        latent, new_pe = latent[:, 0], new_pe[:, 0]
        write_latent(kv_cache, step.slots, latent, new_pe if new_pe.shape[1] else None)
        if step.attention is None:
            out = prefill_expanded(module, q, latent, new_pe, step.cu_seqlens, max(step.lens), scale)
        else:
            w_uk, w_uv = up_projections(module, heads)
            result, _ = step.attention(absorb(q, w_uk), kv_cache, softmax_scale=scale)
            out = expand(result, w_uv)
        if step.tokens is not None:
            padded = out.new_zeros(batch * n, *out.shape[1:])
            padded[step.tokens] = out
            out = padded
        return out.reshape(batch, n, *out.shape[1:])

    def _open(self, module: Any, query: Tensor) -> PagedLatentCache:
        """The pages, allocated once."""
        if self._paged is None:
            shape = MLAShape(
                query.shape[1], module.kv_lora_rank, module.qk_rope_head_dim, self._page_size, query.dtype,
                cache_format_of(query.dtype), module.qk_nope_head_dim, module.v_head_dim,
            )  # fmt: skip
            self._paged = PagedLatentCache(shape, self._pages, layers=len(self.layers), device=query.device)
        return self._paged

    def _begin(self, paged: PagedLatentCache, mask: Tensor, n: int, total: int) -> _Step:
        """Give the new tokens room and plan; waits for the device once, as `generate` does each step anyway."""
        kv_lens = [total - padding for padding in padding_of(mask, n, total)]
        before = [paged.pool.kv_len(name) for name in self._requests] or [0] * len(kv_lens)
        lens = [after - old for after, old in zip(kv_lens, before, strict=True)]
        if any(old and new != n for old, new in zip(before, lens, strict=True)):
            raise ValueError(f"attention_mask: expected {n} new tokens of each request that has any, got {lens}")
        size = self._page_size
        paged.pool.check_free(sum(-(-after // size) + old // -size for after, old in zip(kv_lens, before, strict=True)))
        if not self._requests:
            self._requests = [next(self._names) for _ in kv_lens]
            for name in self._requests:
                paged.allocate(name, 0)
        for name, new in zip(self._requests, lens, strict=True):
            paged.extend(name, new)
        uniform = min(lens) == n
        batch = paged.batch(self._requests, query_lens=None if uniform else lens, max_query_len=n)
        device, offsets = batch.device, [0, *itertools.accumulate(lens)]
        tokens = None
        if not uniform:
            tokens = torch.cat(
                [
                    torch.arange(n * i + n - new, n * i + n, dtype=torch.int64, device="cpu")
                    for i, new in enumerate(lens)
                ]
            ).to(device)
        attention = None
        if total > n or n == 1:
            attention = self._attention_for(paged, len(lens), n, uniform=uniform)
            attention.plan(batch)
        slots, _ = token_places(batch, offsets[-1], self._page_size)
        return _Step(n, lens, tokens, slots, torch.tensor(offsets, dtype=torch.int32, device=device), attention)

    def _attention_for(self, paged: PagedLatentCache, batch: int, n: int, *, uniform: bool) -> MLAAttention:
        """The attention of the step before where it fits."""
        context, layer_bytes = self._pages * self._page_size, paged.storage[0].nbytes
        capacity = Capacity(batch, batch * n, n, context, self._pages, layer_bytes)
        kept = self._attention
        if kept is None or kept.request.capacity != capacity or kept.request.uniform_queries != uniform:
            device = paged.storage.device
            kept = MLAAttention(paged.shape, capacity, device=device, uniform_queries=uniform, backend=self._backend)
            self._attention = kept
        return kept

    def _select(self, rows: Sequence[int]) -> None:
        """Make the batch the given rows of it, which may repeat; their pages are copied."""
        if self._paged is None or list(rows) == list(range(len(self._requests))):
            return
        paged, old = self._paged, self._requests
        paged.pool.check_free(sum(len(paged.pool.pages(old[row])) for row in rows))
        kept = [next(self._names) for _ in rows]
        for name, row in zip(kept, rows, strict=True):
            paged.allocate(name, paged.pool.kv_len(old[row]))
            paged.storage[:, list(paged.pool.pages(name))] = paged.storage[:, list(paged.pool.pages(old[row]))]
        for name in old:
            paged.free(name)
        self._requests = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self._select(torch.arange(len(self._requests), dtype=torch.int64, device="cpu")[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._select([row for row in range(len(self._requests)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Not implemented."""
        raise NotImplementedError("crop: a LatentCache cannot drop tokens, so it cannot serve assisted generation")

    def reset(self) -> None:
        """Return all pages."""
        for name in self._requests:
            assert self._paged is not None, "requests have pages"
            self._paged.free(name)
        self._requests, self._planned, self._step = [], 0, None
        layers: list[Any] = self.layers
        for layer in layers:
            layer.seen = 0


def up_projections(module: Any, heads: int) -> tuple[Tensor, Tensor]:
    """W_UK and W_UV of a module, views; NotImplementedError where an adapter was put on them after `patch`."""
    check_plain_linear(f"{type(module).__name__}.kv_b_proj of layer {module.layer_idx}", module.kv_b_proj)
    return split_up_projection(module.kv_b_proj.weight, heads, module.qk_nope_head_dim)


def prefill_expanded(
    module: Any, q: Tensor, latent: Tensor, k_pe: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> Tensor:
    """Ragged prompts without a context, q [tokens, heads, nope + rope] -> [tokens, heads, v_dim]."""
    up = module.kv_b_proj(latent).unflatten(1, (q.shape[1], -1))
    k_nope, v = up.split([module.qk_nope_head_dim, module.v_head_dim], dim=2)
    out, _ = mla_prefill(
        q, k_nope, k_pe, v, cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest, softmax_scale=scale
    )
    return out
