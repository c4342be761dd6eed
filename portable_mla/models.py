"""The model zoo: attention of published MLA models, by name, from their publishers' configurations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.geometry import softmax_scale, yarn_mscale
from portable_mla.core.rope import Yarn, rope_table
from portable_mla.core.shape import MLAShape


@dataclass(frozen=True)
class Model:
    """One model's attention. What its publisher does not state, or what could not be confirmed, is None.

    layers: those that have MLA. norm_eps: the configuration's rms_norm_eps (the modules of DeepSeek and of many
    others norm latents with 1e-6 whatever it says). mscale: YaRN's temperature, whose square is in the softmax scale:
    `yarn_mscale` of factor and mscale_all_dim, 1 without YaRN. yarn: None beside a rope_theta is plain rotation.
    rotated: False where nothing is rotated; rows may have a rope part all the same. sparse_top_k: the keys that a
    query token attends to in a model of sparse attention; None attends to all.
    """

    title: str
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int | None
    v_dim: int | None
    q_lora_rank: int | None = None
    layers: int | None = None
    norm_eps: float | None = None
    mscale: float | None = None
    rope_theta: float | None = None
    yarn: Yarn | None = None
    rotated: bool = True
    sparse_top_k: int | None = None

    def shape(
        self,
        *,
        tensor_parallel: int = 1,
        page_size: int = 64,
        q_dtype: torch.dtype = torch.bfloat16,
        cache_format: CacheFormat = CacheFormat.bf16,
    ) -> MLAShape:
        """One tensor-parallel rank's shape; raises ValueError if the heads do not divide."""
        if tensor_parallel < 1 or self.heads % tensor_parallel:
            allowed = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ValueError(
                f"tensor_parallel: {self.title} has {self.heads} heads; expected one of {allowed}, "
                f"got {tensor_parallel}"
            )
        heads = self.heads // tensor_parallel
        return MLAShape(
            heads, self.latent_dim, self.rope_dim, page_size, q_dtype, cache_format, self.nope_dim, self.v_dim
        )

    @property
    def softmax_scale(self) -> float:
        """(nope + rope)**-0.5 * mscale**2, YaRN's factor included; ValueError where it is not confirmed."""
        if self.nope_dim is None:
            raise ValueError(f"softmax_scale: {self.title} does not state its nope width")
        if self.mscale is None:
            raise ValueError(
                f"softmax_scale: YaRN's factor in the scale of {self.title} is not confirmed; "
                "compute it from the checkpoint's configuration with softmax_scale and yarn_mscale"
            )
        return softmax_scale(self.nope_dim, self.rope_dim, mscale=self.mscale)

    def rope_table(self, positions: int, *, device: torch.device | str = "cpu") -> Tensor:
        """`rope_table` of this model; ValueError where it has no rotation, or one that is not confirmed."""
        if not self.rotated:
            raise ValueError(f"rope_table: {self.title} has no rotation; expected a model that has")
        if self.rope_theta is None:
            raise ValueError(f"rope_table: the rotation of {self.title} is not confirmed, or not one of theta and YaRN")
        return rope_table(positions, self.rope_dim, theta=self.rope_theta, yarn=self.yarn, device=device)

    @property
    def why_not_served(self) -> str | None:
        """Why this library does not compute the model's own attention; None where it does."""
        if self.sparse_top_k is None:
            return None
        return (
            f"{self.title} has sparse attention (the top {self.sparse_top_k} keys of a query token), which is not "
            f"served; dense attention equals it up to {self.sparse_top_k} tokens of context alone"
        )


_DEEPSEEK_YARN = Yarn(factor=40.0, original_context=4096)

