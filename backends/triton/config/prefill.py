"""PrefillTile: how one prefill launch is shaped on one GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from portable_mla.backends.triton.config.decode import Rule


@dataclass(frozen=True)
class PrefillTile:
    """The shape and the launch options of one prefill launch."""

    block_m: int  # query tokens of one program
    block_n: int  # keys of one step
    num_warps: int
    num_stages: int
    loads: Literal["pointer", "descriptor"] = "pointer"
    waves_per_eu: int = 0  # AMD only, as the three fields below
    matrix_instr_nonkdim: int = 0
    kpack: int = 1
    num_xcds: int = 1


@dataclass(frozen=True)
class PrefillTileRequest:
    """What a rule may look at: widths alone, so that a row's bits never depend on the rest of the batch."""

    qk_dim: int  # nope + rope
    v_dim: int


PrefillRule = Rule[PrefillTileRequest, PrefillTile]
PrefillRules = Sequence[PrefillRule]


def when_prefill(*, qk_above: int = 0) -> Callable[[PrefillTileRequest], bool]:
    """A rule's condition: keys wider than."""

    def matches(request: PrefillTileRequest) -> bool:
        return request.qk_dim > qk_above

    return matches
