"""verify: every patched module against itself before, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest error of a module's output by size, of its dtype: rounding of another order of sums, far below a wrong mask.
BOUND = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
_BATCH, _TOKENS = 2, 8

Recorded = dict[str, tuple[Tensor, Tensor]]  # of each module: hidden states in, and out


@torch.no_grad()
def record(model: nn.Module, modules: dict[str, Any]) -> Recorded:
    """One forward of the model as it is."""
    seen: Recorded = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
            hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
            seen[name] = (hidden.clone(), result[0].clone())

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(_removed(module.register_forward_hook(keep(name), with_kwargs=True)))
        _forward(model)
    return seen


@torch.no_grad()
def check_modules(model: nn.Module, modules: dict[str, Any], recorded: Recorded) -> float:
    """Give every module its recorded input again; raises RuntimeError naming the first that differs. The modules after
    it get the recorded output, so that a router that flips between two experts is not taken for a wrong attention."""
    worst = 0.0

    def feed(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            hidden = recorded[name][0]
            if "hidden_states" in keywords:
                return arguments, keywords | {"hidden_states": hidden}
            return (hidden, *arguments[1:]), keywords

        return hook

    def compare(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], result: Any) -> Any:
            nonlocal worst
            wanted = recorded[name][1]
            error = float((result[0].double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
            bound = BOUND[wanted.dtype]
            if not error <= bound:
                raise RuntimeError(
                    f"{name}: differs from the unpatched module by {error:.1e} of its size, over {bound:.1e}"
                )
            worst = max(worst, error)
            return (wanted, *result[1:])

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(_removed(module.register_forward_pre_hook(feed(name), with_kwargs=True)))
            stack.enter_context(_removed(module.register_forward_hook(compare(name))))
        _forward(model)
    return worst


def _forward(model: Any) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    token = torch.arange(_BATCH * _TOKENS, device=model.device, dtype=torch.int64).view(_BATCH, _TOKENS)
    ids = (token * 7 + 1) % vocabulary
    was_training = model.training
    model.eval()
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)


@contextmanager
def _removed(handle: Any) -> Any:
    try:
        yield
    finally:
        handle.remove()
