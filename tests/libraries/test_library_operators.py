"""The torch operator behind a library's Python call serves where its schema is understood; elsewhere that call does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from portable_mla import BackendError, NoBackend
from portable_mla.backends.library.operator import find_operator
from tests.libraries.test_library_runs import CASES, LIBRARIES, Bound, put
from tests.support import acceptance
from tests.support.cases import Case, build
from tests.support.fake_operators import OPERATORS, FakeOperator
from tests.support.library_machine import Machine

pytestmark = pytest.mark.usefixtures("plain_environment")

UNUSED = "raise AssertionError('the Python call was used')"


def put_without_call(here: Machine, library: str) -> tuple[str, str]:
    """Install a library whose Python call must not be used; its architecture and its backend."""
    arch, backend, module, source, files = LIBRARIES[library]
    broken = source.replace("assert is_fp8_kvcache is False", UNUSED).replace("assert fa_version == 3", UNUSED)
    assert broken != source
    here.install(module, broken, files=files)
    return arch, backend


@pytest.mark.parametrize("library", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_an_operator_serves_by_our_contract(here: Machine, library: str, case: Case) -> None:
    arch, backend = put_without_call(here, library)
    problem = build(case)
    with OPERATORS[library].registered() as calls:
        try:
            bound = Bound(arch, backend, problem)
        except NoBackend as refusal:
            pytest.skip(str(refusal))
        acceptance.check(problem, *bound.step(problem))
    assert len(calls) == 2


@pytest.mark.parametrize("library", OPERATORS)
def test_its_schedules_follow_the_lengths_and_layers_share_them(here: Machine, library: str) -> None:
    arch, backend = put_without_call(here, library)
    problems = [
        build(Case(lens, heads=16, page_size=64, seed=seed)) for seed, lens in enumerate([(300, 7), (1, 299), (0, 300)])
    ]
    with OPERATORS[library].registered() as calls:
        bound = Bound(arch, backend, max(problems, key=lambda problem: problem.kv_cache.shape[0]))
        for problem in (*problems, problems[0]):
            acceptance.check(problem, *bound.step(problem))
            acceptance.check(problem, *bound.run(problem))
    scheduled = {"tile_scheduler_metadata", "scheduler_metadata"}
    made = [scheduled.isdisjoint(names) for names in calls]
    assert made == [library == "vllm flashmla" and index % 4 == 0 for index in range(16)]


@pytest.mark.parametrize("library", ["vllm flashmla", "vllm flash_attn"])
def test_results_that_it_could_not_write_are_copied(here: Machine, library: str) -> None:
    arch, backend = put_without_call(here, library)
    problem = build(CASES[0])
    tokens, heads = problem.q.shape[:2]
    out = torch.full((tokens, heads, 513), torch.nan, dtype=problem.q.dtype)[..., 1:]
    lse = torch.full((tokens, heads), torch.nan)
    with OPERATORS[library].registered() as calls:
        bound = Bound(arch, backend, problem)
        bound.step(problem)
        bound.runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale)
    acceptance.check(problem, out, lse)
    assert [bool({"out", "out_"} & set(names)) for names in calls] == [True, True, False]


def changed(operator: FakeOperator, change: str) -> FakeOperator:
    """One of another release."""
    arguments = operator.arguments
    return replace(
        operator,
        arguments={
            "another order": arguments[::-1],
            "an unknown option": (*arguments, "bool enable_batch_invariant=False"),
            "an unknown argument": (*arguments, "Tensor? topk_length"),
            "a keyword": (*arguments, "*", "bool enable_batch_invariant=False"),
            "less": tuple(text for text in arguments if text.split()[-1] not in ("block_table", "page_table")),
            "no constant": tuple(text for text in arguments if text.split()[-1] != "is_causal"),
        }[change],
    )


@pytest.mark.parametrize("library", ["sgl-flash-mla", "vllm flashmla"])
@pytest.mark.parametrize("change", ["another order", "an unknown option"])
def test_a_schema_that_asks_for_nothing_more_serves(here: Machine, library: str, change: str) -> None:
    arch, backend = put_without_call(here, library)
    problem = build(CASES[0])
    with changed(OPERATORS[library], change).registered() as calls:
        acceptance.check(problem, *Bound(arch, backend, problem).step(problem))
    assert len(calls) == 2


def test_arguments_go_by_their_names(here: Machine) -> None:
    arch, backend = put_without_call(here, "vllm flash_attn")
    problem = build(CASES[0])
    with changed(OPERATORS["vllm flash_attn"], "another order").registered() as calls:
        acceptance.check(problem, *Bound(arch, backend, problem).step(problem))
    assert len(calls) == 2


@pytest.mark.parametrize("library", OPERATORS)
@pytest.mark.parametrize("change", ["an unknown argument", "less", "no constant"])
def test_a_schema_that_is_not_understood_leaves_the_python_call(here: Machine, library: str, change: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    with changed(OPERATORS[library], change).registered() as calls:
        acceptance.check(problem, *Bound(arch, backend, problem).step(problem))
    assert calls == []


def test_arguments_by_keyword_alone_are_not_understood() -> None:
    operator, given = changed(OPERATORS["sgl-flash-mla"], "a keyword"), ("q", "kcache")
    others = dict.fromkeys(text.split()[-1] for text in OPERATORS["sgl-flash-mla"].arguments)
    with replace(operator, function=lambda given: None).registered():
        assert find_operator("a library", operator.path, given, {}, others) is None


def test_an_operator_that_is_not_there_is_none() -> None:
    assert find_operator("a library", "flash_mla_legacy.dense_decode_fwd", ("q",), {}) is None


def raises(given: dict[str, Any]) -> Any:
    """A fault of its own."""
    raise RuntimeError("illegal memory access")


@pytest.mark.parametrize("library", OPERATORS)
def test_what_an_operator_raises_is_the_cause(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem, operator = build(CASES[0]), replace(OPERATORS[library], function=raises)
    with operator.registered(), pytest.raises(BackendError, match=rf"{operator.path}\S* raised RuntimeError: il") as e:
        Bound(arch, backend, problem).step(problem)
    assert isinstance(e.value.__cause__, RuntimeError)


@pytest.mark.parametrize("library", OPERATORS)
def test_what_an_operator_returns_is_looked_at(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem, whole = build(CASES[0]), OPERATORS[library]

    def short(given: dict[str, Any]) -> Any:
        returned = whole.function(given)
        return type(returned)((returned[0], returned[1][:1], *returned[2:]))

    with replace(whole, function=short).registered(), pytest.raises(BackendError, match="returned lse of shape"):
        Bound(arch, backend, problem).step(problem)
