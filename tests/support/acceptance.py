"""The acceptance rule for numerics, in one place.

Golden is float64 on the exact stored inputs. A result passes when its NaN and infinity pattern is golden's, every
(token, head) row is within the relative RMS of its dtype, the mean error is at most `mean_factor` times that of an
emulated kernel (split KV, float32 logits and accumulators, P rounded to q's dtype), and LSE is within
1e-4 + 2e-6 |LSE|. The usual 1e-2 tolerances do not notice a dropped token; this rule does (test_mutants.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.backends import reference
from portable_mla.core.cache_format import cache_format_of
from portable_mla.core.quantize import dequantise_rows
from tests.support.cases import Problem

# Largest relative RMS of a row: 1.5 times the worst of good kernels over 104 cells for bf16, the same share of the
# rounding step for fp16; for fp32, where the error grows with the logits and with cancelling values, 2.4 times the
# CPU backend's worst of 500 cases (5.0e-5).
ROW_RMS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-13}
# Mean error over the emulation's. In fp32 no rounding of P or out hides the order of sums: worst of 500 cases 2.7.
MEAN_FACTOR = {torch.bfloat16: 1.25, torch.float16: 1.25, torch.float32: 4.0}
MEAN_FACTOR_FEW_ROWS = {torch.bfloat16: 1.75, torch.float16: 1.75, torch.float32: 4.0}
EMULATED_SPLIT = 96  # tokens; no kernel's tile


@dataclass(frozen=True)
class Errors:
    """How far a result is from golden: worst row's relative RMS, mean error over the emulation's, worst LSE share."""

    row_rms: float
    mean_ratio: float
    lse: float


def check(problem: Problem, out: Tensor, lse: Tensor) -> Errors:
    """Assert the rule and return the errors. Computes golden itself, after the kernel ran."""
    golden, golden_lse = reference.decode(
        problem.inputs, problem.batch, latent_dim=problem.latent_dim, softmax_scale=problem.softmax_scale,
        kv_scale=problem.kv_scale,
    )  # fmt: skip
    return compare(problem, out, lse, golden, golden_lse)


def compare(problem: Problem, out: Tensor, lse: Tensor, golden: Tensor, golden_lse: Tensor) -> Errors:
    """Assert the rule against a golden that is already there."""
    assert out.dtype == problem.q.dtype, f"out is {out.dtype}"
    return judge(
        (out, lse), (golden, golden_lse), lambda: emulate(problem), lambda: value_rms(problem), problem.allowance
    )  # fmt: skip


def judge(
    result: tuple[Tensor, Tensor],
    golden_result: tuple[Tensor, Tensor],
    emulated: Callable[[], Tensor],
    value_rms: Callable[[], float],
    allowance: float = 1.0,
) -> Errors:
    """Assert the rule on out and lse. emulated: the result of a good kernel; value_rms: of all values attended to;
    allowance: times the errors that a good kernel may have."""
    (out, lse), (golden, golden_lse) = result, golden_result
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}"
    assert out.shape == golden.shape, f"out is {tuple(out.shape)}"
    assert lse.shape == golden_lse.shape, f"lse is {tuple(lse.shape)}"
    assert bool(torch.isfinite(out).all()), f"out has {int((~torch.isfinite(out)).sum())} values that are not finite"
    assert torch.equal(lse == -torch.inf, golden_lse == -torch.inf), "lse is -inf in other rows than golden"
    seen = golden_lse != -torch.inf
    assert bool(torch.isfinite(lse[seen]).all()), "lse is not finite in a row that sees tokens"
    assert not bool(out[~seen].any()), "a row with nothing to see is not 0"
    if not bool(seen.any()):
        return Errors(0.0, 0.0, 0.0)
    lse_error = ((lse.double() - golden_lse).abs() / (1e-4 + 2e-6 * golden_lse.abs()))[seen].max().item()
    assert lse_error <= 1, f"lse: worst error is {lse_error:.2f} of the bound"
    error = (out.double() - golden)[seen]
    row, floor = _rms(golden[seen]), 2**-8 * value_rms()
    worst = (_rms(error) / row.clamp_min(floor)).max().item()
    limit = ROW_RMS[out.dtype] * allowance
    assert worst <= limit, f"out: worst row RMS is {worst:.2e}, limit {limit:.2e}"
    good = (emulated().double() - golden)[seen].abs().mean().item()
    factor = (MEAN_FACTOR if len(error) >= 4 else MEAN_FACTOR_FEW_ROWS)[out.dtype] * allowance
    # Where the emulation is exact, one rounding in twenty is allowed.
    allowed = max(factor * good, limit * row.mean().item() / 20)
    mean = error.abs().mean().item()
    assert mean <= allowed, f"out: mean error {mean:.2e}, allowed {allowed:.2e} (emulation {good:.2e})"
    return Errors(worst, mean / allowed * factor, lse_error)


def emulate(problem: Problem) -> Tensor:
    """The result of a kernel that is as good as one can be: split KV, float32, P in q's dtype, one final rounding."""
    q, batch = problem.q, problem.batch
    out = torch.zeros(*q.shape[:2], problem.latent_dim, dtype=torch.float32, device=q.device)
    start = 0
    for request, (kv_len, query_len) in enumerate(zip(problem.kv_lens, problem.query_lens, strict=True)):
        rows = logical_rows(problem, batch.block_table[request], kv_len)
        tokens = slice(start, start + query_len)
        start += query_len
        if kv_len and query_len:
            out[tokens] = _emulate_request(q[tokens].float(), rows, problem)
    return out.to(q.dtype)


