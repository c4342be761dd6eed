"""What a mask of transformers means: causal with left padding, or nothing that a paged cache could serve."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_of(mask: Tensor, n: int, total: int) -> list[int]:
    """Tokens of left padding of each request; all of them while a chunk of a prompt is padding alone.

    mask: [batch, 1, n, total], 0 or true where a query sees a key. Raises ValueError for one that is not causal with
    left padding: a window, packed sequences, padding on the right. Waits for the device.
    """
    if tuple(mask.shape[1:]) != (1, n, total):
        raise ValueError(f"attention_mask: expected [batch, 1, {n}, {total}], got {list(mask.shape)}")
    seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    padding = total - seen[:, -1].sum(-1)
    key = torch.arange(total, device=mask.device, dtype=torch.int64)
    query = key[total - n :]
    causal = (key >= padding[:, None, None]) & (key <= query[:, None])
    real = query >= padding[:, None]
    wrong = ((seen != causal).any(-1) & real).any(-1)
    wrong |= (padding == total) & seen.any(-1).any(-1)  # the last token is padding, and some before it are not
    if bool(wrong.any()):
        raise ValueError(
            f"attention_mask: request {int(wrong.nonzero()[0])}: a LatentCache serves causal attention with padding on "
            "the left alone; got a window, packed sequences, or padding elsewhere"
        )
    return padding.tolist()
