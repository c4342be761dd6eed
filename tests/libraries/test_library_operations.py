"""What the adapters do on the host in each call beside the library's: tensor operations and launches, by count."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portable_mla.backends.library.batch import Step
from portable_mla.backends.library.calls import Returned
from portable_mla.backends.library.layout import new_layout
from portable_mla.dispatch.interface import CallMemo, DecodeInputs
from portable_mla.runtime.kernel_launch import KernelLaunch
from tests.libraries.test_library_runs import LIBRARIES, Bound, put
from tests.support import fake_libraries as fakes
from tests.support.cases import Case, Problem, build
from tests.support.library_machine import machine, request

pytestmark = pytest.mark.usefixtures("plain_environment")

UNIFORM = Case((130, 65, 1), heads=16, page_size=64)
EMPTY_REQUEST = Case((130, 65, 0), heads=16, page_size=64)
# An operation costs a host 1 us, a slow one several: here are the views that the libraries ask for, and nothing else.
OPERATIONS = {
    "flash_mla 1": ("view", "unsqueeze"),
    "flash_mla 2": ("view", "unsqueeze"),
    "flash_mla 3": ("view", "unsqueeze"),
    "sgl-flash-mla": ("view", "unsqueeze"),
    "vllm flashmla": ("view", "view", "unsqueeze"),
    "flash_attn_interface": ("unsqueeze", "split_with_sizes", "split_with_sizes"),
    "vllm flash_attn": ("unsqueeze", "split_with_sizes", "split_with_sizes"),
    "flashinfer 0.6": ("split_with_sizes", "split_with_sizes"),
    "flashinfer 0.7": ("split_with_sizes", "split_with_sizes"),
    "flashinfer table": ("view", "view"),
    "aiter": ("view", "slice", "slice", "slice"),
    # Its kernels have no 16 heads: queries are padded, and results copied.
    "aiter persistent": ("view", "copy_", "clone", *("slice",) * 6),
}
WITHOUT_LAUNCH = ("flashinfer 0.6", "flashinfer 0.7")  # their plan reads on the host that every row sees keys
LIBRARY_CALLS = ((fakes, "flash_mla"), (fakes, "flash_attn3"), (fakes.PlannedWrapper, "attend"), (fakes, "table_call"),
                 (fakes, "aiter_decode"))  # fmt: skip


class Count(TorchDispatchMode):
    """The operations in its scope, but for those of the library and of the finishing launch, which it counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.launches, self._apart = 0, False
        for owner, name in LIBRARY_CALLS:
            monkeypatch.setattr(owner, name, self._aside(getattr(owner, name)))
        finish = Step._finish_with_torch

        def launch(*arguments: Any) -> None:
            self.launches += 1
            finish(*arguments)

        monkeypatch.setattr(Step, "_finish_with_torch", self._aside(launch))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._apart:
            self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def _aside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def uncounted(*arguments: Any, **keywords: Any) -> Any:
            with self._set_apart():
                return function(*arguments, **keywords)

        return uncounted

    @contextmanager
    def _set_apart(self) -> Iterator[None]:
        self._apart = True
        yield
        self._apart = False


def counted(library: str, problem: Problem, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Count:
    """The second call of a step, which has the library's schedule of the first."""
    with machine(folder, monkeypatch) as here:
        bound = Bound(*put(here, library), problem)
        out, lse = bound.step(problem)
        count = Count(monkeypatch)
        with count:
            bound.runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale)
    return count


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_call_makes_the_views_that_the_library_needs_and_no_more(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = counted(library, build(UNIFORM), tmp_path, monkeypatch)
    assert sorted(count.operations) == sorted(OPERATIONS[library])
    assert count.launches == (library not in WITHOUT_LAUNCH)


@pytest.mark.parametrize("library", WITHOUT_LAUNCH)
def test_rows_that_see_nothing_are_finished_by_a_launch(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert counted(library, build(EMPTY_REQUEST), tmp_path, monkeypatch).launches == 1


def test_a_finishing_launch_takes_the_tensors_of_its_own_call_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []
    looked_up: list[Any] = []

    def at(self: KernelLaunch, key: Hashable, grid: tuple[int, ...]) -> Callable[..., None]:
        looked_up.append((key, grid))
        return lambda *arguments: launched.append((grid, *arguments))

    monkeypatch.setattr(KernelLaunch, "at", at)
    monkeypatch.setattr(KernelLaunch, "ready", lambda self, key: "compiled")
    step = Step(request("sm90"), table=False)
    step.buffers = step._allocate(torch.device("cpu"))
    theirs = torch.zeros(4, 16, 1)

    def finish(out: torch.Tensor, lse: torch.Tensor) -> tuple[Any, ...]:
        step._finishing_launch(False, out, lse)(theirs, (16, 1, 1), None, out, lse)
        return launched.pop()

    def results(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(tokens, heads, 512, dtype=torch.bfloat16)[:, :16], torch.zeros(tokens, heads)[:, :16]

    for index, (tokens, heads) in enumerate(((4, 16), (4, 16), (2, 16), (4, 17))):
        out, lse = results(tokens, heads)
        grid, states, copied, *pointers_and_rest = finish(out, lse)
        pointers, rest = pointers_and_rest[:3], pointers_and_rest[3:]
        assert grid == (tokens, 1) and states == step.states.data_ptr() and copied is None
        assert pointers == [tensor.data_ptr() for tensor in (theirs, out, lse)]
        assert rest == [16, 1, 1.0, 16, 1, 1, heads * 512, 512, heads, 1]
        assert len(looked_up) == (1, 1, 2, 3)[index]
    last, lse = results(4, 16)
    kept = weakref.ref(last)
    finish(last, lse)
    del last
    assert kept() is None


def test_a_librarys_results_at_an_odd_address_are_finished_by_a_kernel_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[Hashable] = []
    monkeypatch.setattr(KernelLaunch, "at", lambda self, key, grid: lambda *arguments: launched.append(key))
    monkeypatch.setattr(KernelLaunch, "ready", lambda self, key: "compiled")
    step = Step(request("sm90"), table=False)
    step.buffers = step._allocate(torch.device("cpu"))
    out, lse = torch.zeros(4, 16, 512, dtype=torch.bfloat16), torch.zeros(4, 16)
    theirs = torch.zeros(4 * 16 + 1)
    for given in (theirs[:-1], theirs[1:]):
        step._finishing_launch(False, out, lse)(given.view(4, 16, 1), (16, 1, 1), None, out, lse)
    assert launched[0] != launched[1]


def test_a_layout_is_remembered_once_its_finishing_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(KernelLaunch, "at", lambda self, key, grid: lambda *arguments: compiled.append("compiled"))
    monkeypatch.setattr(KernelLaunch, "ready", lambda self, key: next(iter(compiled), None))
    monkeypatch.setattr(Step, "finishing", Step._finishing_launch)
    step = Step(request("sm90"), table=False)
    step.buffers = step._allocate(torch.device("cpu"))
    problem = build(UNIFORM)
    memo, out, lse = CallMemo(), problem.q[..., :512].contiguous(), torch.zeros(3, 16)
    inputs = DecodeInputs(problem.q, problem.kv_cache, memo)
    returned = Returned("a library", out.shape, out.dtype, lse.shape)
    first = new_layout(returned, step, inputs, out, lse, in_place=True)
    assert memo.layout is None
    first.finish(lse, (16, 16, 1), None, out, lse)
    second = new_layout(returned, step, inputs, out, lse, in_place=True)
    assert memo.layout is second
    assert (second.returned, second.copied_q, second.in_place) == (returned, False, True)
