"""attend: transformers' attention function over latents, as patched MLA modules call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from portable_mla.integrations.transformers.cache import NewRows, up_projections
from portable_mla.layer.projections import absorb, expand

NAME = "portable_mla"
_MOST_ABSORBED = 8  # query tokens; more are cheaper against expanded keys

# Keywords that change no result. Any other that is not None is refused: a model may mean something by it.
_WITHOUT_EFFECT = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "num_items_in_batch", "output_hidden_states",
        "output_router_logits", "return_dict", "logits_to_keep", "past_key_values",
    }
)  # fmt: skip


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewRows,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, n, nope + rope]; key: the latents [batch, 1, kv_len, latent] of a cache of transformers, or
    the new rows of a LatentCache; value: rotated keys [batch, 1, kv_len, rope]; attention_mask [batch, 1, n, kv_len].

    Returns [batch, n, heads, v_dim] and no weights. Raises NotImplementedError for a keyword that asks for something
    else, and ValueError without a mask, which would let tokens see the future.
    """
    refuse_keywords(keywords)
    scale = softmax_scale_of(module, scaling)
    if attention_mask is None:
        raise ValueError(
            f"attention_mask: expected [batch, 1, queries, keys], got None; a mask function is registered as {NAME!r} "
            "by patch(model), and without one every token would see the future"
        )
    if isinstance(key, NewRows):
        if dropout:
            raise NotImplementedError(f"dropout: a LatentCache expects 0, got {dropout}")
        return key.attend(module, query, value, attention_mask, scale), None
    check_latents(module, key)
    if attention_mask.dtype == torch.bool:
        hidden = torch.full_like(attention_mask, torch.finfo(query.dtype).min, dtype=query.dtype)
        attention_mask = hidden.masked_fill(attention_mask, 0.0)
    if query.shape[2] > _MOST_ABSORBED:
        return _expanded(module, query, key, value, attention_mask, scale, dropout), None
    return _absorbed(module, query, key, value, attention_mask, scale, dropout), None


def refuse_keywords(keywords: dict[str, Any], *known: str) -> None:
    """Raises NotImplementedError for one that is set and neither known nor without effect."""
    for name, value in keywords.items():
        if name in known or name in _WITHOUT_EFFECT or value is None or value is False:
            continue
        if name == "is_causal" and value is True:
            continue
        raise NotImplementedError(
            f"{name}: the model asks its attention for this and {NAME} does not implement it, got "
            f"{type(value).__name__}; unpatch(model) to go on without {NAME}"
        )


def softmax_scale_of(module: nn.Module, scaling: float | None) -> float:
    """The scale that a module gives; raises ValueError where it gives none."""
    if scaling is None:
        raise ValueError(f"scaling: expected a float from {type(module).__name__}, got None")
    return scaling


def check_latents(module: nn.Module, key: Tensor) -> None:
    """The key is one latent for all heads: the module was patched."""
    if key.dim() != 4 or key.shape[1] != 1 or key.shape[3] != module.kv_lora_rank:
        raise ValueError(
            f"key: expected latents [batch, 1, keys, {module.kv_lora_rank}], got {list(key.shape)}; call "
            "portable_mla.integrations.transformers.patch(model)"
        )


def _absorbed(
    module: nn.Module, query: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    batch, heads, n, _ = query.shape
    w_uk, w_uv = up_projections(module, heads)
    q = absorb(query.transpose(1, 2).flatten(0, 1), w_uk).unflatten(0, (batch, n)).transpose(1, 2)
    scores = (q @ torch.cat([latent, k_pe], dim=3).transpose(2, 3)) * scale
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    out = (weights @ latent).transpose(1, 2).flatten(0, 1)
    return expand(out, w_uv).reshape(batch, n, heads, -1)


def _expanded(
    module: Any, query: Tensor, latent: Tensor, k_pe: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    k, v = type(module).expand_kv(module, latent, k_pe)
    out = nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)
