"""What tells one compiled kernel from another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from portable_mla.runtime import direct_launch
from portable_mla.runtime.kernel_launch import KernelLaunch, alignment


def test_on_amd_a_tensor_beyond_two_gigabytes_needs_a_kernel_of_its_own() -> None:
    near, far = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    assert alignment(near, None, amd=False) == alignment(far, None, amd=False)
    assert alignment(near, None, amd=True) != alignment(far, None, amd=True)


def test_an_address_that_forbids_wide_access_needs_a_kernel_of_its_own() -> None:
    whole = torch.empty(64, dtype=torch.uint8)
    assert alignment(whole) != alignment(whole[1:])


class _Compiled:
    """A compiled kernel as Triton has it."""

    function, packed_metadata = 11, (4, 0)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("public", grid, *arguments))

    def run(self, *arguments: Any) -> None:
        self.calls.append(("direct", *arguments))


class _NewerCompiled(_Compiled):
    """One whose launcher has another name."""

    run = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kernel", "hooked", "launched"),
    [
        (_Compiled, False, ("direct", 5, 1, 1, 77, 11, (4, 0), None, None, None, "q", 3)),
        (_Compiled, True, ("public", (5, 1, 1), "q", 3)),
        (_NewerCompiled, False, ("public", (5, 1, 1), "q", 3)),
    ],
)
def test_a_launch_goes_straight_to_the_launcher_where_it_is_known_and_unobserved(
    kernel: type[_Compiled], hooked: bool, launched: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(direct_launch, "current_gpu", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    monkeypatch.setattr(direct_launch, "_hooked", lambda: hooked)
    compiled = kernel()
    direct_launch.direct_launcher(compiled, (5,), (3,))("q")
    assert compiled.calls == [launched]


def test_an_empty_chain_of_hooks_is_no_hook_and_one_in_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton", reason="needs the package triton").knobs
    assert not direct_launch._hooked(), "nothing has set a hook"
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", None)
    assert not direct_launch._hooked()
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: None)
    assert direct_launch._hooked()
    chain = type(knobs.HookChain())()
    chain.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", chain)
    assert direct_launch._hooked()


def test_a_first_launch_compiles_within_what_it_is_given() -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def compiling() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    class Kernel:
        arg_names = ("x", "C")

        def __getitem__(self, grid: object) -> Any:
            return lambda *arguments, **constants: entered.append(f"{arguments} {constants}")

    launch = KernelLaunch(Kernel(), {"C": 3}, compiling)
    launch("key", (1,), 5)
    assert entered == ["in", "(5,) {'C': 3}", "out"]
