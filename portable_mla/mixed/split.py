"""MixedSplit: where the decodes of a step end and its prefills begin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from portable_mla.metadata.batch import PagedBatch


@dataclass(frozen=True)
class MixedSplit:
    """A step whose decodes, requests of at most threshold query tokens, come first. Counts of requests and tokens."""

    threshold: int
    decode_requests: int
    decode_tokens: int
    prefill_requests: int
    prefill_tokens: int
    longest_prefill: int

    @classmethod
    def of(cls, query_lens: Sequence[int], threshold: int) -> MixedSplit:
        """The split of a step by the scheduler's own lengths; no tensor is read.

        Raises ValueError naming the request where a decode comes after a prefill.
        """
        decodes = tuple(itertools.takewhile(lambda n: n <= threshold, query_lens))
        prefills = tuple(query_lens[len(decodes) :])
        late = next((index for index, n in enumerate(prefills) if n <= threshold), None)
        if late is not None:
            raise ValueError(
                f"query_lens: request {len(decodes) + late} has {prefills[late]} query tokens and comes after a "
                f"prefill; expected decodes (at most {threshold} query tokens) before prefills"
            )
        return cls(threshold, len(decodes), sum(decodes), len(prefills), sum(prefills), max(prefills, default=0))

    @property
    def decode_rows(self) -> slice:
        """The decodes' part of a tensor of query tokens."""
        return slice(0, self.decode_tokens)

    @property
    def prefill_rows(self) -> slice:
        """The prefills' part of a tensor of query tokens."""
        return slice(self.decode_tokens, self.decode_tokens + self.prefill_tokens)

    def parts(self, batch: PagedBatch) -> tuple[PagedBatch, PagedBatch]:
        """The decodes and the prefills of a batch, as views of its tensors.

        Raises ValueError where the batch has another number of requests, or no query_lens.
        """
        requests = self.decode_requests + self.prefill_requests
        if batch.size != requests or batch.query_lens is None:
            given = "no" if batch.query_lens is None else str(batch.size)
            raise ValueError(f"query_lens: expected the batch to have {requests}, one a request, got {given}")
        first, second = slice(0, self.decode_requests), slice(self.decode_requests, None)
        decodes, prefills = (
            PagedBatch(
                batch.block_table[part],
                batch.kv_lens[part],
                batch.query_lens[part],
                longest,
                kv_lens_on_host=None if batch.kv_lens_on_host is None else batch.kv_lens_on_host[part],
            )
            for part, longest in ((first, self.threshold), (second, max(self.longest_prefill, 1)))
        )
        if batch.positions is None:
            return decodes, prefills
        return (
            replace(decodes, positions=batch.positions[self.decode_rows]),
            replace(prefills, positions=batch.positions[self.prefill_rows]),
        )


def contexts_on_host(prefills: PagedBatch, query_lens: Sequence[int]) -> tuple[int, ...] | None:
    """What each prefill has in the cache before its new tokens, where lengths are on the host."""
    kv_lens = prefills.kv_lens_on_host
    if kv_lens is None and prefills.device.type == "cpu":
        kv_lens = prefills.kv_lens.tolist()
    return None if kv_lens is None else tuple(kv_len - n for kv_len, n in zip(kv_lens, query_lens, strict=True))
