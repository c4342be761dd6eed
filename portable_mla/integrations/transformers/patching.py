"""patch, unpatch and continuous_batching: a model's MLA modules attend over latents, and are put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from portable_mla.integrations.transformers.attention import NAME, attend
from portable_mla.integrations.transformers.paged import PAGED_NAME, attend_paged
from portable_mla.integrations.transformers.verify import Recorded, check_modules, record
from portable_mla.integrations.transformers.version import check_continuous_batching
from portable_mla.layer.projections import check_plain_linear

_ORIGINAL = "portable_mla_original_attention"  # attribute of a patched model: the name to put back
_CHANGING_ROPE = ("dynamic", "longrope")  # they compute frequencies anew from config.head_dim


def patch(model: nn.Module, verify: bool = True) -> int:
    """Let every MLA module of a model attend over latents; its weights and config stay as they are.

    verify: compare every module on a small batch with what it gave before, and raise RuntimeError, with the model
    unpatched, where they differ. Returns how many modules there are.
    Raises ValueError for a model without MLA and NotImplementedError for one whose attention is more than MLA.
    """
    modules = mla_modules(model)
    if hasattr(model, _ORIGINAL):
        raise ValueError("model: is patched already; unpatch(model) first")
    recorded: Recorded | None = record(model, modules) if verify else None
    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(PAGED_NAME, attend_paged)
    AttentionMaskInterface.register(NAME, eager_mask)
    owner = _owner(model, modules)
    setattr(model, _ORIGINAL, owner.config._attn_implementation)
    try:
        for module in modules.values():
            module.expand_kv = _as_cached
        owner.set_attn_implementation(NAME)
        if recorded is not None:
            check_modules(model, modules, recorded)
    except BaseException:
        _put_back(model, modules)
        raise
    return len(modules)


def unpatch(model: nn.Module) -> None:
    """Put back what `patch` changed."""
    if not hasattr(model, _ORIGINAL):
        raise ValueError("model: is not patched")
    _put_back(model, _patched_modules(model))


def _put_back(model: nn.Module, modules: dict[str, Any]) -> None:
    for module in modules.values():
        module.__dict__.pop("expand_kv", None)
    _owner(model, modules).set_attn_implementation(getattr(model, _ORIGINAL))
    delattr(model, _ORIGINAL)


def _patched_modules(model: nn.Module) -> dict[str, Any]:
    """What was patched, whatever was put on its projections since."""
    return {name: module for name, module in model.named_modules() if "expand_kv" in module.__dict__}


@contextmanager
def continuous_batching(model: Any) -> Iterator[None]:
    """Inside, `model.generate_batch` of a patched model keeps one latent row a token. The config says so meanwhile, by
    num_key_value_heads and head_dim, from which transformers sizes its cache; both are put back. transformers allocates
    a pool of keys and one of values, each as wide as a row, and counts both against its memory limit; the first step of
    a layer drops the second, so half of the limit stays unused.

    Raises ValueError for a model that is not patched, and NotImplementedError for RoPE that reads head_dim at each step
    and for transformers from 5.18 on.
    """
    if not hasattr(model, _ORIGINAL):
        raise ValueError("model: is not patched; call patch(model) first")
    check_continuous_batching()
    config = _owner(model, mla_modules(model)).config
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in _CHANGING_ROPE:
        raise NotImplementedError(f"rope_type: continuous batching cannot serve {kind!r}, which reads config.head_dim")
    changed = {"num_key_value_heads": 1, "head_dim": config.kv_lora_rank + config.qk_rope_head_dim}
    kept = {name: getattr(config, name) for name in changed if hasattr(config, name)}
    for name, value in changed.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in changed:
            if name in kept:
                setattr(config, name, kept[name])
            else:
                delattr(config, name)


def mla_modules(model: nn.Module) -> dict[str, Any]:
    """A model's MLA modules by name, each one of a kind that can be served."""
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "expand_kv") and hasattr(module, "kv_lora_rank")
    }
    if not found:
        raise ValueError(f"model: expected MLA modules (with kv_lora_rank and expand_kv), found none in {type(model)}")
    for name, module in found.items():
        more = next((part for part in ("indexer", "sinks") if getattr(module, part, None) is not None), None)
        if more is not None or getattr(module.config, "index_topk", None):
            raise NotImplementedError(
                f"{name}: {type(module).__name__} has {more or 'index_topk'}: {NAME} serves dense MLA alone, and "
                "attending to all keys would silently give other results"
            )
        check_plain_linear(f"{name}.kv_b_proj", getattr(module, "kv_b_proj", None))
    return found


def _owner(model: nn.Module, modules: dict[str, Any]) -> Any:
    """The outermost model of transformers whose config the modules have."""
    config = next(iter(modules.values())).config
    for part in model.modules():
        if getattr(part, "config", None) is config and hasattr(part, "set_attn_implementation"):
            return part
    raise ValueError(f"model: expected a model of transformers around its MLA modules, got {type(model).__name__}")


def _as_cached(latent: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
    """In place of expand_kv: the attention takes latents."""
    return latent, k_pe