MODELS: dict[str, Model] = {
    "deepseek-v2-lite": Model(
        "DeepSeek V2-Lite", 16, 512, 64, 128, 128, layers=27, norm_eps=1e-6,
        mscale=yarn_mscale(40.0, 0.707), rope_theta=1e4, yarn=_DEEPSEEK_YARN,
    ),
    "deepseek-v3": Model(
        "DeepSeek V3 / R1 / V3.1", 128, 512, 64, 128, 128, 1536, 61, norm_eps=1e-6,
        mscale=yarn_mscale(40.0), rope_theta=1e4, yarn=_DEEPSEEK_YARN,
    ),
    "deepseek-v3.2": Model(
        "DeepSeek V3.2", 128, 512, 64, 128, 128, 1536, 61, norm_eps=1e-6,
        mscale=yarn_mscale(40.0), rope_theta=1e4, yarn=_DEEPSEEK_YARN, sparse_top_k=2048,
    ),
    "kimi-k2": Model(
        "Kimi K2 Instruct", 64, 512, 64, 128, 128, 1536, 61, norm_eps=1e-6,
        mscale=yarn_mscale(32.0), rope_theta=5e4, yarn=Yarn(32.0, 4096, beta_fast=1.0),
    ),
    "kimi-k2-0905": Model(  # its norm_eps is not confirmed
        "Kimi K2 Instruct 0905", 64, 512, 64, 128, 128, 1536, 61,
        mscale=yarn_mscale(64.0), rope_theta=5e4, yarn=Yarn(64.0, 4096, beta_fast=1.0),
    ),
    "kimi-k2.5": Model(  # theta is 50000, the factor 64; beta_fast is not confirmed, hence no table
        "Kimi K2 Thinking / K2.5", 64, 512, 64, 128, 128, 1536, 61, norm_eps=1e-5, mscale=yarn_mscale(64.0)
    ),
    "kimi-k2.6": Model(
        "Kimi K2.6", 64, 512, 64, 128, 128, 1536, 61, norm_eps=1e-5,
        mscale=yarn_mscale(64.0), rope_theta=5e4, yarn=Yarn(64.0, 4096),
    ),
    "kimi-k3": Model(  # MLA in 24 of 93 layers, with an output gate
        "Kimi K3", 96, 512, 64, 128, 128, 1536, 24, norm_eps=1e-5, mscale=1.0, rotated=False
    ),
    "glm-4.7-flash": Model(
        "GLM-4.7-Flash", 20, 512, 64, 192, 256, 768, 47, norm_eps=1e-5, mscale=1.0, rope_theta=1e6
    ),
    "glm-5": Model(
        "GLM-5 / GLM-5.1", 64, 512, 64, 192, 256, 2048, 78, norm_eps=1e-5,
        mscale=1.0, rope_theta=1e6, sparse_top_k=2048,
    ),
    "glm-5.2": Model(
        "GLM-5.2 / GLM-5.3", 64, 512, 64, 192, 256, 2048, 78, norm_eps=1e-5,
        mscale=1.0, rope_theta=8e6, sparse_top_k=2048,
    ),
    "glm-5.3-flash": Model(  # keys are selected in pools of 16
        "GLM-5.3-Flash", 64, 512, 0, 256, 256, 1536, norm_eps=1e-5, mscale=1.0, rotated=False, sparse_top_k=2048
    ),
    "longcat-flash": Model(
        "LongCat-Flash", 64, 512, 64, 128, 128, 1536, norm_eps=1e-5, mscale=1.0, rope_theta=1e7
    ),
    "minicpm3-4b": Model(  # LongRoPE, which no table of theta and YaRN is
        "MiniCPM3-4B", 40, 256, 32, 64, 64, 768, 62, norm_eps=1e-5, mscale=1.0
    ),
    # Its configuration has mscale_all_dim 1; implementations disagree on whether the scale then has mscale**2, and from
    # position 8192 on queries are scaled by their position.
    "mistral-small-4": Model(
        "Mistral Small 4", 32, 256, 64, 64, 128, 1024, 36, norm_eps=1e-6, rope_theta=1e4, yarn=Yarn(128.0, 8192)
    ),
    # Of both A.X-K2, theta and YaRN are not confirmed; both have an output gate.
    "a.x-k2": Model("A.X-K2", 64, 512, 64, 128, 128, 1536, 61, norm_eps=1e-6, sparse_top_k=2048),
    "a.x-k2-light": Model("A.X-K2-Light", 32, 128, 32, 64, 64, 384, 48, norm_eps=1e-6, sparse_top_k=2048),
    "youtu-llm-2b": Model(
        "Youtu-LLM-2B", 16, 512, 64, 128, 128, 1536, 32, norm_eps=1e-6, mscale=1.0, rope_theta=1.6e6
    ),
}  # fmt: skip


def model_named(name: str) -> Model:
    """The model called `name`; ValueError with the known names for any other."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
