"""The absorbed form: W_UK taken into queries and W_UV applied to results, both parts of kv_b_proj's weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_plain_linear(name: str, module: object) -> None:
    """Raise NotImplementedError unless the module is a plain nn.Linear without bias, whose weight is all that it does:
    decodes read the weight alone, and would leave out an adapter without a word."""
    kind = type(module)
    if kind is nn.Linear and module.bias is None and module.weight.is_floating_point():  # type: ignore[attr-defined]
        return
    raise NotImplementedError(
        f"{name}: expected a plain torch.nn.Linear without bias, whose weight can be absorbed, got "
        f"{kind.__module__}.{kind.__qualname__}. Merge an adapter into the weight first"
    )


def split_up_projection(weight: Tensor, heads: int, nope_dim: int) -> tuple[Tensor, Tensor]:
    """kv_b_proj's weight [heads * (nope + v_dim), latent] as W_UK [heads, nope, latent] and W_UV [heads, v_dim,
    latent], two views."""
    whole = weight.view(heads, -1, weight.shape[1])
    return whole[:, :nope_dim], whole[:, nope_dim:]


def absorb(q: Tensor, w_uk: Tensor) -> Tensor:
    """q [tokens, heads, nope + rope] -> [tokens, heads, latent + rope], with W_UK taken into the query."""
    q_nope, q_pe = q.split([w_uk.shape[1], q.shape[2] - w_uk.shape[1]], dim=2)
    return torch.cat([torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1), q_pe], dim=2)


def absorb_into(q_nope: Tensor, w_uk: Tensor, out: Tensor) -> None:
    """Write q_nope [tokens, heads, nope], with W_UK taken into it, to out [tokens, heads, latent]."""
    torch.bmm(q_nope.transpose(0, 1), w_uk, out=out.transpose(0, 1))


def expand(out: Tensor, w_uv: Tensor) -> Tensor:
    """out [tokens, heads, latent] -> [tokens, heads, v_dim]."""
    return torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
