"""Bad input: one test a row of the error table. Each error names the argument, what is allowed and what it got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from portable_mla import (
    CacheFormat,
    Capacity,
    MLAShape,
    NoBackend,
    PagedBatch,
    Phase,
    Request,
    arch_named,
    mla_decode,
    select,
)
from portable_mla.core.checks import check_kv_scale
from portable_mla.decode.arguments import DecodeArguments
from tests.support.cases import Case, build


def call(**changes: Any) -> tuple[Tensor, Tensor]:
    """A valid call with some arguments changed."""
    problem = build(Case((33, 5), garbage="zero"))
    arguments: dict[str, Any] = {
        "q": problem.q,
        "kv_cache": problem.kv_cache,
        "block_table": problem.batch.block_table,
        "kv_lens": problem.batch.kv_lens,
        "softmax_scale": 0.1,
        "latent_dim": 512,
    }
    changes = {name: change(arguments.get(name)) if callable(change) else change for name, change in changes.items()}
    return mla_decode(**{**arguments, **changes})


def refused(error: type[Exception], message: str, **changes: Any) -> None:
    """The call raises `error` with `message`."""
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_unchanged_call_is_valid() -> None:
    assert call()[0].shape == (2, 4, 512)


@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "kv_lens"])
@pytest.mark.parametrize("value", [None, [1, 2], 3.0])
def test_a_thing_that_is_no_tensor(name: str, value: object) -> None:
    refused(TypeError, f"{name}: expected a tensor, got {type(value).__name__}", **{name: value})


def test_tensors_on_two_devices() -> None:
    refused(ValueError, "q: is on meta, kv_cache is on cpu", q=lambda q: q.to("meta"))
    refused(ValueError, "kv_lens: is on meta, kv_cache is on cpu", kv_lens=lambda lens: lens.to("meta"))


def test_wrong_rank() -> None:
    refused(ValueError, r"q: expected \[tokens, heads, latent \+ rope\], got shape \(2, 576\)", q=lambda q: q[:, 0])
    refused(ValueError, "kv_cache: expected .*got shape", kv_cache=lambda cache: cache[:, :, None])


def test_wrong_last_dimension() -> None:
    message = "kv_cache: expected rows of 576 for 512 latent [+] 64 rope in bf16, got 560"
    refused(ValueError, message, kv_cache=lambda cache: cache[..., :560])


@pytest.mark.parametrize("latent_dim", [0, -1, 577])
def test_latent_dim_outside_the_row(latent_dim: int) -> None:
    refused(ValueError, rf"latent_dim: expected 1 to 576 .*got {latent_dim}", latent_dim=latent_dim)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool])
def test_q_of_an_unsupported_dtype(dtype: torch.dtype) -> None:
    refused(TypeError, "q: expected a dtype of torch.bfloat16, torch.float16", q=lambda q: q.to(dtype))


def test_a_scale_on_another_device() -> None:
    with pytest.raises(ValueError, match="kv_scale: is on meta, kv_cache is on cpu"):
        check_kv_scale(torch.ones(1, device="meta"), CacheFormat.fp8_e4m3, arch_named("cpu"), torch.zeros(1))


@pytest.mark.parametrize("first", [0, 2])
def test_byte_rows_that_are_not_aligned(first: int) -> None:
    cache = torch.zeros(3, 16, 658, dtype=torch.uint8)[..., first : first + 656]
    refused(ValueError, "fp8_656 needs an offset and strides that are multiples of 4", kv_cache=lambda _: cache)


def test_cache_of_an_unsupported_dtype() -> None:
    refused(TypeError, "kv_cache: expected a dtype of .*got torch.int8", kv_cache=lambda cache: cache.to(torch.int8))


def test_cache_of_another_dtype_than_q() -> None:
    refused(TypeError, "kv_cache: expected torch.bfloat16 like q.*got torch.float16", kv_cache=lambda c: c.half())


def test_fp8_cache_without_a_scale() -> None:
    refused(ValueError, "kv_scale required for fp8", kv_cache=lambda cache: cache.to(torch.float8_e4m3fn))


def test_a_scale_for_a_cache_that_has_none() -> None:
    refused(ValueError, "kv_scale: expected None for a bf16 cache", kv_scale=1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number(scale: float) -> None:
    refused(ValueError, "kv_scale: expected a positive finite", kv_scale=scale)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones((), dtype=torch.float64)])
def test_a_scale_of_the_wrong_shape_or_dtype(scale: Tensor) -> None:
    fp8 = {"kv_cache": lambda cache: cache.to(torch.float8_e4m3fn), "kv_scale": scale}
    refused(ValueError, "kv_scale: expected one float32 value, got shape", **fp8)


@pytest.mark.parametrize(
    ("arch", "flavour"), [("gfx942", "fp8_e4m3"), ("gfx950", "fp8_e4m3fnuz"), ("sm90", "fp8_e4m3fnuz")]
)
def test_the_fp8_flavour_of_another_vendor(arch: str, flavour: str) -> None:
    with pytest.raises(TypeError, match=f"{arch} reads torch.float8_e4m3.*Convert with"):
        check_kv_scale(torch.ones(()), CacheFormat[flavour], arch_named(arch))


def test_a_last_dimension_that_is_not_dense() -> None:
    refused(
        ValueError, r"q: expected a last-dimension stride of 1, got strides", q=lambda q: q.repeat(1, 1, 2)[..., ::2]
    )
    refused(
        ValueError, r"kv_cache: expected a last-dim", kv_cache=lambda c: c.transpose(1, 2).contiguous().transpose(1, 2)
    )


def test_results_that_overlap_something() -> None:
    problem = build(Case((33, 5), garbage="zero"))
    flat = torch.zeros(4000).bfloat16()
    overlapping = flat.as_strided((2, 4, 512), (512, 256, 1))
    refused(ValueError, "out: rows overlap one another, strides", out=overlapping)
    arguments = (problem.q, problem.kv_cache, problem.batch.block_table, problem.batch.kv_lens)
    with pytest.raises(ValueError, match="out: shares memory with q"):
        mla_decode(*arguments, softmax_scale=0.1, latent_dim=512, out=problem.q[..., :512])
    inside = problem.kv_cache.view(-1)[:4096].view(2, 4, 512)
    with pytest.raises(ValueError, match="out: shares memory with kv_cache"):
        mla_decode(*arguments, softmax_scale=0.1, latent_dim=512, out=inside)


def test_results_of_the_wrong_shape_or_dtype() -> None:
    refused(ValueError, r"out: expected shape \(2, 4, 512\), got \(2, 4, 576\)", out=torch.zeros(2, 4, 576).bfloat16())
    refused(TypeError, "out: expected torch.bfloat16, got torch.float32", out=torch.zeros(2, 4, 512))
    refused(TypeError, "lse: expected torch.float32, got torch.bfloat16", lse=torch.zeros(2, 4).bfloat16())
    refused(ValueError, r"lse: expected shape \(2, 4\), got \(4, 2\)", lse=torch.zeros(4, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_table_or_lengths_that_are_not_int32(dtype: torch.dtype) -> None:
    refused(TypeError, "block_table: expected int32, got", block_table=lambda table: table.to(dtype))
    refused(TypeError, "kv_lens: expected int32, got", kv_lens=lambda lens: lens.to(dtype))
    query_lens = torch.ones(2, dtype=dtype)
    refused(TypeError, "query_lens: expected int32, got", query_lens=query_lens)


def test_a_table_of_the_wrong_shape() -> None:
    lens = torch.tensor([3, 5], dtype=torch.int32)
    refused(ValueError, r"kv_lens: expected \[1\] as block_table has rows, got 2", block_table=lambda t: t[:1])
    refused(IndexError, r"block_table: request 0 column 0: .*got -1", block_table=lambda t: t[:, :0], kv_lens=lens)
    refused(ValueError, "block_table: expected 2 dimensions", block_table=lambda t: t[0])


def test_a_table_or_lengths_with_gaps() -> None:
    gaps = "expected a last-dimension stride of 1, got strides"
    refused(ValueError, f"block_table: {gaps}", block_table=lambda t: t.repeat(1, 2)[:, ::2])
    refused(ValueError, f"kv_lens: {gaps}", kv_lens=lambda lens: lens.repeat(2)[::2])


@pytest.mark.parametrize("scale", [None, 0.0, -0.1, math.nan, math.inf, "0.1", True])
def test_a_softmax_scale_that_is_no_positive_number(scale: object) -> None:
    refused(ValueError, "softmax_scale: expected a positive", softmax_scale=scale)


def test_the_softmax_scale_has_no_default() -> None:
    problem = build(Case((3,)))
    with pytest.raises(TypeError, match="softmax_scale"):
        mla_decode(problem.q, problem.kv_cache, problem.batch.block_table, problem.batch.kv_lens, latent_dim=512)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_a_token_count_that_does_not_fit_a_uniform_batch() -> None:
    refused(ValueError, r"q: expected 6 tokens \(2 requests x max_query_len 3\), got 2", max_query_len=3)


@pytest.mark.parametrize("max_query_len", [0, -1])
def test_a_query_length_below_one(max_query_len: int) -> None:
    refused(ValueError, f"max_query_len: expected at least 1, got {max_query_len}", max_query_len=max_query_len)


def test_lengths_that_host_memory_shows_to_be_wrong() -> None:
    lens = torch.tensor([33, 100], dtype=torch.int32)
    refused(ValueError, r"kv_lens: request 1: expected 0 to 64 \(block_table holds 64.*got 100", kv_lens=lens)
    refused(ValueError, "kv_lens: request 0: expected 0 to .*got -1", kv_lens=torch.tensor([-1, 3]).int())
    query_lens = torch.tensor([1, 2], dtype=torch.int32)
    refused(
        ValueError, r"query_lens: request 1: expected 0 to 1 \(that is max_query_len\), got 2", query_lens=query_lens
    )
    longer = {"query_lens": query_lens, "max_query_len": 2}
    refused(ValueError, "query_lens: 3 query tokens, but there is room for 2", **longer)


@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1])
def test_a_page_id_outside_the_cache(page: int) -> None:
    def spoil(table: Tensor) -> Tensor:
        table = table.clone()
        table[0, 2] = page
        return table

    refused(IndexError, rf"block_table: request 0 column 2: expected a page in \[0, 6\), got {page}", block_table=spoil)


def test_an_unknown_backend() -> None:
    refused(ValueError, "backend: expected one of .*cpu, reference, got 'nope'", backend="nope")


def test_nothing_that_can_serve_lists_every_backend() -> None:
    shape = MLAShape(16, 512, 64, 64, torch.bfloat16, CacheFormat.bf16)
    request = Request(arch_named("cpu"), shape, Phase.prefill, 1, True, False, Capacity(1, 1, 1, 64, 1, 0))
    with pytest.raises(NoBackend, match="(?s)cpu: needs a shape.s nope_dim.*reference: needs a shape.s nope_dim"):
        select(request)


@pytest.mark.parametrize("field", ["heads", "latent_dim", "page_size"])
def test_a_shape_that_is_not_positive(field: str) -> None:
    values: dict[str, Any] = {"heads": 16, "latent_dim": 512, "rope_dim": 64, "page_size": 64, field: 0}
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        MLAShape(**values, q_dtype=torch.bfloat16, cache_format=CacheFormat.bf16)
    values[field] = 1.5
    with pytest.raises(TypeError, match=f"{field}: expected an int, got float"):
        MLAShape(**values, q_dtype=torch.bfloat16, cache_format=CacheFormat.bf16)


def test_empty_batches_give_empty_results() -> None:
    empty = torch.zeros(0, 1, dtype=torch.int32)
    out, lse = call(q=lambda q: q[:0], block_table=empty, kv_lens=empty[:, 0])
    assert (out.shape, lse.shape) == ((0, 4, 512), (0, 4))


def test_padding_rows_of_an_empty_batch_are_defined() -> None:
    empty = torch.zeros(0, 1, dtype=torch.int32)
    out, lse = call(block_table=empty, kv_lens=empty[:, 0], query_lens=empty[:, 0])
    assert not bool(out.any())
    assert bool((lse == -torch.inf).all())


def test_a_failed_call_writes_nothing() -> None:
    out, lse = torch.full((2, 4, 512), 7.0).bfloat16(), torch.full((2, 4), 7.0)
    refused(ValueError, "kv_lens", kv_lens=torch.tensor([33, 100]).int(), out=out, lse=lse)
    assert bool((out == 7).all())
    assert bool((lse == 7).all())


def test_a_cache_that_spans_more_than_any_address() -> None:
    problem = build(Case((3,)))
    huge = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided((2, 16, 576), (2**61, 576, 1))
    q, table, lens = problem.q.to("meta"), problem.batch.block_table.to("meta"), problem.batch.kv_lens.to("meta")

    with pytest.raises(ValueError, match=r"kv_cache: spans 2\*\*63 bytes or more"):
        DecodeArguments(q, huge.as_strided((4, 16, 576), (2**61, 576, 1)), PagedBatch(table, lens), 512, 0.1)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (torch.zeros(2), TypeError, "positions: expected int32 or int64, got torch.float32"),
        (
            torch.zeros(2, 1, dtype=torch.int64),
            ValueError,
            r"positions: expected one dense dimension, got shape \(2, 1\)",
        ),
        (
            torch.zeros(4, dtype=torch.int64)[::2],
            ValueError,
            r"positions: expected one dense dimension.*strides \(2,\)",
        ),
        (torch.zeros(3, dtype=torch.int32), ValueError, "positions: expected one for each of 2 query tokens, got 3"),
    ],
)
def test_positions_that_do_not_fit_the_batch_are_refused(
    positions: Tensor, error: type[Exception], message: str
) -> None:
    table, lens = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(error, match=message):
        PagedBatch(table, lens, positions=positions)
