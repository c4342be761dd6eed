"""PrefillCase: a small description of a prefill (numbers and a seed, never tensor contents), and the PrefillProblem
built from it. Keys that nobody owns are poisoned; k_nope and v are views of one projection, k_pe of a cache row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portable_mla import Request, explain, mla_prefill, select
from portable_mla.backends import reference
from portable_mla.dispatch.interface import PrefillInputs, prefill_runner
from portable_mla.prefill.api import run_prefill
from portable_mla.prefill.arguments import PrefillArguments
from tests.support.acceptance import Errors, emulate_softmax, judge
from tests.support.cases import DTYPES, heavy_logit
from tests.support.targets import Target, local_targets

Result = tuple[Tensor, Tensor]
GEOMETRIES = ((128, 64, 128), (192, 64, 256), (256, 0, 256), (64, 64, 128), (64, 32, 64))
GARBAGE = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "hot": 60.0}


@dataclass(frozen=True)
class PrefillCase:
    """One prefill. padding: rows of q past the last sequence; spare_keys: keys past it."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    heads: int = 3
    geometry: tuple[int, int, int] = GEOMETRIES[0]  # nope, rope, v
    dtype: str = "bf16"
    causal: bool = True
    content: str = "iid"
    garbage: str = "nan"
    padding: int = 1
    spare_keys: int = 2
    seed: int = 0


@dataclass(frozen=True)
class PrefillProblem:
    """A case's tensors on a device."""

    case: PrefillCase
    inputs: PrefillInputs
    softmax_scale: float

    @property
    def arguments(self) -> PrefillArguments:
        """The call, with the tightest bounds."""
        longest = max((0, *self.case.query_lens)), max((0, *self.case.kv_lens))
        return PrefillArguments(self.inputs, *longest, self.softmax_scale)

    def with_inputs(self, **changes: object) -> PrefillProblem:
        """The same problem with other tensors."""
        return replace(self, inputs=replace(self.inputs, **changes))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    def golden(self) -> Result:
        """The reference's float64 answer."""
        return reference.prefill(self.inputs, softmax_scale=self.softmax_scale)


def build(case: PrefillCase, device: torch.device | str = "cpu") -> PrefillProblem:
    """The case's tensors."""
    rng = torch.Generator().manual_seed(case.seed)
    nope, rope, v_dim = case.geometry
    tokens, keys = sum(case.query_lens), sum(case.kv_lens)
    q = torch.randn(tokens + case.padding, case.heads, nope + rope, generator=rng)
    projection = torch.full((keys + case.spare_keys, case.heads, nope + v_dim), GARBAGE[case.garbage])
    row = torch.full((keys + case.spare_keys, 16 + rope), GARBAGE[case.garbage])
    for mine, theirs in zip(spans(case.query_lens), spans(case.kv_lens), strict=True):
        keys_of_one = CONTENTS[case.content](case, q[mine], theirs.stop - theirs.start, rng)
        projection[theirs], row[theirs, 16:] = keys_of_one
    dtype = DTYPES[case.dtype]
    projection, row = projection.to(device, dtype), row.to(device, dtype)
    inputs = PrefillInputs(
        q.to(device, dtype), projection[..., :nope], row[:, 16:], projection[..., nope:],
        offsets(case.query_lens, device), offsets(case.kv_lens, device), case.causal,
    )  # fmt: skip
    scale = 0.125 if case.content in EXACT else (nope + rope) ** -0.5 * 1.35  # not 1/sqrt(d): a wrong default must show
    return PrefillProblem(case, inputs, scale)


