"""Loads that L2 drops first: by Triton's cache policy; where its TMA takes none, by rewriting the PTX of marked ones.

Triton calls a hook with the stages of each compilation. It is set only while a kernel of ours is compiled, it calls
whatever hook was set before, and PTX that it does not recognise stays as it is: loads are then ordinary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

try:
    from triton.experimental.gluon.language.nvidia.ampere import CachePolicy, FractionalEvictionPolicy

    POLICY = {"cache_policy": CachePolicy(l2=FractionalEvictionPolicy("evict_first", 1.0))}
except ImportError:
    POLICY = {}
MARK = "the next load is evict_first"  # a comment in the PTX
_LOAD = re.compile(
    rf"({MARK}(?:(?!cp\.async\.bulk\.tensor).)*?)"
    r"((?:@!?%p\d+\s+)?cp\.async\.bulk\.tensor\.[234]d\.shared::cluster\.global\.mbarrier::complete_tx::bytes)(\s[^;]*);",
    re.DOTALL,
)
_POLICY = ".reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"


def evict_first(ptx: str) -> str:
    """The PTX with the policy on the TMA load after each mark."""
    return _LOAD.sub(rf"\1{{ {_POLICY} \2.L2::cache_hint\3, policy; }}", ptx)


@contextmanager
def rewriting() -> Iterator[None]:
    """Within, compilations rewrite marked loads; nothing happens where Triton has policies, or has no such hook."""
    from triton import knobs

    if POLICY or not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        yield
        return
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = _hook(before)
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def _hook(before: Callable[..., Any] | None) -> Callable[..., Any]:
    def hook(*arguments: Any) -> Any:
        """Called with the backend, its stages and more; by some releases also with nothing, for a key of the cache."""
        found = before(*arguments) if before is not None else ("", "")
        if not arguments:
            return f"{found[0]} {MARK}", f"{found[1]} {MARK}"
        stages = arguments[1]
        make_ptx = stages.get("ptx")
        if make_ptx is not None:
            stages["ptx"] = lambda source, metadata: evict_first(make_ptx(source, metadata))
        return found

    return hook
