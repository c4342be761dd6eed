"""Settings: strict, typed, read at construction."""

from __future__ import annotations

import pytest

from portable_mla import MODELS, Capacity, MLAAttention, NoBackend, Settings, mla_decode
from portable_mla.settings import VARIABLES
from tests.support.cases import Case, build
from tests.support.environment import REQUIRE, asked


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({"HOME": "/"}) == Settings()


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("1", True), ("true", True), ("False", False), ("on", True), ("OFF", False)]
)
def test_booleans_are_spelled_in_a_few_fixed_ways(text: str, value: bool) -> None:
    assert Settings.from_env({"PORTABLE_MLA_DETERMINISTIC": text}).deterministic is value


@pytest.mark.parametrize("text", ["yes", "2", "", "nope"])
def test_any_other_boolean_is_an_error_that_lists_the_spellings(text: str) -> None:
    with pytest.raises(ValueError, match="PORTABLE_MLA_DETERMINISTIC: expected one of 0, false, off, 1, true, on, got"):
        Settings.from_env({"PORTABLE_MLA_DETERMINISTIC": text})


def test_an_unknown_variable_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="PORTABLE_MLA_BACKENDS: unknown variable; allowed: PORTABLE_MLA_BACKEND,"):
        Settings.from_env({"PORTABLE_MLA_BACKENDS": "cpu"})


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="PORTABLE_MLA_BACKEND: expected one of .*cpu, reference, got 'fast'"):
        Settings.from_env({"PORTABLE_MLA_BACKEND": "fast"})


def test_the_prefill_workspace_is_megabytes_in_powers_of_two() -> None:
    assert Settings.from_env({"PORTABLE_MLA_PREFILL_WORKSPACE": "16"}).prefill_workspace == 16 << 20
    with pytest.raises(ValueError, match="PORTABLE_MLA_PREFILL_WORKSPACE: expected one of 16, 32, .* 8192, got '300'"):
        Settings.from_env({"PORTABLE_MLA_PREFILL_WORKSPACE": "300"})


def test_every_variable_sets_a_field_of_its_own() -> None:
    fields = [variable.field for variable in VARIABLES.values()]
    assert sorted(fields) == sorted(set(fields)) == sorted(vars(Settings()))


def test_the_environment_is_read_when_an_attention_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, capacity = MODELS["deepseek-v3"].shape(tensor_parallel=8), Capacity(1, 1, 1, 64, 1)
    monkeypatch.setenv("PORTABLE_MLA_BACKEND", "reference")
    attention = MLAAttention(shape, capacity, device="cpu")
    monkeypatch.delenv("PORTABLE_MLA_BACKEND")
    assert attention.backend == "reference"
    assert MLAAttention(shape, capacity, device="cpu").backend == "cpu"


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, capacity = MODELS["deepseek-v3"].shape(tensor_parallel=8), Capacity(1, 1, 1, 64, 1)
    monkeypatch.setenv("PORTABLE_MLA_BACKEND", "reference")
    assert MLAAttention(shape, capacity, device="cpu", backend="cpu").backend == "cpu"


def test_a_backend_forced_by_the_environment_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(Case((3,)))
    monkeypatch.setenv("PORTABLE_MLA_BACKEND", "triton")
    with pytest.raises(NoBackend, match="not registered for cpu"):
        mla_decode(
            problem.q, problem.kv_cache, problem.batch.block_table, problem.batch.kv_lens, softmax_scale=1.0,
            latent_dim=512,
        )  # fmt: skip


def test_the_environment_can_ask_for_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_MLA_DETERMINISTIC", "1")
    shape, capacity = MODELS["deepseek-v3"].shape(tensor_parallel=8), Capacity(1, 1, 1, 64, 1)
    assert MLAAttention(shape, capacity, device="cpu").request.deterministic


def test_variables_of_test_runs_are_none_of_the_librarys() -> None:
    assert Settings.from_env({"PORTABLE_MLA_TEST_REQUIRE": "sm90"}) == Settings()


def test_an_unknown_variable_of_test_runs_is_an_error_that_lists_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PORTABLE_MLA_TEST_REQUIRES", "sm90")
    with pytest.raises(
        ValueError, match="PORTABLE_MLA_TEST_REQUIRES: unknown variable; allowed: PORTABLE_MLA_TEST_REQ"
    ):
        asked(REQUIRE)


def test_a_wrong_value_for_a_test_run_lists_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_MLA_TEST_REQUIRE", "sm91")
    with pytest.raises(ValueError, match="PORTABLE_MLA_TEST_REQUIRE: expected one of cpu, sm80, .*, got 'sm91'"):
        asked(REQUIRE)
