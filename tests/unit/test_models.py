"""The model zoo: scales, rotations and which attention a model has."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from portable_mla import MODELS, Model, Yarn

# (nope + rope, factor, mscale_all_dim) as the publishers' configurations have them; factor 1 where there is no YaRN.
PUBLISHED = {
    "deepseek-v2-lite": (192, 40, 0.707),
    "deepseek-v3": (192, 40, 1.0),
    "deepseek-v3.2": (192, 40, 1.0),
    "kimi-k2": (192, 32, 1.0),
    "kimi-k2-0905": (192, 64, 1.0),
    "kimi-k2.5": (192, 64, 1.0),
    "kimi-k2.6": (192, 64, 1.0),
    "kimi-k3": (192, 1, 1.0),
    "glm-4.7-flash": (256, 1, 1.0),
    "glm-5": (256, 1, 1.0),
    "glm-5.2": (256, 1, 1.0),
    "glm-5.3-flash": (256, 1, 1.0),
    "longcat-flash": (192, 1, 1.0),
    "minicpm3-4b": (96, 1, 1.0),
    "youtu-llm-2b": (192, 1, 1.0),
}
UNCONFIRMED = ("mistral-small-4", "a.x-k2", "a.x-k2-light")
# Families of transformers whose configuration's defaults are a model of ours.
DEFAULTS = {
    "deepseek_v3": "deepseek-v3",
    "deepseek_v32": "deepseek-v3.2",
    "glm4_moe_lite": "glm-4.7-flash",
    "glm_moe_dsa": "glm-5",
    "longcat_flash": "longcat-flash",
    "minicpm3": "minicpm3-4b",
    "mistral4": "mistral-small-4",
    "axk2": "a.x-k2-light",
    "youtu": "youtu-llm-2b",
}


def test_every_model_has_a_published_scale_or_is_known_to_have_none() -> None:
    assert {*PUBLISHED, *UNCONFIRMED} == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_softmax_scale_has_yarns_factor(name: str) -> None:
    width, factor, weight = PUBLISHED[name]
    assert MODELS[name].softmax_scale == pytest.approx(
        width**-0.5 * (1 + 0.1 * weight * math.log(factor)) ** 2, rel=1e-12
    )


@pytest.mark.parametrize("name", UNCONFIRMED)
def test_a_scale_that_is_not_confirmed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="softmax_scale: YaRN's factor in the scale of .* is not confirmed"):
        MODELS[name].softmax_scale  # noqa: B018 (the property raises)


def test_a_model_of_widths_alone_has_no_scale() -> None:
    with pytest.raises(ValueError, match="softmax_scale: YaRN's factor in the scale of Mine is not confirmed"):
        Model("Mine", 16, 512, 64, 128, 128).softmax_scale  # noqa: B018 (the property raises)
    with pytest.raises(ValueError, match="softmax_scale: Mine does not state its nope width"):
        Model("Mine", 16, 512, 64, None, None, mscale=1.0).softmax_scale  # noqa: B018 (the property raises)


@pytest.mark.parametrize("name", ["kimi-k3", "glm-5.3-flash"])
def test_a_model_without_rotation_has_no_table(name: str) -> None:
    with pytest.raises(ValueError, match="rope_table: .* has no rotation"):
        MODELS[name].rope_table(4)


@pytest.mark.parametrize("name", ["kimi-k2.5", "minicpm3-4b", "a.x-k2"])
def test_a_rotation_that_is_not_confirmed_has_no_table(name: str) -> None:
    with pytest.raises(ValueError, match="rope_table: the rotation of .* is not confirmed"):
        MODELS[name].rope_table(4)


def test_ax_k2_is_not_its_light_sibling() -> None:
    large, light = MODELS["a.x-k2"], MODELS["a.x-k2-light"]
    assert (large.heads, large.latent_dim, large.rope_dim, large.nope_dim, large.v_dim) == (64, 512, 64, 128, 128)
    assert (light.heads, light.latent_dim, light.rope_dim, light.nope_dim, light.v_dim) == (32, 128, 32, 64, 64)


def test_a_sparse_model_says_up_to_where_dense_attention_is_exact() -> None:
    sparse = {name for name, model in MODELS.items() if model.why_not_served is not None}
    assert sparse == {"deepseek-v3.2", "glm-5", "glm-5.2", "glm-5.3-flash", "a.x-k2", "a.x-k2-light"}
    assert "dense attention equals it up to 2048 tokens of context alone" in str(MODELS["glm-5"].why_not_served)


def config_of(family: str, **changes: Any) -> Any:
    """A family's configuration in transformers, with its defaults; skips where it is not installed."""
    pytest.importorskip("transformers")
    try:
        module: Any = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    except ImportError:
        pytest.skip(f"transformers has no {family}")
    config_class: Any = next(getattr(module, name) for name in module.__all__ if name.endswith("Config"))
    return config_class(**changes)


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_widths_are_those_of_transformers(family: str) -> None:
    config, model = config_of(family), MODELS[DEFAULTS[family]]
    assert model.heads == config.num_attention_heads
    assert model.latent_dim == config.kv_lora_rank
    assert model.rope_dim == config.qk_rope_head_dim
    assert model.nope_dim == config.qk_nope_head_dim
    assert model.v_dim == config.v_head_dim
    assert model.q_lora_rank == config.q_lora_rank
    assert model.norm_eps == config.rms_norm_eps
    assert model.layers in (None, config.num_hidden_layers)
    assert model.sparse_top_k == getattr(config, "index_topk", None)


def yarn_of(model: Model, mscale_all_dim: float) -> dict[str, Any]:
    """A model's rotation in the words of a configuration."""
    assert model.yarn is not None
    return {
        "rope_type": "yarn",
        "rope_theta": model.rope_theta,
        "factor": model.yarn.factor,
        "original_max_position_embeddings": model.yarn.original_context,
        "beta_fast": model.yarn.beta_fast,
        "beta_slow": model.yarn.beta_slow,
        "mscale": mscale_all_dim,
        "mscale_all_dim": mscale_all_dim,
    }


@pytest.mark.parametrize("name", ["deepseek-v3", "kimi-k2", "kimi-k2-0905", "kimi-k2.6"])
def test_scale_and_table_are_those_of_transformers_attention(name: str) -> None:
    model = MODELS[name]
    config = config_of("deepseek_v3", num_attention_heads=model.heads, rope_parameters=yarn_of(model, 1.0))
    modeling: Any = importlib.import_module("transformers.models.deepseek_v3.modeling_deepseek_v3")
    with torch.device("meta"):
        attention = modeling.DeepseekV3Attention(config, 0)
    assert model.softmax_scale == pytest.approx(attention.scaling, rel=1e-9)
    cos, sin = modeling.DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(8)[None])
    theirs = torch.cat([cos[0, :, :32], sin[0, :, :32]], 1)
    torch.testing.assert_close(model.rope_table(8), theirs, rtol=0, atol=2e-6)


def test_the_kimi_k2_of_july_and_of_september_stretch_differently() -> None:
    july, september = MODELS["kimi-k2"], MODELS["kimi-k2-0905"]
    assert (july.yarn, september.yarn) == (Yarn(32.0, 4096, 1.0, 1.0), Yarn(64.0, 4096, 1.0, 1.0))
    assert july.softmax_scale < september.softmax_scale
