"""The torch operators behind vendor libraries' Python calls, computed on a CPU by the libraries' stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.support import fake_libraries as fakes

_DENSE = (
    "Tensor q", "Tensor kcache", "int head_size_v", "Tensor seqlens_k", "Tensor block_table", "float softmax_scale",
    "bool is_causal", "Tensor(a!)? tile_scheduler_metadata", "Tensor(b!)? num_splits",
)  # fmt: skip
_FWD = (
    "Tensor q", "Tensor k", "Tensor v", "Tensor? k_new", "Tensor? v_new", "Tensor? q_v", "Tensor(out!)? out",
    "Tensor? cu_seqlens_q", "Tensor? cu_seqlens_k", "Tensor? cu_seqlens_k_new", "Tensor? seqused_q",
    "Tensor? seqused_k", "int? max_seqlen_q", "int? max_seqlen_k", "Tensor? page_table", "Tensor? kv_batch_idx",
    "Tensor? leftpad_k", "Tensor? rotary_cos", "Tensor? rotary_sin", "Tensor? seqlens_rotary", "Tensor? q_descale",
    "Tensor? k_descale", "Tensor? v_descale", "float softmax_scale", "bool is_causal", "int window_size_left",
    "int window_size_right", "float softcap", "bool is_rotary_interleaved", "Tensor? scheduler_metadata",
    "int num_splits", "bool? pack_gqa", "int sm_margin", "Tensor? s_aux", "int cp_world_size", "int cp_rank",
    "Tensor? cp_tot_seqused_k",
)  # fmt: skip
_NEUTRAL = {
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True, "sm_margin": 0,
    "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip


def dense_decode(given: dict[str, Any]) -> tuple[Any, ...]:
    """FlashMLA's: plans where no schedule is given, and returns the one that it used."""
    schedule, splits = given.pop("tile_scheduler_metadata"), given.pop("num_splits")
    lens, table, out = given.pop("seqlens_k"), given.pop("block_table"), given.pop("out_", None)
    schedule = lens.clone() if schedule is None else schedule
    splits = lens.clone() if splits is None else splits
    assert torch.equal(splits, lens)
    returned = fakes.flash_mla(
        given.pop("q"), given.pop("kcache"), table, lens, given.pop("head_size_v"), schedule,
        given.pop("softmax_scale"), given.pop("is_causal"), out,
    )  # fmt: skip
    assert not any(given.values()), "an argument of a later release"
    return *returned, schedule, splits


def forward(given: dict[str, Any]) -> list[Any]:
    """FA3's, with out, LSE and two partial results."""
    q, k, v, q_v, out = (given.pop(name) for name in ("q", "k", "v", "q_v", "out"))
    cu_seqlens_q, lens, table = (given.pop(name) for name in ("cu_seqlens_q", "seqused_k", "page_table"))
    scale, schedule = given.pop("softmax_scale"), given.pop("scheduler_metadata")
    assert given.pop("is_causal") and given.pop("num_splits") >= 1
    assert given.pop("max_seqlen_q") >= 1 and given.pop("max_seqlen_k") >= 1
    returned = fakes.flash_attn3(q, k, v, q_v, cu_seqlens_q, lens, table, scale, schedule, out)
    assert {name: value for name, value in given.items() if value is not None} == _NEUTRAL
    return [*returned, q.new_empty(0), q.new_empty(0)]


@dataclass(frozen=True)
class FakeOperator:
    """An operator by its schema."""

    path: str
    arguments: tuple[str, ...]
    returns: str
    function: Callable[[dict[str, Any]], Any]

    @contextmanager
    def registered(self) -> Iterator[list[list[str]]]:
        """It is there; which arguments its calls had, by name, is added to the list."""
        namespace, name = self.path.split(".")
        names = [argument.split("=")[0].split()[-1] for argument in self.arguments]
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(f"{name}({', '.join(self.arguments)}) -> {self.returns}")
        calls: list[list[str]] = []

        def called(*values: Any) -> Any:
            calls.append([name for name, value in zip(names, values, strict=False) if value is not None])
            return self.function(dict(zip(names, values, strict=False)))  # defaults at the end are left out

        library.impl(name, called, "CompositeExplicitAutograd")
        yield calls
        library._destroy()


OPERATORS = {
    "sgl-flash-mla": FakeOperator(
        "flash_mla_legacy.dense_decode_fwd", _DENSE, "(Tensor, Tensor, Tensor(a)?, Tensor(b)?)", dense_decode
    ),
    "vllm flashmla": FakeOperator(
        "_flashmla_C.dense_decode_fwd", (*_DENSE, "Tensor(c!)? out_"), "(Tensor(c!), Tensor, Tensor(a)?, Tensor(b)?)",
        dense_decode,
    ),
    "vllm flash_attn": FakeOperator("_vllm_fa3_C.fwd", _FWD, "Tensor[]", forward),
}  # fmt: skip
