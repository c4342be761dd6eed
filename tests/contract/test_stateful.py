"""One attention under a serving engine, in any order of events: requests come, grow and go, steps are planned, run,
captured and replayed, memory is reused, streams change. Its rows stay right and its buffers stay where they are."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from portable_mla import GraphCaptureError, MLAAttention, PagedBatch, PlanMismatch
from tests.support.cases import Problem
from tests.support.serving_engine import MAX_BATCH, MODELS, PAGES, Form, Model, Result, Step
from tests.support.serving_model import Serving, empty_result, forms, picks
from tests.support.targets import Target

STEPS = 20
SHARE = 6  # one in so many of the profile's examples: each has STEPS steps
DELAY = 100_000_000  # cycles, some 50 ms: longer than it takes to issue a step

bad_pages, bad_kv_lens = (-1, PAGES, 2**31 - 1), (-1, None, 2**31 - 1)  # None: one more than the table holds


@dataclass(frozen=True)
class Captured:
    """A graph of one call, or of a whole step, and the tensors it reads and writes."""

    attention: MLAAttention
    graph: torch.cuda.CUDAGraph
    frame: Problem
    result: Result
    whole: bool


def same(one: Result, other: Result, what: str) -> None:
    """Bitwise equality of out and lse."""
    for name, left, right in zip(("out", "lse"), one, other, strict=True):
        assert torch.equal(left, right), f"{what}: {name} has other bits"


class ServingMachine(Serving):
    """Everything that an engine may do with an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: dict[tuple[MLAAttention, int, bool], Captured] = {}

    def teardown(self) -> None:
        self.graphs.clear()
        super().teardown()

    # Steps

    @rule(form=forms)
    def a_step_is_served(self, form: Form) -> None:
        self.step = self.engine.step(form)
        self.check(self.step.problem, self.serve(self.active, self.step))

    @rule()
    def another_layer_runs_with_the_same_plan(self) -> None:
        problem = self.planned().problem
        problem = problem.with_q(problem.q.flip(1))
        self.check(problem, self.call(self.active, problem))

    @rule()
    def the_engine_turns_to_the_other_attention(self) -> None:
        self.active = self.deterministic if self.active is self.usual else self.usual
        self.step = None

    @rule()
    def fresh_metadata_gives_the_same_bits(self) -> None:
        step = self.planned()
        memory = self.fresh.memory()
        same(self.serve(self.fresh, step), self.serve(self.usual, step), "persistent_metadata=False")
        assert self.fresh.memory() == memory, "metadata that is allocated anew has another size"

    @rule(pick=picks)
    def a_request_alone_has_the_bits_it_has_in_the_batch(self, pick: int) -> None:
        step = self.planned()
        served = [request for request, n in enumerate(step.problem.query_lens) if n]
        if not served:
            return
        request = served[pick % len(served)]
        only = step.problem.only(request)
        self.plan(self.deterministic, only.batch)
        alone = self.call(self.deterministic, only)
        out, lse = self.serve(self.deterministic, step)
        self.covered.add("alone")
        rows = step.rows(request)
        same(alone, (out[rows], lse[rows]), f"request {request} alone, deterministic")

    @rule(collect=st.booleans())
    def memory_comes_back_full_of_nan(self, collect: bool) -> None:
        sizes = [t.nbytes for attention in self.held for own in attention._buffers.tensors().values() for t in own]
        noise = [torch.full((size // 4 + 1,), torch.nan, device=self.target.device) for size in sizes * 2]
        del noise
        if collect:
            gc.collect()
        problem = self.planned().problem
        self.check(problem, self.call(self.active, problem))

    @rule()
    def too_large_a_batch_is_refused(self) -> None:
        problem, size = self.planned().problem, MAX_BATCH + 1
        lens = self.engine.ints((0,) * size)
        captured = any(attention is self.active for attention, _, _ in self.graphs)
        article = "a new" if captured else "an"
        with pytest.raises(PlanMismatch, match=f"max_batch: planned {size - 1}, got {size}. Build {article} MLAAtt"):
            self.active.plan(PagedBatch(lens[:, None], lens))
        self.check(problem, self.call(self.active, problem))

    @precondition(lambda self: self.in_graphs or not self.on_gpu)  # the reference would read the bad page
    @rule(pick=picks, page=st.sampled_from(bad_pages), kv_len=st.sampled_from(bad_kv_lens), lengths=st.booleans())
    def a_bad_request_harms_no_other(self, pick: int, page: int, kv_len: int | None, lengths: bool) -> None:
        step = self.planned()
        lens = zip(step.problem.kv_lens, step.problem.query_lens, strict=True)
        able = [request for request, (n, m) in enumerate(lens) if n >= m > 0]
        if not able:
            return
        request = able[pick % len(able)]
        room = step.batch.block_table.shape[1] * self.engine.model.shape.page_size
        bad = step.with_kv_len(request, room + 1 if kv_len is None else kv_len)
        bad = bad if lengths else step.with_page(request, page)
        before = self.call(self.active, step.problem)
        if self.on_gpu:
            # A wrong length counts as 0 tokens, which may move the cuts of the others.
            others = step.with_kv_len(request, 0) if lengths else step.batch
            self.fault_on_device(step, request, bad, others)
            self.plan(self.active, step.batch)
        else:
            with pytest.raises(ValueError if lengths else IndexError, match=rf"request {request}\b"):
                self.active.plan(bad)
            self.active.check()
        self.covered.add("lengths" if lengths else "pages")
        same(self.call(self.active, step.problem), before, "the step after a bad request")

    def fault_on_device(self, step: Step, request: int, bad: PagedBatch, others: PagedBatch) -> None:
        """Run a batch with one bad request: its rows are NaN, the rest has the bits that it has in `others`."""
        self.plan(self.active, others)
        expected = self.call(self.active, step.problem)
        self.plan(self.active, bad)
        result = self.call(self.active, step.problem)
        for name, got, right in zip(("out", "lse"), result, expected, strict=True):
            assert bool(got[step.rows(request)].isnan().all()), f"{name} of the bad request is not NaN"
            right[step.rows(request)] = got[step.rows(request)] = 0
        same(result, expected, "rows of the other requests")
        with pytest.raises(IndexError, match=rf"request {request}\b"):
            self.active.check()
        self.active.check()

    # Graphs and streams

    @precondition(lambda self: self.in_graphs)
    @rule(requests=st.integers(1, MAX_BATCH), whole=st.booleans())
    def a_graph_is_captured(self, requests: int, whole: bool) -> None:
        self.capture(requests, whole)

    def capture(self, requests: int, whole: bool) -> None:
        """A graph for so many requests of the active attention; its plan is in it too if `whole`."""
        attention, frame = self.active, self.engine.frame(requests)
        self.plan(attention, frame.batch)
        result = self.call(attention, frame)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if whole:
                attention.plan(frame.batch)
            attention(frame.q, frame.kv_cache, *result, softmax_scale=frame.softmax_scale)
        self.graphs[attention, requests, whole] = Captured(attention, graph, frame, result, whole)
        self.step = None

    @precondition(lambda self: self.in_graphs)
    @rule(pick=picks, form=forms)
    def m20_a_replay_has_the_bits_of_an_eager_step(self, pick: int, form: Form) -> None:
        if not self.graphs:
            self.capture(MAX_BATCH, pick % 2 == 0)
        captured = list(self.graphs.values())[pick % len(self.graphs)]
        attention, frame = captured.attention, captured.frame
        step = self.engine.step(replace(form, positions=None) if captured.whole else form, frame.batch.size)
        problem = self.engine.fill(frame, step)
        if not captured.whole:
            self.plan(attention, step.batch)
        for tensor in captured.result:
            tensor.fill_(torch.nan)
        with self.no_wait():
            captured.graph.replay()
        assert torch.equal(attention.positions, step.positions), "positions after a replay are not the step's"
        self.check(problem, captured.result)
        if captured.whole:
            self.plan(attention, frame.batch)
        # An eager uniform call takes no padding.
        rows = step.problem.tokens if step.batch.query_lens is None and not captured.whole else len(frame.q)
        eager = self.call(attention, frame.with_q(frame.q[:rows]))
        out, lse = (tensor[:rows] for tensor in captured.result)
        same((out, lse), eager, "a replayed graph against eager")
        self.covered.add("a whole step" if captured.whole else "a call")
        if attention is self.active:
            self.step = None if captured.whole else step

    @precondition(lambda self: self.in_graphs)
    @rule(first=forms, second=forms)
    def the_next_step_is_planned_while_the_last_one_waits_to_run(self, first: Form, second: Form) -> None:
        steps = self.engine.step(first), self.engine.step(second)
        for step in steps:
            self.serve(self.active, step)  # compiles
        results = [empty_result(step.problem) for step in steps]
        awake = torch.cuda.Event()
        torch.cuda.synchronize()
        with self.no_wait():
            torch.cuda._sleep(DELAY)
            awake.record()
            for step, result in zip(steps, results, strict=True):
                problem = step.problem
                self.active.plan(step.batch)
                self.active(problem.q, problem.kv_cache, *result, softmax_scale=problem.softmax_scale)
        if not awake.query():
            self.covered.add("a delayed step")
        for step, result in zip(steps, results, strict=True):
            self.check(step.problem, result)
        self.step = steps[1]

    @precondition(lambda self: self.in_graphs)
    @rule(first=forms, second=forms)
    def two_attentions_serve_on_two_streams(self, first: Form, second: Form) -> None:
        steps = self.engine.step(first), self.engine.step(second)
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        results = []
        for _ in range(3):
            for attention, step, stream in zip(self.held, steps, (here, side), strict=True):
                with torch.cuda.stream(stream):
                    results.append((step.problem, self.serve(attention, step)))
        here.wait_stream(side)
        for problem, result in results:
            self.check(problem, result)
        self.step = steps[list(self.held).index(self.active)]

    @precondition(lambda self: self.on_gpu)
    @rule()
    def the_engine_moves_to_another_stream(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(stream)

    @precondition(lambda self: self.in_graphs)
    @rule(form=forms, planned=st.booleans())
    def a_capture_before_the_first_call_is_refused(self, form: Form, planned: bool) -> None:
        step, cold = self.engine.step(form), self.build()
        out, lse = empty_result(step.problem)
        if not len(out):
            return
        if planned:
            self.plan(cold, step.batch)
        with pytest.raises(GraphCaptureError, match="Run plan"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            if not planned:
                cold.plan(step.batch)
            cold(step.problem.q, self.engine.cache, out, lse, softmax_scale=step.problem.softmax_scale)
        self.check(step.problem, self.serve(cold, step))

    @precondition(lambda self: self.on_gpu)
    @rule()
    def a_capture_that_no_replay_could_repeat_is_refused(self) -> None:
        step = self.planned()
        attention = self.fresh if self.in_graphs else self.active
        why = "PERSISTENT_METADATA=0" if self.in_graphs else "reads lengths on the host"
        with pytest.raises(GraphCaptureError, match=why), torch.cuda.graph(torch.cuda.CUDAGraph()):
            attention.plan(step.batch)
        self.check(step.problem, self.serve(attention, step))


def machine_of(
    target: Target, attention: type[MLAAttention] = MLAAttention, models: tuple[Model, ...] = MODELS
) -> type[ServingMachine]:
    """The machine for one target."""
    members: dict[str, Any] = {"target": target, "attention": attention, "models": models, "covered": set()}
    return type(ServingMachine.__name__, (ServingMachine,), members)


def test_an_attention_serves_any_sequence_of_events(target: Target) -> None:
    models = tuple(model for model in MODELS if target.accepts(model.case(), deterministic=True))
    if not models:
        pytest.skip(f"{target} refuses the models' shapes, or to be deterministic")
    machine, profile = machine_of(target, models=models), settings()
    budget = settings(max_examples=max(profile.max_examples // SHARE, 1), stateful_step_count=STEPS)
    run_state_machine_as_test(machine, settings=budget)
    print(f"{target}: covered {', '.join(sorted(machine.covered))}")
    expected = {"alone"} | ({"lengths", "pages"} if target.backend != "reference" or target.device == "cpu" else set())
    if len(models) > 1:
        expected |= {"two models"}
    if target.has_kernels:
        expected |= {"a call", "a whole step", "a delayed step"}
    if profile.derandomize:  # else it is likely, not certain
        assert expected <= machine.covered, f"never happened: {expected - machine.covered}"
