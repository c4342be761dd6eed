"""Traces and their replay: what a malformed file says; pages, preemption, and how many steps a trace takes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from portable_mla.cache.page_pool import PagePool
from portable_mla.cli.replay import Scheduler, Step
from portable_mla.cli.trace import SHIPPED_TRACE, TraceError, TraceRequest, read_trace

HEADER = "arrival_ms,input_tokens,output_tokens\n"
TRACE = tuple(TraceRequest(i, *lens) for i, lens in enumerate([(5, 9), (1, 1), (12, 3), (7, 20), (3, 4), (16, 16)]))


def run(scheduler: Scheduler, limit: int = 1000) -> list[Step]:
    steps: list[Step] = []
    while (step := scheduler.next_step()) is not None:
        assert len(steps) < limit, "the replay does not end"
        steps.append(step)
        scheduler.complete()
    return steps


@pytest.mark.parametrize("pages", [8, 11, 64])
def test_every_page_returns_to_the_pool(pages: int) -> None:
    pool = PagePool(pages, 4)
    run(Scheduler(TRACE, pool, concurrency=4))
    assert (pool.free_pages, pool.requests) == (pages, ())


@pytest.mark.parametrize("pages", [8, 11, 64])
def test_no_page_is_ever_owned_twice(pages: int) -> None:
    pool = PagePool(pages, 4)
    scheduler = Scheduler(TRACE, pool, concurrency=4)
    while scheduler.next_step() is not None:
        owned = [page for request in pool.requests for page in pool.pages(request)]
        assert len(set(owned)) == len(owned) == pages - pool.free_pages
        scheduler.complete()


def test_only_the_requests_of_the_step_own_pages() -> None:
    pool = PagePool(11, 4)
    scheduler = Scheduler(TRACE, pool, concurrency=3)
    while (step := scheduler.next_step()) is not None:
        assert set(pool.requests) == set(step.requests)
        scheduler.complete()


def test_a_tiny_pool_preempts_and_every_request_still_finishes() -> None:
    scheduler = Scheduler(TRACE, PagePool(8, 4), concurrency=4)
    run(scheduler)
    assert scheduler.preemptions > 0
    assert (scheduler.finished, scheduler.waiting, scheduler.running) == (len(TRACE), 0, ())


def test_the_youngest_is_preempted_and_waits_at_the_head() -> None:
    trace = [TraceRequest(0, 3, 5), TraceRequest(1, 3, 5), TraceRequest(2, 1, 1)]
    scheduler = Scheduler(trace, PagePool(2, 4), concurrency=2)
    scheduler.next_step()
    scheduler.complete()
    step = scheduler.next_step()
    assert step is not None
    assert step.requests == (0,)
    assert (scheduler.preemptions, scheduler.waiting) == (1, 2)


def test_a_preempted_request_is_prefilled_with_what_it_had_generated() -> None:
    trace = [TraceRequest(0, 3, 3), TraceRequest(1, 3, 5)]
    steps = run(Scheduler(trace, PagePool(2, 4), concurrency=2))
    assert [step.prefills for step in steps if step.prefills] == [((0, 3), (1, 3)), ((1, 4),)]


def test_each_generated_token_takes_one_step_of_its_request() -> None:
    steps = run(Scheduler(TRACE, PagePool(8, 4), concurrency=4))
    counts = [sum(index in step.requests for step in steps) for index in range(len(TRACE))]
    assert counts == [request.output_tokens for request in TRACE]


def test_one_slot_takes_as_many_steps_as_there_are_output_tokens() -> None:
    steps = run(Scheduler(TRACE, PagePool(64, 4), concurrency=1))
    assert len(steps) == sum(request.output_tokens for request in TRACE)


def test_a_slot_for_each_request_takes_as_many_steps_as_the_longest_output() -> None:
    steps = run(Scheduler(TRACE, PagePool(64, 4), concurrency=len(TRACE)))
    assert len(steps) == max(request.output_tokens for request in TRACE)


def test_a_step_counts_prompt_and_generated_tokens_of_its_requests() -> None:
    steps = run(Scheduler([TraceRequest(0, 5, 3), TraceRequest(1, 2, 1)], PagePool(8, 4), concurrency=2))
    assert [step.kv_tokens for step in steps] == [6 + 3, 7, 8]


def test_nothing_overtakes_the_head_of_the_queue() -> None:
    trace = [TraceRequest(0, 6, 8), TraceRequest(1, 12, 2), TraceRequest(2, 1, 1)]
    scheduler = Scheduler(trace, PagePool(4, 4), concurrency=3)
    step = scheduler.next_step()
    assert step is not None
    assert step.requests == (0,)


def test_no_step_has_more_requests_than_slots() -> None:
    steps = run(Scheduler(TRACE, PagePool(64, 4), concurrency=2))
    assert max(len(step.requests) for step in steps) == 2


def test_the_last_step_is_known_as_such() -> None:
    scheduler = Scheduler(TRACE, PagePool(8, 4), concurrency=4)
    last = []
    while scheduler.next_step() is not None:
        last.append(scheduler.is_last)
        scheduler.complete()
    assert last == [False] * (len(last) - 1) + [True]


def test_cancelling_returns_the_pages_of_running_requests() -> None:
    pool = PagePool(64, 4)
    scheduler = Scheduler(TRACE, pool, concurrency=3)
    scheduler.next_step()
    assert scheduler.cancel() == 3
    assert pool.free_pages == pool.total


def test_a_request_that_the_pool_can_never_hold_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pages: request 5 .* 32 tokens; expected at least 8 pages of 4, got 7"):
        Scheduler(TRACE, PagePool(7, 4), concurrency=1)


def test_a_concurrency_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency: expected at least 1, got 0"):
        Scheduler(TRACE, PagePool(64, 4), concurrency=0)


def test_the_shipped_trace_holds_real_conversations_of_several_thousand_tokens() -> None:
    trace = read_trace(SHIPPED_TRACE)
    assert len(trace) == 400
    assert max(request.total_tokens for request in trace) == 4176
    assert (SHIPPED_TRACE.parent / "ATTRIBUTION.md").is_file()


def test_requests_come_by_arrival_and_other_columns_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("output_tokens,who,arrival_ms,input_tokens\n2,a,9,3\n\n4,b,1,5\n")
    assert read_trace(path) == (TraceRequest(1, 5, 4), TraceRequest(9, 3, 2))


@pytest.mark.parametrize(
    ("text", "line", "column", "got"),
    [
        ("", 1, "arrival_ms", "an empty line or file"),
        (HEADER, 2, "arrival_ms", "the end of the file"),
        ("arrival_ms,input_tokens\n0,1\n", 1, "output_tokens", "'arrival_ms,input_tokens'"),
        (HEADER + "0,1,2\n1,many,2\n", 3, "input_tokens", "'many'"),
        (HEADER + "0,1.5,2\n", 2, "input_tokens", "'1.5'"),
        (HEADER + "0,1,\n", 2, "output_tokens", "''"),
        (HEADER + "-1,1,2\n", 2, "arrival_ms", "'-1'"),
        (HEADER + "0,1,-2\n", 2, "output_tokens", "'-2'"),
        (HEADER + "0,0,2\n", 2, "input_tokens", "'0'"),
        (HEADER + "0,1,99999999999\n", 2, "output_tokens", "'99999999999'"),
        (HEADER + "0,1,2\n\n1,2\n", 4, "output_tokens", "got 2"),
        (HEADER + "0,1,2,3\n", 2, "4", "got 4"),
    ],
)
def test_a_malformed_trace_names_file_line_column_and_value(
    text: str, line: int, column: str, got: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: line {line}: column {column}: expected ")
    assert got in message


def test_a_cell_that_csv_cannot_hold_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"{HEADER}0,{'1' * (csv.field_size_limit() + 1)},2\n")
    with pytest.raises(TraceError, match="line 2: column "):
        read_trace(path)
