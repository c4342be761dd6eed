"""Hypothesis strategies over Case: compile-time axes from short lists, run-time axes free with a bias to boundaries."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.cases import CONTENTS, GARBAGE, Case

HEADS = (1, 3, 4, 5, 12, 16, 20)
GEOMETRIES = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32))
PAGE_SIZES = (1, 2, 16, 48, 64)
LONGEST = 200


def kv_len(page_size: int) -> st.SearchStrategy[int]:
    """A context length, often at the edge of a page, a tile or the empty context."""
    edges = {0, 1, 2, 63, 64, 65, 127, 128, 129}
    edges |= {pages * page_size + step for pages in (1, 2, 3) for step in (-1, 0, 1)}
    return st.one_of(st.sampled_from(sorted(edge for edge in edges if 0 <= edge <= LONGEST)), st.integers(0, LONGEST))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32"),
    contents: tuple[str, ...] = tuple(CONTENTS),
    max_query_len: int = 8,
    min_kv_len: int = 0,
    rope: bool = False,
) -> Case:
    """A decode problem. rope: only geometries that have a rope part; min_kv_len raises every context to that."""
    page_size = draw(st.sampled_from(PAGE_SIZES))
    kv_lens = tuple(max(n, min_kv_len) for n in draw(st.lists(kv_len(page_size), min_size=1, max_size=5)))
    longest_query = draw(st.integers(1, max_query_len))
    ragged = max_query_len > 1 and draw(st.booleans())
    one_query_len = st.integers(0, longest_query)
    query_lens = tuple(draw(one_query_len) for _ in kv_lens) if ragged else None
    latent_dim, rope_dim = draw(st.sampled_from([g for g in GEOMETRIES if g[1] or not rope]))
    return Case(
        kv_lens,
        draw(st.sampled_from(HEADS)),
        latent_dim,
        rope_dim,
        page_size,
        draw(st.sampled_from(dtypes)),
        query_lens,
        longest_query,
        draw(st.sampled_from(contents)),
        draw(st.sampled_from(GARBAGE)),
        draw(st.integers(0, 3)) if ragged else 0,
        draw(st.integers(0, 3)),
        draw(st.integers(0, 2**16)),
    )
