"""The page pool and the cache: no page twice, nothing lost, clear errors that change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portable_mla import CacheFormat, CacheFull, MLAShape, PagedLatentCache
from portable_mla.cache.page_pool import PagePool
from portable_mla.cache.paged_cache import _write_on_device

SHAPE = MLAShape(4, 512, 64, 16, torch.bfloat16, CacheFormat.bf16)


@pytest.fixture
def live() -> PagedLatentCache:
    """A cache of eight slots, all of one request and full of ones."""
    cache = PagedLatentCache(MLAShape(2, 8, 4, 4, torch.float32, CacheFormat.fp32), 2)
    cache.allocate("live", 8)
    cache.write(0, cache.slots("live", 0, 8), torch.ones(8, 12))
    return cache


def test_a_slot_of_minus_one_is_nowhere(live: PagedLatentCache) -> None:
    live.write(0, torch.tensor([-1, 3]), torch.full((2, 12), 7.0))
    assert (live.storage == 7).any(-1).sum() == 1 and (live.storage[0, 0, 3] == 7).all()


@pytest.mark.parametrize("slot", [8, -2, 2**40])
def test_a_slot_outside_the_cache_is_named_and_nothing_is_written(live: PagedLatentCache, slot: int) -> None:
    with pytest.raises(IndexError, match=rf"slots: token 1: expected -1 to 7, got {slot}"):
        live.write(0, torch.tensor([0, slot]), torch.full((2, 12), 7.0))
    assert (live.storage == 1).all()


@pytest.mark.parametrize("slots", [[-1, 5, 99, 2, -7], [-1, -1], [50], []], ids=str)
@pytest.mark.parametrize("cache_format", [CacheFormat.fp32, CacheFormat.fp8_e4m3], ids=lambda f: f.name)
def test_what_a_gpu_writes_without_reading_slots_is_what_a_cpu_writes(
    slots: list[int], cache_format: CacheFormat
) -> None:
    rows = torch.arange(len(slots) * 12, dtype=torch.float32).view(-1, 12).to(cache_format.dtype).view(torch.uint8)
    stored = torch.full((8, rows.shape[1] if len(slots) else 12), 99, dtype=torch.uint8)
    expected = stored.clone()
    for slot, row in zip(slots, rows, strict=True):
        if 0 <= slot < 8:
            expected[slot] = row
    if slots:
        _write_on_device(stored, torch.tensor(slots), rows)
    assert torch.equal(stored, expected)


@pytest.mark.parametrize(
    ("layer", "slots", "error", "message"),
    [
        (-1, torch.tensor([0]), IndexError, "layer: expected 0 to 0, got -1"),
        (1, torch.tensor([0]), IndexError, "layer: expected 0 to 0, got 1"),
        (0, torch.tensor([0.0]), TypeError, "slots: expected"),
        (0, torch.tensor([[0]]), TypeError, "slots: expected"),
        (0, torch.tensor([0], device="meta"), ValueError, "slots: is on meta"),
    ],
)
def test_a_wrong_write_is_refused_by_name(
    live: PagedLatentCache, layer: int, slots: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        live.write(layer, slots, torch.zeros(1, 12))


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, extend and free, against a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(20, 16)
        self.tokens: dict[int, int] = {}
        self.next = 0

    def _needed(self, tokens: int) -> int:
        return -(-tokens // 16)

    @rule(tokens=st.integers(0, 200))
    def allocate(self, tokens: int) -> None:
        """Add a request; refused exactly when its pages are not there."""
        request, self.next = self.next, self.next + 1
        if self._needed(tokens) > self.pool.free_pages:
            with pytest.raises(CacheFull, match=f"needs {self._needed(tokens)} pages"):
                self.pool.allocate(request, tokens)
        else:
            self.pool.allocate(request, tokens)
            self.tokens[request] = tokens

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), tokens=st.integers(0, 100))
    def extend(self, data: st.DataObject, tokens: int) -> None:
        """Lengthen a request; its pages so far stay its own."""
        request = data.draw(st.sampled_from(sorted(self.tokens)))
        before = self.pool.pages(request)
        total = self.tokens[request] + tokens
        if self._needed(total) - len(before) > self.pool.free_pages:
            with pytest.raises(CacheFull):
                self.pool.extend(request, tokens)
            assert self.pool.pages(request) == before
        else:
            self.pool.extend(request, tokens)
            self.tokens[request] = total
            assert self.pool.pages(request)[: len(before)] == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Remove a request."""
        request = data.draw(st.sampled_from(sorted(self.tokens)))
        self.pool.free(request)
        del self.tokens[request]

    @invariant()
    def every_page_has_one_owner(self) -> None:
        """Owned and free pages are all pages, each once."""
        owned = [page for request in self.pool.requests for page in self.pool.pages(request)]
        assert sorted(owned) == sorted(set(owned))
        assert len(owned) + self.pool.free_pages == 20
        assert all(0 <= page < 20 for page in owned)

    @invariant()
    def every_request_has_room_for_its_tokens_and_no_more(self) -> None:
        """Pages match tokens."""
        for request, tokens in self.tokens.items():
            assert self.pool.kv_len(request) == tokens
            assert len(self.pool.pages(request)) == self._needed(tokens)