def offsets(lens: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """[sequences + 1] int32."""
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


def spans(lens: tuple[int, ...]) -> list[slice]:
    """The rows of each sequence."""
    return [slice(*pair) for pair in itertools.pairwise((0, *itertools.accumulate(lens)))]


Content = Callable[[PrefillCase, Tensor, int, torch.Generator], Result]  # k_nope ++ v [keys, heads, _], k_pe [keys, _]


def _random(case: PrefillCase, keys: int, rng: torch.Generator, sigma: float) -> Result:
    nope, rope, v_dim = case.geometry
    projection = torch.randn(keys, case.heads, nope + v_dim, generator=rng) * sigma
    return projection, torch.randn(keys, rope, generator=rng) * sigma


def _iid(case: PrefillCase, q: Tensor, keys: int, rng: torch.Generator) -> Result:
    return _random(case, keys, rng, (0.25, 1.0, 2.0)[case.seed % 3])


def _needle(case: PrefillCase, q: Tensor, keys: int, rng: torch.Generator) -> Result:
    """A key at a boundary, the last one or one at a tile's edge, that all query tokens attend to almost alone."""
    projection, k_pe = _random(case, keys, rng, 0.3)
    if keys and len(q):
        q.copy_(q[:1, :1] + 0.1 * torch.randn(q.shape, generator=rng))
        edges = [keys - 1, max(0, keys - len(q)), 0, min(keys, 64) - 1, min(keys - 1, 128)]
        nope = case.geometry[0]
        projection[edges[case.seed % len(edges)], :, :nope] += q[0, 0, :nope] * 0.7
        k_pe[edges[case.seed % len(edges)]] += q[0, 0, nope:] * 0.7
    return projection, k_pe


def _heavy(case: PrefillCase, q: Tensor, keys: int, rng: torch.Generator) -> Result:
    """A key in the middle that outweighs those at both ends, and all others none."""
    projection, k_pe = _random(case, keys, rng, 1.0)
    q.zero_()
    q[..., :2] = 1
    projection[..., :2] = torch.tensor([-150.0, 0.0])
    projection[:1, :, 0] = projection[-1:, :, 0] = 0
    projection[keys // 2 : keys // 2 + 1, :, :2] = torch.tensor(heavy_logit(sum(case.geometry[:2])))
    return projection, k_pe


def _extreme(sign: float) -> Content:
    """Logits near +-1e5, exact in float32, so that only a finite stand-in for infinity can go wrong."""

    def keys_of_one(case: PrefillCase, q: Tensor, keys: int, rng: torch.Generator) -> Result:
        q.zero_()
        q[..., 0] = 1024
        projection, k_pe = _random(case, keys, rng, 1.0)
        projection[..., 0] = sign * 768
        return projection, k_pe

    return keys_of_one


def _ties(case: PrefillCase, q: Tensor, keys: int, rng: torch.Generator) -> Result:
    projection, k_pe = _random(case, 1, rng, 1.0)
    return projection.expand(keys, -1, -1), k_pe.expand(keys, -1)


CONTENTS: dict[str, Content] = {
    "iid": _iid,
    "needle": _needle,
    "heavy": _heavy,
    "neg_extreme": _extreme(-1.0),
    "pos_extreme": _extreme(1.0),
    "ties": _ties,
}
EXACT = ("neg_extreme", "pos_extreme")


def run(target: Target, problem: PrefillProblem, *, float32_out: bool = False, deterministic: bool = False) -> Result:
    """Prefill into results full of NaN."""
    q, v_dim = problem.inputs.q, problem.inputs.v.shape[2]
    dtype = torch.float32 if float32_out else q.dtype
    out = torch.full((*q.shape[:2], v_dim), torch.nan, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], torch.nan, device=q.device)
    return run_into(target, problem, out, lse, deterministic=deterministic)


def run_into(
    target: Target, problem: PrefillProblem, out: Tensor, lse: Tensor, *, deterministic: bool = False
) -> Result:
    """Prefill into the given results."""
    inputs, arguments = problem.inputs, problem.arguments
    if target.tiles:
        asked = request(target, problem, deterministic=deterministic, float32_out=out.dtype == torch.float32)
        runner = prefill_runner(select(asked, target.backend), asked)
        run_prefill(runner, inputs, out, lse, softmax_scale=problem.softmax_scale)
        return out, lse
    return mla_prefill(
        inputs.q, inputs.k_nope, inputs.k_pe, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        max_seqlen_q=arguments.max_seqlen_q, max_seqlen_k=arguments.max_seqlen_k,
        softmax_scale=problem.softmax_scale, causal=inputs.causal, backend=target.backend, deterministic=deterministic,
        out=out, lse=lse,
    )  # fmt: skip


def request(
    target: Target, problem: PrefillProblem, *, deterministic: bool = False, float32_out: bool = False
) -> Request:
    """What dispatch is asked, for the target's tiles."""
    asked = problem.arguments.request(deterministic=deterministic, float32_out=float32_out)
    return replace(asked, arch=target.arch)


def check(problem: PrefillProblem, out: Tensor, lse: Tensor) -> Errors:
    """Assert the acceptance rule."""
    values = torch.cat([problem.inputs.v[keys] for keys in spans(problem.case.kv_lens)])
    return judge(
        (out, lse), problem.golden(), lambda: emulate(problem), lambda: float(values.double().square().mean().sqrt())
    )


def emulate(problem: PrefillProblem) -> Tensor:
    """The result of a kernel that is as good as one can be."""
    inputs, case, nope = problem.inputs, problem.case, problem.case.geometry[0]
    q, k_nope, k_pe = inputs.q.float(), inputs.k_nope.float(), inputs.k_pe.float()
    out = torch.zeros(*q.shape[:2], inputs.v.shape[2], device=q.device)
    for mine, keys in zip(spans(case.query_lens), spans(case.kv_lens), strict=True):
        if mine.start < mine.stop and keys.start < keys.stop:
            scores = torch.einsum("nhd,khd->nhk", q[mine, :, :nope], k_nope[keys])
            scores = (scores + torch.einsum("nhd,kd->nhk", q[mine, :, nope:], k_pe[keys])) * problem.softmax_scale
            out[mine] = emulate_softmax(scores, inputs.v[keys], inputs.q.dtype, causal=inputs.causal)
    return out.to(inputs.q.dtype)


def accepts(target: Target, problem: PrefillProblem) -> bool:
    """Whether the backend serves the problem, by its own word."""
    return explain(request(target, problem), target.backend).chosen is not None


def prefill_targets() -> tuple[Target, ...]:
    """Every backend of this machine that serves a prefill at all."""
    small = PrefillCase((1,), (1,))
    return tuple(target for target in local_targets() if accepts(target, build(small, target.device)))
