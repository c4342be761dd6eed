"""Tiny random MLA models of transformers, one a family, and batches of prompts for them."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

# Those that an installed transformers may lack are skipped by name.
FAMILIES = (
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "longcat_flash",
    "minicpm3",
    "mistral4",
    "youtu",
)
SPARSE = ("deepseek_v32", "glm_moe_dsa")
VOCABULARY = 257

_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "zero_expert_num": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 128,
}


def tiny(family: str, device: str = "cpu", seed: int = 0, **changes: Any) -> Any:
    """A family's float32 model, eager; two of one seed are equal. ImportError where there is no such family."""
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_class: Any
    (model_class,) = (
        value
        for name, value in vars(module).items()
        if name.endswith("ForCausalLM") and inspect.isclass(value) and value.__module__ == module.__name__
    )
    config_class = model_class.config_class
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= set(getattr(config_class, "__dataclass_fields__", {}))
    config = config_class(**{name: value for name, value in (_WIDTHS | changes).items() if name in known})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return model_class(config).float().to(device).eval()


def left_padded(lens: tuple[int, ...] = (5, 11, 17), device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random prompts and their mask, [requests, longest] int64."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lens), max(lens), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lens):
        ids[row, -length:] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids.to(device), mask.to(device)
