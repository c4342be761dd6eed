"""explain: what dispatch answers to a request for any architecture, from any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from portable_mla.cli.report import Section
from portable_mla.core.arch import Arch, arch_named
from portable_mla.core.cache_format import CacheFormat
from portable_mla.core.checks import check_kv_scale, check_q_dtype
from portable_mla.core.device import local_devices
from portable_mla.core.shape import Capacity, MLAShape, Phase, Request
from portable_mla.dispatch.select import Candidate, Explanation, explain
from portable_mla.errors import NoBackend
from portable_mla.models import Model, model_named
from portable_mla.settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
T = TypeVar("T")
DEFAULT_MODEL = "deepseek-v3"
MAX_DEFAULT_RANKS = 8


@dataclass(frozen=True)
class Question:
    """A request in the words of the command line; a decode, or a prefill of the same model. arch None is this machine's
    best device; heads are those of one rank, in place of the model's divided by tensor_parallel, which by default
    is `default_ranks`; cache_format None is the one of dtype. dense: ask for dense attention of a sparse model."""

    arch: str | None = None
    model: str = DEFAULT_MODEL
    tensor_parallel: int | None = None
    heads: int | None = None
    page_size: int = 64
    dtype: str = "bf16"
    cache_format: str | None = None
    query_len: int = 1
    ragged: bool = False
    batch: int = 128
    context: int = 4096
    deterministic: bool = False
    phase: Phase = Phase.decode
    dense: bool = False

    def request(self) -> Request:
        """The request; ValueError or TypeError for a wrong word, UnsupportedDevice for a refused architecture."""
        return self.request_for(best_local_arch() if self.arch is None else arch_named(self.arch))

    def request_for(self, arch: Arch) -> Request:
        """The request, asked for `arch`."""
        shape = self.shape()
        check_q_dtype(shape.q_dtype, shape.cache_format)
        check_kv_scale(
            torch.ones((), dtype=torch.float32, device="cpu") if shape.cache_format.needs_scale else None,
            shape.cache_format,
            arch,
        )
        if self.phase is Phase.prefill:
            return self._prefill(arch, shape)
        pages = self.batch * math.ceil(self.context / shape.page_size)
        capacity = Capacity(
            max_batch=self.batch,
            max_query_tokens=self.batch * self.query_len,
            max_query_len=self.query_len,
            max_context=self.context,
            max_pages=pages,
        )
        return Request(arch, shape, Phase.decode, self.query_len, not self.ragged, self.deterministic, capacity)

    def _prefill(self, arch: Arch, shape: MLAShape) -> Request:
        """The prefill of `batch` prompts of up to `context` tokens."""
        capacity = Capacity(
            max_batch=self.batch,
            max_query_tokens=self.batch * self.context,
            max_query_len=self.context,
            max_context=self.context,
            max_pages=0,
        )
        return Request(arch, shape, Phase.prefill, self.context, False, self.deterministic, capacity)

    def note(self) -> str | None:
        """What dense attention of this model is not, None where it is the model's own."""
        return model_named(self.model).why_not_served

    def shape(self) -> MLAShape:
        """One rank's shape; NoBackend for a sparse model unless dense attention is asked for."""
        q_dtype = one_of("dtype", self.dtype, DTYPES)
        formats = {cache_format.name: cache_format for cache_format in CacheFormat}
        cache_format = one_of("cache_format", self.cache_format or self.dtype, formats)
        model = model_named(self.model)
        if self.heads is not None and self.tensor_parallel is not None:
            raise ValueError(f"heads: expected --heads or --tp, not both, got {self.heads} and {self.tensor_parallel}")
        if not self.dense and (why := model.why_not_served):
            raise NoBackend(f"{why}. --dense asks for dense attention")
        ranks = self.tensor_parallel or (default_ranks(model) if self.heads is None else 1)
        shape = model.shape(tensor_parallel=ranks, page_size=self.page_size, q_dtype=q_dtype, cache_format=cache_format)
        return shape if self.heads is None else replace(shape, heads=self.heads)


def one_of(name: str, value: str, allowed: dict[str, T]) -> T:
    """The entry of `allowed` called `value`; ValueError listing them for any other."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return allowed[value]


def default_ranks(model: Model) -> int:
    """The most ranks, up to 8, that divide the model's heads."""
    return max(ranks for ranks in range(1, MAX_DEFAULT_RANKS + 1) if model.heads % ranks == 0)


def best_local_arch() -> Arch:
    """The architecture of the first device of this machine that is supported; the CPU comes last."""
    return next(device.arch for device in local_devices() if device.arch is not None)


def answer(request: Request, settings: Settings, backend: str | None = None) -> Explanation:
    """What dispatch says under these settings, as `MLAAttention` would ask it."""
    request = replace(request, deterministic=request.deterministic or settings.deterministic)
    return explain(request, backend or settings.backend, settings.disable)


def verdict(candidate: Candidate, explanation: Explanation) -> str:
    """One candidate's part of the answer."""
    if candidate.reasons:
        return f"refused: {'; '.join(candidate.reasons)}"
    return "chosen" if candidate.name == explanation.chosen else "supported, comes after the chosen one"


def as_section(explanation: Explanation) -> Section:
    """The request and every candidate in order."""
    rows = tuple((candidate.name, verdict(candidate, explanation)) for candidate in explanation.candidates)
    return Section(str(explanation.request), ("backend", "verdict"), rows)


def note_section(note: str) -> Section:
    """What a person reads above the answer."""
    return Section("Dense attention of a sparse model", ("name", "value"), (("note", note),))


def as_json(explanation: Explanation) -> dict[str, object]:
    """The same as plain values."""
    return {
        "request": str(explanation.request),
        "phase": explanation.request.phase.value,
        "arch": explanation.request.arch.name,
        "chosen": explanation.chosen,
        "forced": explanation.forced,
        "candidates": [
            {"backend": candidate.name, "verdict": verdict(candidate, explanation), "reasons": list(candidate.reasons)}
            for candidate in explanation.candidates
        ],
    }
