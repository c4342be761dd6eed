"""The floor that a benchmark prints beside its times, held to figures worked out apart from it."""

from __future__ import annotations

import pytest
import torch

from ci.card import Card
from portable_mla import MLAShape
from portable_mla.core.cache_format import CacheFormat

CARD = Card(dram=3.03, copy=3.03, matmul=786, plain_us=1)


def floor_us(kv_lens: list[int], heads: int, query_len: int) -> float:
    shape = MLAShape(heads, 512, 64, 64, torch.bfloat16, CacheFormat.bf16)
    return CARD.floor_us(shape, kv_lens, query_len)


@pytest.mark.parametrize(
    ("batch", "heads", "context", "query_len", "expected"),
    [
        (1, 128, 1024, 1, 0.5),
        (1, 128, 81920, 1, 31),
        (128, 128, 4096, 1, 211),
        (64, 128, 16384, 1, 404),
        (128, 64, 4096, 1, 205),
        (128, 128, 4096, 2, 371),  # of 292 GFLOP: longer than its 223 us of bytes
    ],
)
def test_floor(batch: int, heads: int, context: int, query_len: int, expected: float) -> None:
    floor = floor_us([context] * batch, heads, query_len)
    assert floor == pytest.approx(expected, abs=0.05 if expected < 1 else 0.6)


def test_floor_of_a_ragged_batch_is_that_of_its_tokens() -> None:
    assert floor_us([1, 8191], 16, 1) == floor_us([4096, 4096], 16, 1)
