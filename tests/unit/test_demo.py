"""portable-mla demo: a trace replayed, checked and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from portable_mla.backends.cpu import CpuRunner
from portable_mla.dispatch.interface import DecodeInputs
from tests.support.invoking import invoke, invoke_json

pytestmark = pytest.mark.usefixtures("plain_environment")


HEADER = "arrival_ms,input_tokens,output_tokens\n"
TINY = HEADER + "0,100,3\n5,7,2\n9,300,4\n12,1,1\n"
SMALL_DEMO = ("--device", "cpu", "--layers", "2", "--concurrency", "2")


@pytest.fixture
def tiny_trace(tmp_path: Path) -> str:
    path = tmp_path / "tiny.csv"
    path.write_text(TINY)
    return str(path)


def test_the_demo_replays_a_trace_to_its_end_and_passes(tiny_trace: str) -> None:
    values = invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO)
    assert (values["passed"], values["pages_returned"], values["backend"]) == (True, True, "cpu")
    assert (values["requests_finished"], values["requests_unfinished"], values["requests_waiting"]) == (4, 0, 0)
    assert (values["tokens"], values["prompt_tokens"]) == (3 + 2 + 4 + 1, 100 + 7 + 300 + 1)


def test_the_demo_stops_at_the_step_limit_and_returns_all_pages(tiny_trace: str) -> None:
    values = invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO, "--steps", "2")
    assert (values["steps"], values["requests_unfinished"], values["pages_returned"]) == (2, 1, True)


def test_the_demo_checks_the_first_and_the_last_step(tiny_trace: str) -> None:
    assert invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO, "--steps", "1")["checks"] == 1
    assert invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO, "--steps", "1000")["checks"] == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_demo_passes_in_every_dtype(dtype: str, tiny_trace: str) -> None:
    result = invoke("demo", "--trace", tiny_trace, *SMALL_DEMO, "--dtype", dtype)
    assert result.exit_code == 0
    assert "result: passed" in result.stdout


def test_the_demo_survives_a_pool_that_is_too_small_for_its_requests(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "0,60,8\n1,60,8\n2,60,8\n")
    options = ("--pages", "3", "--layers", "1", "--device", "cpu", "--concurrency", "3")
    values = invoke_json("demo", "--trace", str(path), *options)
    assert values["preemptions"] > 0
    assert (values["requests_finished"], values["passed"]) == (3, True)


def test_the_demo_runs_the_shipped_trace_by_itself() -> None:
    values = invoke_json("demo", "--device", "cpu", "--steps", "3")
    assert (values["trace_requests"], values["passed"], values["heads"]) == (400, True, 16)


def test_two_demos_with_one_seed_give_the_same_errors(tiny_trace: str) -> None:
    first, second = (invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO, "--seed", "3") for _ in range(2))
    assert first["worst_row_rms"] == second["worst_row_rms"]


def _corrupt(monkeypatch: pytest.MonkeyPatch, *, out_factor: float, lse_shift: float) -> None:
    right = CpuRunner.run

    def wrong(self: CpuRunner, inputs: DecodeInputs, out: Tensor, lse: Tensor, **options: Any) -> None:
        right(self, inputs, out, lse, **options)
        out.mul_(out_factor)
        lse.add_(lse_shift)

    monkeypatch.setattr(CpuRunner, "run", wrong)


@pytest.mark.parametrize(("out_factor", "lse_shift"), [(1.01, 0.0), (1.0, 1e-3), (float("nan"), 0.0)])
def test_the_demo_exits_1_on_a_wrong_result(
    out_factor: float, lse_shift: float, tiny_trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _corrupt(monkeypatch, out_factor=out_factor, lse_shift=lse_shift)
    result = invoke("demo", "--trace", tiny_trace, *SMALL_DEMO)
    assert result.exit_code == 1
    assert "mismatch with the reference: step 0, layer " in result.stderr
    assert "result: FAILED" in result.stdout


def test_a_wrong_result_is_still_one_json_object(tiny_trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _corrupt(monkeypatch, out_factor=float("nan"), lse_shift=0.0)
    values = invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO)
    assert (values["passed"], values["worst_row_rms"]) == (False, None)


@pytest.mark.parametrize("option", ["--steps", "--concurrency", "--layers", "--tp", "--page-size", "--pages"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_zero_and_negative_options_are_refused_by_name(option: str, value: str) -> None:
    result = invoke("demo", option, value)
    assert result.exit_code == 2
    assert f"'{option}': expected at least 1, got {value}" in result.stderr


def test_a_negative_seed_is_refused() -> None:
    assert "'--seed': expected at least 0, got -1" in invoke("demo", "--seed", "-1").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--pages", "2"), "pages: request 2 of the trace grows to 304 tokens; expected at least 5 pages of 64, got 2"),
        (("--pages", "100000000000"), "GB; ask for fewer --pages or --layers"),
        (("--device", "abacus"), "device: expected one of "),
        (("--model", "gpt-5"), "model: expected one of deepseek-v2-lite"),
        (
            ("--model", "mistral-small-4"),
            "softmax_scale: YaRN's factor in the scale of Mistral Small 4 is not confirmed",
        ),
        (("--backend", "best"), "cpu, reference, got"),
    ],
)
def test_the_demo_refuses_wrong_options_with_what_is_allowed(
    options: tuple[str, ...], message: str, tiny_trace: str
) -> None:
    device = () if "--device" in options else ("--device", "cpu")
    result = invoke("demo", "--trace", tiny_trace, *device, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_demo_of_a_model_whose_heads_8_does_not_divide_takes_fewer_ranks(tiny_trace: str) -> None:
    values = invoke_json("demo", "--trace", tiny_trace, *SMALL_DEMO, "--model", "glm-4.7-flash")
    assert (values["passed"], values["heads"]) == (True, 4)


def test_the_demo_refuses_a_sparse_model_and_replays_it_densely_when_asked(tiny_trace: str) -> None:
    options = ("demo", "--trace", tiny_trace, *SMALL_DEMO, "--model", "glm-5")
    refused = invoke(*options)
    assert refused.exit_code == 1
    assert "GLM-5 / GLM-5.1 has sparse attention (the top 2048 keys of a query token)" in refused.stderr
    dense = invoke_json(*options, "--dense")
    assert (dense["passed"], dense["heads"]) == (True, 8)
    assert "dense attention equals it up to 2048 tokens" in dense["note"]


def test_the_demo_exits_2_on_a_malformed_trace(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(HEADER + "0,many,2\n")
    result = invoke("demo", "--trace", str(path))
    assert result.exit_code == 2
    assert f"error: {path}: line 2: column input_tokens: expected an integer from 1 to" in result.stderr


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = invoke("demo", "--trace", str(tmp_path / "none.csv"))
    assert result.exit_code == 2
    assert "none.csv" in result.stderr
