"""The floor that a benchmark prints beside its times, held to figures worked out apart from it."""

from __future__ import annotations

import pytest

from ci.card import Card

CARD = Card(dram=3.03, copy=3.03, matmul=786, plain_us=1)


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
    floor = CARD.floor_us([context] * batch, heads, query_len)
    assert floor == pytest.approx(expected, abs=0.05 if expected < 1 else 0.6)


def test_floor_of_a_ragged_batch_is_that_of_its_tokens() -> None:
    assert CARD.floor_us([1, 8191], 16, 1) == CARD.floor_us([4096, 4096], 16, 1)
