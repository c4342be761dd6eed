"""The model zoo: attention shapes of published MLA models, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from portable_mla.cache_format import CacheFormat
from portable_mla.shape import MLAShape


@dataclass(frozen=True)
class Model:
    """One model's attention. Dimensions that its publisher does not state are None."""

    title: str
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int | None
    v_dim: int | None
    q_lora_rank: int | None = None
    layers: int | None = None

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
        """(nope + rope)**-0.5, without a YaRN factor; raises ValueError where the nope width is not published."""
        if self.nope_dim is None:
            raise ValueError(f"softmax_scale: {self.title} does not state its nope width")
        return float((self.nope_dim + self.rope_dim) ** -0.5)


MODELS: dict[str, Model] = {
    "deepseek-v2-lite": Model("DeepSeek V2-Lite", 16, 512, 64, 128, 128, layers=27),
    "deepseek-v3": Model("DeepSeek V3 / R1 / V3.1", 128, 512, 64, 128, 128, 1536, 61),
    "kimi-k2": Model("Kimi K2 / K2.5", 64, 512, 64, 128, 128, 1536, 61),
    "kimi-k3": Model("Kimi K3", 96, 512, 64, None, None),
    "glm-4.7-flash": Model("GLM-4.7-Flash", 20, 512, 64, 192, 256, 768),
    "glm-5": Model("GLM-5.x", 64, 512, 64, 192, 256, 2048),
    "glm-5.3-flash": Model("GLM-5.3-Flash", 64, 512, 0, 256, 256, 1536),
    "longcat-flash": Model("LongCat-Flash", 64, 512, 64, 128, 128, 1536),
    "minicpm3-4b": Model("MiniCPM3-4B", 40, 256, 32, 64, 64, 768),
    "mistral-small-4": Model("Mistral Small 4", 32, 256, 64, 64, 128, 1024),
    "a.x-k2": Model("A.X-K2", 32, 128, 32, 64, 64, 384),
    "youtu-llm-2b": Model("Youtu-LLM-2B", 16, 512, 64, 128, 128, 1536),
}


def model_named(name: str) -> Model:
    """The model called `name`; ValueError with the known names for any other."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
