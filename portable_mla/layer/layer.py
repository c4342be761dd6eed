"""MLALayer: one layer of Multi-head Latent Attention, from hidden states to hidden states over a paged latent cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from portable_mla.cache.write import write_latent
from portable_mla.core.geometry import LayerGeometry
from portable_mla.decode.api import scale_tensor
from portable_mla.decode.attention import MLAAttention
from portable_mla.layer.projections import absorb, absorb_into, check_plain_linear, expand, split_up_projection
from portable_mla.layer.step import LayerStep
from portable_mla.mixed.attention import MixedAttention
from portable_mla.prefill.cached_context import CachedContext
from portable_mla.runtime.streams import Fork
from portable_mla.runtime.torch_ops import without_gradients


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean in float32 or wider."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] in any floating dtype."""
        wide = x.double() if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLALayer(nn.Module):
    """MLA with the parameter names of the Hugging Face modules, so that their checkpoints load as they are.

        layer = MLALayer(geometry, dtype=torch.bfloat16, device="cuda")
        layer.load_state_dict(attention_weights)
        mixed.plan(batch, query_lens)                                  # once a step
        step = LayerStep.of(mixed, batch, tokens, table)               # once a step
        hidden = layer(hidden, cache[index], step)                     # once a layer

    With an MLAAttention every token is attended to in the absorbed form; with a MixedAttention decodes are, and
    prefills take the expanded form, after a cached context where the step says there is one. W_UK and W_UV are views of
    kv_b_proj's weight; a cached context needs dense copies, which live for one call.

    tensor_parallel: ranks that share the heads. Rank `rank` holds its heads' rows of q_proj or q_b_proj and kv_b_proj
    and columns of o_proj; load_state_dict takes the whole layer's weights or the rank's own. The output is then the
    rank's part of a sum, which the caller reduces; o_proj's bias is rank 0's alone.
    For inference: no gradient flows through it.
    """

    def __init__(
        self,
        geometry: LayerGeometry,
        *,
        rank: int = 0,
        tensor_parallel: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < tensor_parallel or geometry.heads % tensor_parallel:
            raise ValueError(
                f"rank, tensor_parallel: expected a rank below a divisor of {geometry.heads} heads, "
                f"got {rank} and {tensor_parallel}"
            )
        self.geometry, self.rank, self.tensor_parallel = geometry, rank, tensor_parallel
        self.heads = heads = geometry.heads // tensor_parallel
        hidden, latent, qk_dim = geometry.hidden_size, geometry.latent_dim, geometry.nope_dim + geometry.rope_dim

        def linear(width: int, out: int, *, bias: bool = False) -> nn.Linear:
            return nn.Linear(width, out, bias=bias, dtype=dtype, device=device)

        if geometry.q_lora_rank is None:
            self.q_proj = linear(hidden, heads * qk_dim)
        else:
            self.q_a_proj = linear(hidden, geometry.q_lora_rank, bias=geometry.bias)
            self.q_a_layernorm = RMSNorm(geometry.q_lora_rank, geometry.norm_eps, dtype=dtype, device=device)
            self.q_b_proj = linear(geometry.q_lora_rank, heads * qk_dim)
        self.kv_a_proj_with_mqa = linear(hidden, latent + geometry.rope_dim, bias=geometry.bias)
        self.kv_a_layernorm = RMSNorm(latent, geometry.norm_eps, dtype=dtype, device=device)
        self.kv_b_proj = linear(latent, heads * (geometry.nope_dim + geometry.v_dim))
        self.o_proj = linear(heads * geometry.v_dim, hidden, bias=geometry.bias and rank == 0)
        nn.Module.register_load_state_dict_pre_hook(self, _take_own_heads)

    @without_gradients("kv_cache")
    def forward(
        self, hidden: Tensor, kv_cache: Tensor, step: LayerStep, *, kv_scale: float | Tensor | None = None
    ) -> Tensor:
        """hidden [tokens, hidden_size] -> [tokens, hidden_size]; writes the tokens' rows to kv_cache [pages, page_size,
        row] first. Rows of padding are o_proj's bias, or 0. kv_scale: of an fp8 cache, a float or one float32 value.

        Raises ValueError for shapes that do not fit, and what the attention raises.
        """
        geometry, attention = self.geometry, step.attention
        scale = scale_tensor(kv_scale, kv_cache.device)
        if hidden.dim() != 2 or hidden.shape[1] != geometry.hidden_size:
            raise ValueError(f"hidden: expected [tokens, {geometry.hidden_size}], got {list(hidden.shape)}")
        if step.slots.shape[0] != hidden.shape[0]:
            raise ValueError(f"step: expected slots of {hidden.shape[0]} tokens, got {step.slots.shape[0]}")
        if attention.request.shape.heads != self.heads:
            raise ValueError(f"step: expected an attention of {self.heads} heads, got {attention.request.shape.heads}")
        if isinstance(attention, MLAAttention):
            out = self._absorbed(attention, hidden, kv_cache, step, scale)
        else:
            out = self._mixed(attention, hidden, kv_cache, step, scale)
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected

    def _absorbed(
        self, attention: MLAAttention, hidden: Tensor, kv_cache: Tensor, step: LayerStep, kv_scale: Tensor | None
    ) -> Tensor:
        """[tokens, heads, v_dim], all in the absorbed form. The rows and their store run beside the queries."""
        geometry, latent = self.geometry, self.geometry.latent_dim
        rows = hidden.new_empty(hidden.shape[0], latent + geometry.rope_dim)
        absorbed = hidden.new_empty(hidden.shape[0], self.heads, latent + geometry.rope_dim)
        w_uk, w_uv = self.up_projections()
        with Fork(hidden, enabled=step.overlap) as fork:
            with fork.beside():
                linear_into(self.kv_a_proj_with_mqa, hidden, rows)
            q_nope, q_pe = self._queries(hidden).split([geometry.nope_dim, geometry.rope_dim], dim=2)
            with fork.beside():
                self._write(rows, kv_cache, step, kv_scale, q_pe=q_pe, q_pe_out=absorbed[..., latent:])
            absorb_into(q_nope, w_uk, absorbed[..., :latent])
        out, _ = attention(absorbed, kv_cache, softmax_scale=geometry.softmax_scale, kv_scale=kv_scale)
        return expand(out, w_uv)

    def _mixed(
        self, attention: MixedAttention, hidden: Tensor, kv_cache: Tensor, step: LayerStep, kv_scale: Tensor | None
    ) -> Tensor:
        """[tokens, heads, v_dim], decodes in the absorbed form and prefills in the expanded one."""
        geometry, split = self.geometry, attention.split
        context = self._context(step, kv_cache, kv_scale) if split.prefill_requests else None  # before rows are stored
        rows = hidden.new_empty(hidden.shape[0], geometry.latent_dim + geometry.rope_dim)
        with Fork(hidden, enabled=step.overlap) as fork:
            with fork.beside():
                linear_into(self.kv_a_proj_with_mqa, hidden, rows)
            q = self._queries(hidden)
        stored = torch.empty_like(rows)
        self._write(rows, kv_cache, step, kv_scale, q_pe=q[..., geometry.nope_dim :], rows_out=stored)
        out = q.new_zeros(hidden.shape[0], self.heads, geometry.v_dim)
        w_uk, w_uv = self.up_projections()
        decodes, _ = attention.decode(
            absorb(q[split.decode_rows], w_uk), kv_cache, softmax_scale=geometry.softmax_scale, kv_scale=kv_scale
        )
        out[split.decode_rows] = expand(decodes, w_uv)
        if split.prefill_requests:
            new = split.prefill_rows
            latent, k_pe = stored[new].split([geometry.latent_dim, geometry.rope_dim], dim=1)
            self._prefill(attention, q[new], latent, k_pe, context, out[new])
        return out

    def _queries(self, hidden: Tensor) -> Tensor:
        """[tokens, heads, nope + rope], not yet rotated."""
        geometry = self.geometry
        if geometry.q_lora_rank is None:
            q = self.q_proj(hidden)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q = q.unflatten(1, (self.heads, -1))
        queries: Tensor = q if geometry.q_factor == 1 else q * geometry.q_factor
        return queries

    def _write(
        self,
        rows: Tensor,
        kv_cache: Tensor,
        step: LayerStep,
        kv_scale: Tensor | None,
        *,
        q_pe: Tensor,
        q_pe_out: Tensor | None = None,
        rows_out: Tensor | None = None,
    ) -> None:
        """Norm and rotate the tokens' rows [tokens, latent + rope] and store them; rotate q_pe."""
        geometry, attention = self.geometry, step.attention
        decodes = attention if isinstance(attention, MLAAttention) else attention.decodes
        latent, k_pe = rows.split([geometry.latent_dim, geometry.rope_dim], dim=1)
        weight, roped = self.kv_a_layernorm.weight, geometry.rope_dim > 0
        write_latent(
            kv_cache, step.slots, latent, k_pe if roped else None,
            norm_weight=weight if geometry.latent_factor == 1 else weight * geometry.latent_factor,
            eps=geometry.norm_eps,
            positions=step.positions if roped else None,
            cos_sin=step.cos_sin if roped else None,
            rope_layout=geometry.rope_layout,
            q_pe=q_pe if roped else None,
            q_pe_out=q_pe_out if roped else None,
            kv_scale=kv_scale,
            rows_out=rows_out,
            status=decodes.status_words,
        )  # fmt: skip

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [heads, nope, latent] and W_UV [heads, v_dim, latent], views of kv_b_proj's weight. Raises
        NotImplementedError where kv_b_proj was replaced: the weight would not be all that it does."""
        check_plain_linear("kv_b_proj", self.kv_b_proj)
        return split_up_projection(self.kv_b_proj.weight, self.heads, self.geometry.nope_dim)

    def _context(self, step: LayerStep, kv_cache: Tensor, kv_scale: Tensor | None) -> CachedContext | None:
        """What the prefills have in the cache, where the step says that some have anything."""
        assert isinstance(step.attention, MixedAttention), "only mixed steps have prefills"
        longest = step.attention.longest_context() if step.longest_context is None else step.longest_context
        if not longest:
            return None
        # Dense copies of this call: kept, they would miss a weight that is changed in ways that torch does not count.
        w_uk, w_uv = (weight.contiguous() for weight in self.up_projections())
        return step.attention.context(kv_cache, w_uk, w_uv, max_len=longest, kv_scale=kv_scale)

    def _prefill(
        self,
        attention: MixedAttention,
        q: Tensor,
        latent: Tensor,
        k_pe: Tensor,
        context: CachedContext | None,
        out: Tensor,
    ) -> None:
        """Write the expanded form's result to out [tokens, heads, v_dim]."""
        geometry = self.geometry
        expanded = self.kv_b_proj(latent).unflatten(1, (self.heads, -1))
        k_nope, v = expanded.split([geometry.nope_dim, geometry.v_dim], dim=2)
        attention.prefill(q, k_nope, k_pe, v, out, softmax_scale=geometry.softmax_scale, context=context)

    def memory(self) -> dict[str, int]:
        """Bytes held from step to step: of the parameters."""
        return {"parameters": sum(parameter.nbytes for parameter in self.parameters())}


def linear_into(linear: nn.Linear, x: Tensor, out: Tensor) -> None:
    """Write linear(x) of x [tokens, width] to out, which the caller allocated."""
    if type(linear) is not nn.Linear:  # an adapter, say
        out.copy_(linear(x))
    elif linear.bias is None:
        torch.mm(x, linear.weight.T, out=out)
    else:
        torch.addmm(linear.bias, x, linear.weight.T, out=out)


def _take_own_heads(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Cut a whole layer's weights down to the rank's heads, before they are loaded."""
    assert isinstance(module, MLALayer)
    ranks, rank = module.tensor_parallel, module.rank
    if ranks == 1:
        return
    for name, dim in (("q_proj", 0), ("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
        key = f"{prefix}{name}.weight"
        if key in state and state[key].shape[dim] == ranks * getattr(module, name).weight.shape[dim]:
            state[key] = state[key].chunk(ranks, dim=dim)[rank]
    if rank:
        state.pop(f"{prefix}o_proj.bias", None)