TestPoolMachine = PoolMachine.TestCase


def test_a_request_cannot_be_allocated_twice() -> None:
    pool = PagePool(4, 16)
    pool.allocate("a", 3)
    with pytest.raises(ValueError, match="'a' is already in the cache"):
        pool.allocate("a", 3)
    assert pool.free_pages == 3


@pytest.mark.parametrize("act", ["free", "kv_len", "pages"])
def test_an_unknown_request_is_named(act: str) -> None:
    with pytest.raises(KeyError, match="'b' is not in the cache"):
        getattr(PagePool(4, 16), act)("b")


@pytest.mark.parametrize("tokens", [-1, -100])
def test_negative_lengths_are_refused_and_change_nothing(tokens: int) -> None:
    pool = PagePool(8, 16)
    pool.allocate("a", 40)
    with pytest.raises(ValueError, match=f"tokens: expected at least 0, got {tokens}"):
        pool.extend("a", tokens)
    with pytest.raises(ValueError, match="tokens"):
        pool.allocate("b", tokens)
    assert (pool.kv_len("a"), pool.free_pages) == (40, 5)


def test_a_written_row_is_where_the_batch_says() -> None:
    cache = PagedLatentCache(SHAPE, 8, layers=2)
    cache.allocate("other", 20)
    cache.allocate("mine", 40)
    rows = torch.randn(40, 576).bfloat16()
    cache.write(1, cache.slots("mine", 0, 40), rows)
    batch = cache.batch(["mine", "other"])
    pages = batch.block_table[0, :3].long()
    assert torch.equal(cache[1][pages].reshape(-1, 576)[:40], rows)
    assert batch.kv_lens.tolist() == [40, 20]
    assert batch.positions is not None
    assert batch.positions.tolist() == [39, 19]


def test_positions_count_from_the_first_query_token() -> None:
    cache = PagedLatentCache(SHAPE, 8)
    cache.allocate("a", 20)
    cache.allocate("b", 5)
    batch = cache.batch(["a", "b"], query_lens=[3, 1], max_query_len=3)
    assert batch.positions is not None
    assert batch.positions.tolist() == [17, 18, 19, 4]


def test_slots_outside_a_request_are_refused() -> None:
    cache = PagedLatentCache(SHAPE, 8)
    cache.allocate("a", 20)
    with pytest.raises(ValueError, match="0 <= start <= stop <= 20, got 10 and 21"):
        cache.slots("a", 10, 21)


def test_rows_of_another_width_or_dtype_are_refused() -> None:
    cache = PagedLatentCache(SHAPE, 8)
    cache.allocate("a", 2)
    for rows in (torch.zeros(2, 575).bfloat16(), torch.zeros(2, 576), torch.zeros(3, 576).bfloat16()):
        with pytest.raises(ValueError, match="rows: expected"):
            cache.write(0, cache.slots("a", 0, 2), rows)


@pytest.mark.parametrize(
    ("cache_format", "width", "size"), [("bf16", 576, 2), ("fp32", 576, 4), ("fp8_e4m3", 576, 1), ("fp8_656", 656, 1)]
)
def test_storage_has_the_formats_width(cache_format: str, width: int, size: int) -> None:
    shape = MLAShape(4, 512, 64, 16, torch.bfloat16, CacheFormat[cache_format])
    storage = PagedLatentCache(shape, 3, layers=2).storage
    assert storage.shape == (2, 3, 16, width)
    assert storage.element_size() == size


def test_fp8_656_rows_hold_one_geometry() -> None:
    with pytest.raises(ValueError, match="latent 512 and rope 64, got latent 256 and rope 64"):
        MLAShape(4, 256, 64, 16, torch.bfloat16, CacheFormat.fp8_656)