def _emulate_request(q: Tensor, rows: Tensor, problem: Problem) -> Tensor:
    scores = torch.einsum("nhd,kd->nhk", q, rows.float()) * problem.softmax_scale
    values = rows[:, None, : problem.latent_dim].expand(-1, q.shape[1], -1)
    return emulate_softmax(scores, values, problem.q.dtype, causal=True)


def emulate_softmax(scores: Tensor, values: Tensor, dtype: torch.dtype, *, causal: bool) -> Tensor:
    """[n, heads, width] float32 of scores [n, heads, keys] and values [keys, heads, width], with P rounded to dtype."""
    queries, keys = scores.shape[0], scores.shape[2]
    last_seen = torch.full((queries,), keys - 1, device=scores.device)
    if causal:
        last_seen = keys - queries + torch.arange(queries, device=scores.device)
    maximum = torch.full(scores.shape[:2], -torch.inf, device=scores.device)
    total = torch.zeros(scores.shape[:2], device=scores.device)
    acc = torch.zeros(*scores.shape[:2], values.shape[2], device=scores.device)
    for lo in range(0, keys, EMULATED_SPLIT):
        tile = values[lo : lo + EMULATED_SPLIT].float()
        position = torch.arange(lo, lo + len(tile), device=scores.device)
        hidden = (position > last_seen[:, None])[:, None]
        some = scores[..., lo : lo + len(tile)].masked_fill(hidden, -torch.inf)
        higher = torch.maximum(maximum, some.amax(-1))
        finite = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, rescale = torch.exp(some - finite[..., None]), torch.exp(maximum - finite)
        acc = acc * rescale[..., None] + torch.einsum("nhk,khd->nhd", weights.to(dtype).float(), tile)
        total = total * rescale + weights.sum(-1)
        maximum = higher
    return acc / total.masked_fill(total == 0, 1.0)[..., None]


def logical_rows(problem: Problem, table: Tensor, kv_len: int) -> Tensor:
    """[kv_len, latent + rope]: one request's rows in order, dequantised to float32 where the cache is quantised."""
    cache = problem.kv_cache
    pages = table[: math.ceil(kv_len / cache.shape[1])].long()
    rows = cache[pages].reshape(-1, cache.shape[2])[:kv_len]
    cache_format = cache_format_of(cache.dtype)
    return dequantise_rows(rows, cache_format, problem.kv_scale, torch.float32) if cache_format.quantised else rows


def value_rms(problem: Problem) -> float:
    """RMS of the latent part of every valid row."""
    rows = [
        logical_rows(problem, problem.batch.block_table[request], kv_len)[:, : problem.latent_dim]
        for request, kv_len in enumerate(problem.kv_lens)
    ]
    return float(torch.cat(rows).double().square().mean().sqrt())


def _rms(rows: Tensor) -> Tensor:
    return rows.double().square().mean(-1).sqrt()
