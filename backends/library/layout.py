"""VendorLayout: how a library is called with tensors of some shapes, strides and alignments, worked out once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from portable_mla.backends.library.batch import Finishing, Step
from portable_mla.backends.library.calls import Returned, wide, wide_cache
from portable_mla.dispatch.interface import DecodeInputs


class VendorLayout(NamedTuple):
    """copied_q: wide copies could not read the queries; in_place: the library writes into out."""

    returned: Returned
    copied_q: bool
    in_place: bool
    finish: Finishing


def new_layout(
    returned: Returned, step: Step, inputs: DecodeInputs, out: Tensor, lse: Tensor, *, in_place: bool
) -> VendorLayout:
    """The layout of a call that is like none before; remembered once its finishing kernel is compiled.

    Raises NoBackend for a cache that wide copies cannot read, and GraphCaptureError where a capture could not take the
    finishing launch.
    """
    wide_cache(returned.library, inputs.kv_cache)
    finish = step.finishing(not in_place, out, lse)
    layout = VendorLayout(returned, not wide(inputs.q), in_place, finish)
    if step.finishing(not in_place, out, lse) == finish:  # a first launch, which compiles, is another each time
        inputs.remember(layout)
    return layout
