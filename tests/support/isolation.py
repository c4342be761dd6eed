"""Values that are not finite, put into a key or value that some query tokens may not see, and what may follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from portable_mla.backends import reference
from tests.support import acceptance, prefill_cases
from tests.support.cases import Problem
from tests.support.prefill_cases import PrefillProblem, spans

Spoiler = Callable[[Tensor], None]  # of one stored row of a cache


def _stored(column: int, value: float) -> Spoiler:
    def spoil(row: Tensor) -> None:
        row[column] = value

    return spoil


def _viewed(first: int, last: int, dtype: torch.dtype, column: int, value: float) -> Spoiler:
    """Of fp8_656's bytes."""

    def spoil(row: Tensor) -> None:
        row[first:last].view(dtype)[column] = value

    return spoil


PLAIN = {
    "a latent is NaN": _stored(7, torch.nan),
    "a latent is inf": _stored(100, torch.inf),
    "a rope value is NaN": _stored(-1, torch.nan),
    "all is NaN": lambda row: row.fill_(torch.nan),
}
PER_TENSOR = {name: PLAIN[name] for name in ("a latent is NaN", "a rope value is NaN", "all is NaN")}
GROUPED = {
    "a latent is NaN": _viewed(0, 512, torch.float8_e4m3fn, 300, torch.nan),
    "a scale is NaN": _viewed(512, 528, torch.float32, 1, torch.nan),
    "a scale is inf": _viewed(512, 528, torch.float32, 2, torch.inf),
    "a scale is -inf": _viewed(512, 528, torch.float32, 3, -torch.inf),
    "a rope value is NaN": _viewed(528, 656, torch.bfloat16, 5, torch.nan),
    "all is NaN": lambda row: row.fill_(0xFF),
}
SPOILERS: dict[str, dict[str, Spoiler]] = {"": PLAIN, "fp8_e4m3": PER_TENSOR, "fp8_656": GROUPED}
SPOILED = [(cache, name) for cache, named in SPOILERS.items() for name in named]


@dataclass(frozen=True)
class Spoiled:
    """A decode problem with one key that is not finite, and the same as it was."""

    problem: Problem
    clean: Problem
    affected: Tensor  # [tokens] bool: query tokens that see the key

    @classmethod
    def of(cls, clean: Problem, request: int, back: int, spoil: Spoiler) -> Spoiled:
        """back: keys of the request behind the spoiled one."""
        position = clean.kv_lens[request] - 1 - back
        page_size = clean.kv_cache.shape[1]
        cache = clean.kv_cache.clone()
        page = int(clean.batch.block_table[request, position // page_size])
        row = cache[page, position % page_size].cpu()
        spoil(row)
        cache[page, position % page_size] = row.to(cache.device)
        first = sum(clean.query_lens[:request])
        affected = torch.zeros(len(clean.q), dtype=torch.bool, device=clean.q.device)
        affected[first + max(clean.query_lens[request] - 1 - back, 0) : first + clean.query_lens[request]] = True
        return cls(clean.with_cache(cache), clean, affected)

    def check(self, out: Tensor, lse: Tensor) -> None:
        """Rows that see the key are not finite, and the others those of the clean problem, within the rule."""
        assert not bool(out[self.affected].isfinite().all(-1).any()), "a row that sees the key is finite"
        kept, clean = ~self.affected, self.clean
        golden, golden_lse = reference.decode(
            clean.inputs, clean.batch, latent_dim=clean.latent_dim, softmax_scale=clean.softmax_scale,
            kv_scale=clean.kv_scale,
        )  # fmt: skip
        acceptance.judge(
            (out[kept], lse[kept]), (golden[kept], golden_lse[kept]), lambda: acceptance.emulate(clean)[kept],
            lambda: acceptance.value_rms(clean), clean.allowance,
        )  # fmt: skip


@dataclass(frozen=True)
class SpoiledPrefill:
    """A causal prefill with one value of one key that is not finite, and the same as it was."""

    problem: PrefillProblem
    clean: PrefillProblem
    affected: Tensor  # [tokens, heads, v_dim] bool: what sees the value

    @classmethod
    def of(cls, clean: PrefillProblem, sequence: int, position: int, name: str, value: float) -> SpoiledPrefill:
        """name: of the tensor; position: in its sequence, of the key whose value in one column is spoiled."""
        tensor = getattr(clean.inputs, name).clone()
        key = spans(clean.case.kv_lens)[sequence].start + position
        cell = (key, 5) if name == "k_pe" else (key, 1, 5)
        tensor[cell] = value
        tokens, queries = spans(clean.case.query_lens)[sequence], clean.case.query_lens[sequence]
        first = tokens.start + max(position - (clean.case.kv_lens[sequence] - queries), 0)
        affected = torch.zeros(*clean.inputs.q.shape[:2], clean.inputs.v.shape[2], dtype=torch.bool)
        heads = slice(None) if name == "k_pe" else slice(1, 2)
        affected[first : tokens.stop, heads, 5 if name == "v" else slice(None)] = True
        return cls(clean.with_inputs(**{name: tensor}), clean, affected.to(tensor.device))

    def check(self, out: Tensor, lse: Tensor) -> None:
        """What sees the value is not finite, and the rest is the clean problem's, within the rule."""
        assert not bool(out[self.affected].isfinite().any()), "what sees the value is finite"
        golden, golden_lse = self.clean.golden()
        no_score = self.affected.all(-1)
        out = torch.where(self.affected, golden.to(out.dtype), out)
        prefill_cases.check(self.clean, out, torch.where(no_score, golden_lse.float(), lse))
