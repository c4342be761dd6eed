"""LayerGeometry: the widths and constants of a model's MLA layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.rope import RopeLayout
from portable_mla.core.scalars import check_scale
from portable_mla.core.shape import MLAShape


@dataclass(frozen=True)
class LayerGeometry:
    """What a layer is, before heads are divided. softmax_scale has no default: see `softmax_scale`.

    rope_layout: as in `write_latent`. q_factor and latent_factor multiply queries and latent rows after their norm
    (LongCat-Flash). bias: of q_a_proj, kv_a_proj_with_mqa and o_proj. Raises ValueError for what is not positive.
    """

    hidden_size: int
    heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    softmax_scale: float
    q_lora_rank: int | None = None
    rope_layout: RopeLayout = "interleaved"
    bias: bool = False
    norm_eps: float = 1e-6
    q_factor: float = 1.0
    latent_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "heads", "latent_dim", "nope_dim", "v_dim", "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("softmax_scale", "q_factor", "latent_factor"):
            object.__setattr__(self, name, check_scale(name, getattr(self, name)))
        if isinstance(self.norm_eps, bool) or not 0.0 <= self.norm_eps < math.inf:
            raise ValueError(f"norm_eps: expected a finite number, at least 0, got {self.norm_eps}")
        if self.rope_dim < 0 or self.rope_dim % 2:
            raise ValueError(f"rope_dim: expected an even width from 0, got {self.rope_dim}")

    def shape(
        self, q_dtype: torch.dtype, cache_format: CacheFormat, *, page_size: int = 64, tensor_parallel: int = 1
    ) -> MLAShape:
        """The attention's view of one rank; raises ValueError if the heads do not divide."""
        if tensor_parallel < 1 or self.heads % tensor_parallel:
            raise ValueError(f"tensor_parallel: expected a divisor of {self.heads} heads, got {tensor_parallel}")
        heads = self.heads // tensor_parallel
        return MLAShape(
            heads, self.latent_dim, self.rope_dim, page_size, q_dtype, cache_format, self.nope_dim, self.v_dim
        )


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature 0.1 * weight * ln(factor) + 1; weight: the model's mscale_all_dim. 1 for a factor up to 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(nope_dim: int, rope_dim: int, *, mscale: float = 1.0) -> float:
    """(nope + rope)**-0.5 * mscale**2: never (latent + rope)**-0.5. mscale: `yarn_mscale` of a model that has YaRN."""
    return float((nope_dim + rope_dim) ** -0.5) * mscale**2
