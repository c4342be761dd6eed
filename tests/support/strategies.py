"""Hypothesis strategies over Case: compile-time axes from short lists, run-time axes free with a bias to boundaries."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.support.cases import CONTENTS, GARBAGE, Case

# What a kernel is compiled for: heads, geometry, page size, dtype, longest query. On a GPU each costs a second or two
# of compilation, so there the axes are drawn together from these.
COMPILED = (
    (16, (512, 64), 64, "bf16", 1),
    (5, (512, 64), 1, "bf16", 3),
    (20, (512, 64), 48, "fp16", 2),
    (12, (512, 0), 16, "bf16", 8),
    (4, (256, 64), 64, "bf16", 5),
    (40, (256, 32), 16, "fp16", 1),
    (3, (128, 32), 2, "bf16", 1),
    (128, (512, 64), 64, "bf16", 1),
    (16, (512, 64), 16, "fp32", 2),
)
HEADS = (1, 3, 4, 5, 12, 16, 20)
GEOMETRIES = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32))
PAGE_SIZES = (1, 2, 16, 48, 64)
LONGEST = 200

GPU = torch.cuda.is_available()
Compiled = tuple[int, tuple[int, int], int, str, int]


def _compiled(dtypes: tuple[str, ...], max_query_len: int, *, rope: bool) -> st.SearchStrategy[Compiled]:
    fits = [one for one in COMPILED if one[3] in dtypes and (one[1][1] or not rope)]
    return st.sampled_from([(*one[:4], min(one[4], max_query_len)) for one in fits])


def _free(dtypes: tuple[str, ...], max_query_len: int, *, rope: bool) -> st.SearchStrategy[Compiled]:
    geometries = [geometry for geometry in GEOMETRIES if geometry[1] or not rope]
    return st.tuples(
        st.sampled_from(HEADS),
        st.sampled_from(geometries),
        st.sampled_from(PAGE_SIZES),
        st.sampled_from(dtypes),
        st.integers(1, max_query_len),
    )


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
    heads, (latent_dim, rope_dim), page_size, dtype, longest_query = draw(
        _compiled(dtypes, max_query_len, rope=rope) if GPU else _free(dtypes, max_query_len, rope=rope)
    )
    kv_lens = tuple(max(n, min_kv_len) for n in draw(st.lists(kv_len(page_size), min_size=1, max_size=5)))
    ragged = max_query_len > 1 and draw(st.booleans())
    one_query_len = st.integers(0, longest_query)
    query_lens = tuple(draw(one_query_len) for _ in kv_lens) if ragged else None
    return Case(
        kv_lens,
        heads,
        latent_dim,
        rope_dim,
        page_size,
        dtype,
        query_lens,
        longest_query,
        draw(st.sampled_from(contents)),
        draw(st.sampled_from(GARBAGE)),
        draw(st.integers(0, 3)) if ragged else 0,
        draw(st.integers(0, 3)),
        draw(st.integers(0, 2**16)),
    )
