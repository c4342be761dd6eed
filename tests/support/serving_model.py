"""The state machine's ground: an engine with its attentions, the rules by which requests change, and what must hold."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from portable_mla import MLAAttention, PagedBatch, Settings
from tests.gpu.test_graph import no_sync
from tests.support import acceptance
from tests.support.cases import Problem
from tests.support.serving_engine import LONGEST, MAX_BATCH, MODELS, Engine, Form, Model, Result, Step
from tests.support.targets import Target

kv_lens = st.one_of(st.sampled_from((0, 1, 15, 16, 17, 64, 65, 129, 513, 1100)), st.integers(0, 150))
query_lens = st.one_of(st.integers(0, 4), st.integers(0, 24))
picks = st.integers(0, 2**16)
forms = st.builds(
    Form,
    uniform=st.sampled_from((0, 0, 1, LONGEST)),
    tight=st.booleans(),
    padding=st.integers(0, 3),
    spare_columns=st.integers(0, 3),
    positions=st.sampled_from((None, torch.int32, torch.int64)),
    backwards=st.booleans(),
)


def empty_result(problem: Problem) -> Result:
    """out and lse full of NaN."""
    q = problem.q
    out = torch.full((*q.shape[:2], problem.latent_dim), torch.nan, dtype=q.dtype, device=q.device)
    return out, torch.full(q.shape[:2], torch.nan, dtype=torch.float32, device=q.device)


def held_by(attention: MLAAttention) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Where an attention's buffers are, and its memory."""
    tensors = attention._buffers.tensors()
    return {part: [t.data_ptr() for t in own] for part, own in tensors.items()}, attention.memory()


class Serving(RuleBasedStateMachine):
    """An engine with its attentions, the rules by which requests change, and what must hold after every rule. `step` is
    what the active attention planned last, None where requests have changed since."""

    target: ClassVar[Target]
    attention: ClassVar[type[MLAAttention]] = MLAAttention
    covered: ClassVar[set[str]]
    models: ClassVar[tuple[Model, ...]] = MODELS
    engine: Engine
    usual: MLAAttention
    deterministic: MLAAttention
    fresh: MLAAttention
    held: dict[MLAAttention, tuple[dict[str, list[int]], dict[str, int]]]
    active: MLAAttention

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu = self.target.device != "cpu"
        self.in_graphs = self.target.has_kernels
        self.step: Step | None = None

    def build(
        self, model: Model | None = None, *, deterministic: bool = False, persistent_metadata: bool = True
    ) -> MLAAttention:
        """An attention of the target, for the engine's model or another one."""
        model = model or self.engine.model
        return self.attention(
            model.shape,
            model.capacity,
            device=self.target.device,
            uniform_queries=False,
            deterministic=deterministic,
            backend=self.target.backend,
            settings=Settings(persistent_metadata=persistent_metadata),
        )

    def teardown(self) -> None:
        """Leave the device as it was."""
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())

    def no_wait(self) -> AbstractContextManager[None]:
        """Where the target promises so, any wait for the device is an error."""
        return no_sync() if self.in_graphs else nullcontext()

    def plan(self, attention: MLAAttention, batch: PagedBatch) -> None:
        """Plan without a wait."""
        with self.no_wait():
            attention.plan(batch)

    def call(self, attention: MLAAttention, problem: Problem) -> Result:
        """Run the planned step into results full of NaN."""
        out, lse = empty_result(problem)
        with self.no_wait():
            attention(problem.q, problem.kv_cache, out, lse, softmax_scale=problem.softmax_scale)
        return out, lse

    def serve(self, attention: MLAAttention, step: Step) -> Result:
        """Plan and run."""
        self.plan(attention, step.batch)
        return self.call(attention, step.problem)

    def check(self, problem: Problem, result: Result) -> None:
        """Hold real rows to the acceptance rule, and rows of nobody to 0 and -inf."""
        out, lse = (tensor[problem.tokens :] for tensor in result)
        assert not out.any() and bool((lse == -torch.inf).all()), "rows of padding are not 0 and -inf"
        acceptance.check(problem, *result)

    def planned(self) -> Step:
        """The step of the active attention, planned now where there is none."""
        if self.step is None:
            self.step = self.engine.step(Form())
            self.plan(self.active, self.step.batch)
        return self.step

    # Requests

    @initialize(
        model=picks, seed=st.integers(0, 2**32), requests=st.lists(st.tuples(kv_lens, query_lens), max_size=MAX_BATCH)
    )
    def the_engine_starts(self, model: int, seed: int, requests: list[tuple[int, int]]) -> None:
        self.engine = Engine(self.models[model % len(self.models)], self.target.device, seed)
        self.usual, self.deterministic = self.build(), self.build(deterministic=True)
        self.fresh = self.build(persistent_metadata=False)
        self.held = {attention: held_by(attention) for attention in (self.usual, self.deterministic)}
        self.active = self.usual
        for kv_len, query_len in requests:
            self.engine.add(kv_len, query_len)

    @precondition(lambda self: len(self.engine.query_lens) < MAX_BATCH)
    @rule(kv_len=kv_lens, query_len=query_lens)
    def a_request_arrives(self, kv_len: int, query_len: int) -> None:
        self.engine.add(kv_len, query_len)
        self.step = None

    @precondition(lambda self: self.engine.query_lens)
    @rule(pick=picks)
    def a_request_leaves(self, pick: int) -> None:
        self.engine.remove(pick % len(self.engine.query_lens))
        self.step = None

    @precondition(lambda self: self.engine.query_lens)
    @rule(pick=picks, tokens=st.sampled_from((1, 2, 3, 4, 16, 100)))
    def a_request_grows(self, pick: int, tokens: int) -> None:
        self.engine.extend(pick % len(self.engine.query_lens), tokens)
        self.step = None

    @rule(lens=st.lists(query_lens, min_size=MAX_BATCH, max_size=MAX_BATCH))
    def the_mix_of_query_lengths_changes(self, lens: list[int]) -> None:
        self.engine.mix(lens)
        self.step = None

    @rule(pick=picks, form=forms)
    def another_model_is_served_between(self, pick: int, form: Form) -> None:
        others = [model for model in self.models if model != self.engine.model]
        if not others:
            return
        other = Engine(others[pick % len(others)], self.target.device, pick)
        for index in range(pick % MAX_BATCH + 1):
            other.add(pick % 150 + 64 * index, 1 + index)
        step = other.step(form)
        self.check(step.problem, self.serve(self.build(other.model), step))
        self.covered.add("two models")

    # What holds after each rule

    @invariant()
    def buffers_stay_where_they_are_and_as_large(self) -> None:
        for attention, (addresses, memory) in self.held.items():
            now = held_by(attention)
            assert now[0] == addresses, "buffers moved"
            assert now[1] == memory, f"memory was {memory}, is {now[1]}"

    @invariant()
    def positions_are_those_of_the_planned_batch(self) -> None:
        if self.step is not None:
            held, right = self.active.positions, self.step.positions
            assert torch.equal(held, right), f"positions are {held.tolist()}, expected {right.tolist()}"

    @invariant()
    def nothing_is_reported_that_is_not_wrong(self) -> None:
        for attention in self.held:
            attention.check()
