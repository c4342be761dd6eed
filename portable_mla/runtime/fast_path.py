"""unobserved: whether torch's dispatcher would do nothing for a call but find its function."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor
from torch.compiler import is_compiling

# Who may look on: each is a function that is falsy where nobody does.
_OBSERVERS = (
    "_C._len_torch_dispatch_stack",  # TorchDispatchMode: FakeTensorMode, make_fx, counters
    "_C._len_torch_function_stack",  # TorchFunctionMode: a default device too
    "_C._functorch.peek_interpreter_stack",  # vmap, grad, functionalize
    "_C._get_tracing_state",  # torch.jit.trace
    "_C._autograd._profiler_enabled",
)


def _found(names: tuple[str, ...]) -> tuple[Callable[[], object], ...] | None:
    """torch's functions of these names; None where a release lacks one, and all calls count as observed."""
    try:
        return tuple(attrgetter(name)(torch) for name in names)
    except AttributeError:
        return None


_ASKED = _found(_OBSERVERS)


def unobserved(*arguments: object) -> bool:
    """Whether a call with these tensors is eager, and no mode, transform, tracer, profiler, tensor subclass or graph of
    gradients must see it.

    Arguments that are not None must be tensors that kernels may read and write as they lie in memory.
    """
    if is_compiling() or _ASKED is None:
        return False
    for observer in _ASKED:
        if observer():
            return False
    for argument in arguments:
        if argument is not None and (
            type(argument) is not Tensor
            or argument.is_meta
            or argument.is_neg()
            or (argument.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return True
