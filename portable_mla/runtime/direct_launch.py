"""Triton's private launcher, called directly: the only module that knows its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from portable_mla.core.device import built_for_amd, current_gpu


def direct_launcher(compiled: Any, grid: tuple[int, ...], trailing: tuple[Any, ...] = ()) -> Callable[..., None]:
    """A launch of a compiled kernel on the current stream, with `trailing` after the arguments that it is given.

    Triton's own looks up hooks and metadata at each launch, 4.5 of 17 us on an H100's host. On NVIDIA, where its
    launcher is as it was in 3.6 to 3.9 and no hook is set when a launch is first remembered, it is called directly.
    """
    x, y, z = (*grid, 1, 1)[:3]
    public: Callable[..., None] = compiled[x, y, z]  # also loads the kernel
    run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    unknown = function is None or metadata is None or built_for_amd() or not torch.cuda.is_available()
    if run is None or unknown or _hooked():
        return lambda *arguments: public(*arguments, *trailing)
    stream_of, device = torch._C._cuda_getCurrentRawStream, current_gpu

    def launch(*arguments: Any) -> None:
        run(x, y, z, stream_of(device()), function, metadata, None, None, None, *arguments, *trailing)

    return launch


def _hooked() -> bool:
    """Whether a launch would call somebody: hooks are chains, which may be empty, and None in some releases."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
