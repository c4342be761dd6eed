"""PagePool: which pages of a cache belong to which request."""

from __future__ import annotations

from collections.abc import Hashable

from portable_mla.errors import CacheFull


class PagePool:
    """Pages 0 .. total-1, each free or owned by exactly one request. Freed pages are handed out again, last first."""

    def __init__(self, total: int, page_size: int) -> None:
        if total < 1 or page_size < 1:
            raise ValueError(f"total and page_size: expected at least 1, got {total} and {page_size}")
        self.total, self.page_size = total, page_size
        self._free = list(range(total - 1, -1, -1))
        self._pages: dict[Hashable, list[int]] = {}
        self._tokens: dict[Hashable, int] = {}

    @property
    def free_pages(self) -> int:
        """Pages that no request owns."""
        return len(self._free)

    @property
    def requests(self) -> tuple[Hashable, ...]:
        """Requests that own pages, in order of allocation."""
        return tuple(self._pages)

    def allocate(self, request: Hashable, tokens: int) -> None:
        """Give a new request room for `tokens`. Raises CacheFull and changes nothing if there are too few pages."""
        if request in self._pages:
            raise ValueError(f"request: {request!r} is already in the cache; extend it or free it first")
        taken = self._take(self._pages_for(tokens))
        self._pages[request], self._tokens[request] = taken, tokens

    def extend(self, request: Hashable, tokens: int) -> None:
        """Add `tokens` to a request. Raises CacheFull and changes nothing if there are too few pages."""
        self._pages_for(tokens)
        total = self.kv_len(request) + tokens
        self._pages[request] += self._take(self._pages_for(total) - len(self._pages[request]))
        self._tokens[request] = total

    def free(self, request: Hashable) -> None:
        """Return a request's pages to the pool."""
        self.kv_len(request)
        self._free += reversed(self._pages.pop(request))
        del self._tokens[request]

    def kv_len(self, request: Hashable) -> int:
        """Tokens of a request."""
        if request not in self._tokens:
            raise KeyError(f"request: {request!r} is not in the cache")
        return self._tokens[request]

    def pages(self, request: Hashable) -> tuple[int, ...]:
        """A request's pages, in order."""
        self.kv_len(request)
        return tuple(self._pages[request])

    def _pages_for(self, tokens: int) -> int:
        if tokens < 0:
            raise ValueError(f"tokens: expected at least 0, got {tokens}")
        return -(-tokens // self.page_size)

    def check_free(self, count: int) -> None:
        """Raise CacheFull unless so many pages are free."""
        if count > len(self._free):
            raise CacheFull(count, len(self._free), self.total)

    def _take(self, count: int) -> list[int]:
        self.check_free(count)
        return [self._free.pop() for _ in range(count)]
