"""Rotary position embedding: the table of cosines and sines, and the rotation that defines what kernels compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeLayout = Literal["half", "interleaved"]  # value i turns with i + rope / 2, or value 2 i with 2 i + 1


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., 2023): how a model trained on `original_context` positions reaches `factor` times as many.

    attention_factor: on the cosines and sines; DeepSeek's checkpoints have mscale == mscale_all_dim, hence 1, and carry
    mscale**2 in the softmax scale instead.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def rope_table(
    positions: int,
    rope_dim: int,
    *,
    theta: float = 10000.0,
    yarn: Yarn | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[positions, rope] float32: rope / 2 cosines, then rope / 2 sines of every position.

    Raises ValueError for a rope_dim that is not positive and even, or for less than one position.
    """
    if rope_dim < 2 or rope_dim % 2:
        raise ValueError(f"rope_dim: expected a positive even number, got {rope_dim}")
    if positions < 1:
        raise ValueError(f"positions: expected at least 1, got {positions}")
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64, device="cpu") / rope_dim
    frequencies = theta**-exponents
    factor = 1.0
    if yarn is not None:
        frequencies = _stretched(frequencies, rope_dim, theta, yarn)
        factor = yarn.attention_factor
    angles = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1).float().to(device)


def rotate(values: Tensor, cos_sin: Tensor, layout: RopeLayout) -> Tensor:
    """float32 values [..., rope], turned by cos_sin [..., rope] (cosines, then sines), each in the place it came from.

    Each product and each sum is rounded to float32.
    """
    cos, sin = cos_sin.float().chunk(2, dim=-1)
    one, other = (values[..., 0::2], values[..., 1::2]) if layout == "interleaved" else values.chunk(2, dim=-1)
    turned = one * cos - other * sin, other * cos + one * sin
    return torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)


def _stretched(frequencies: Tensor, rope_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """Frequencies that turn beta_fast times or more in the original context stay, those of beta_slow turns or fewer are
    divided by the factor, and those between are mixed."""

    def dimension(turns: float) -> float:
        return rope_dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slow + frequencies * (1 - slow)
