"""portable-mla explain: any architecture from any machine."""

from __future__ import annotations

import json

import pytest

from portable_mla.core.shape import Phase
from portable_mla.dispatch.registry import ORDER
from portable_mla.models import MODELS
from tests.support.invoking import invoke, invoke_json

pytestmark = pytest.mark.usefixtures("plain_environment")

SPARSE = [name for name, model in MODELS.items() if model.sparse_top_k is not None]
DENSE = [name for name in MODELS if name not in SPARSE]


@pytest.mark.parametrize("arch", ["sm90", "sm120", "gfx942", "gfx950"])
def test_explain_lists_every_candidate_of_an_architecture_in_order(arch: str) -> None:
    values = invoke_json("explain", "--arch", arch)
    assert tuple(candidate["backend"] for candidate in values["candidates"]) == ORDER[arch]
    assert values["chosen"] in ORDER[arch]
    assert values["request"].startswith(f"decode on {arch}: 16 heads, latent 512 + rope 64")
    assert tuple(candidate["backend"] for candidate in values["prefill"]["candidates"]) == ORDER[arch]
    assert values["prefill"]["chosen"] not in (None, "reference")
    assert values["prefill"]["request"].startswith(
        f"prefill on {arch}: 16 heads, nope 128 + rope 64, v 128, q bfloat16"
    )


@pytest.mark.parametrize("arch", ["sm90", "sm120", "gfx942", "gfx950"])
def test_explain_reads_well_when_piped(arch: str) -> None:
    result = invoke("explain", "--arch", arch)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    lines = [line for line in lines if line]
    prefill = next(index for index, line in enumerate(lines) if line.startswith("prefill"))
    for phase, part in ((Phase.decode, lines[:prefill]), (Phase.prefill, lines[prefill:])):
        assert part[0].startswith(f"{phase.value} on {arch}: ")
        assert [line.split(":")[0].strip() for line in part[1:]] == list(ORDER[arch])
        assert sum(line.endswith(": chosen") for line in part) == 1


def test_explain_passes_every_option_into_the_request() -> None:
    options = "--arch cpu --model minicpm3-4b --tp 4 --page-size 16 --query-len 3 --ragged --dtype fp16 --batch 9"
    text = invoke_json("explain", *options.split(), "--context", "77", "--deterministic")["request"]
    assert text == (
        "decode on cpu: 10 heads, latent 256 + rope 32, page_size 16, q float16, cache fp16, query_len <= 3 (ragged), "
        "deterministic, batch <= 9, context <= 77"
    )


def test_explain_takes_the_heads_of_a_rank_in_place_of_the_models() -> None:
    assert "decode on cpu: 5 heads" in invoke("explain", "--arch", "cpu", "--heads", "5").stdout


def test_explain_asks_for_a_quantised_cache() -> None:
    result = invoke("explain", "--arch", "sm90", "--cache-format", "fp8_656")
    assert "gluon: refused: needs a bf16 or fp16 cache, got fp8_656" in result.stdout


@pytest.mark.parametrize("arch", ["gfx1200", "sm75", "mps", "sm999", "riscv"])
def test_a_refused_architecture_exits_1_with_the_reason_and_what_is_supported(arch: str) -> None:
    result = invoke("explain", "--arch", arch)
    assert result.exit_code == 1
    assert f"UnsupportedDevice: '{arch}' is not supported: " in result.stderr
    assert "Supported: cpu, " in result.stderr


def test_a_refusal_in_json_mode_is_a_json_object() -> None:
    result = invoke("explain", "--arch", "gfx1200", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["kind"] == "UnsupportedDevice"


@pytest.mark.parametrize("model", DENSE)
def test_explain_answers_for_every_dense_model_without_being_told_the_ranks(model: str) -> None:
    values = invoke_json("explain", "--arch", "sm90", "--model", model)
    assert values["chosen"] not in (None, "reference")
    assert values["prefill"]["chosen"] not in (None, "reference")
    assert values["note"] is None


@pytest.mark.parametrize(
    ("model", "heads"), [("glm-4.7-flash", 4), ("kimi-k3", 12), ("deepseek-v3", 16), ("minicpm3-4b", 5)]
)
def test_the_default_ranks_are_the_most_up_to_8_that_divide_the_heads(model: str, heads: int) -> None:
    assert f"decode on cpu: {heads} heads" in invoke("explain", "--arch", "cpu", "--model", model).stdout


@pytest.mark.parametrize("options", [(), ("--heads", "16"), ("--estimate",)])
@pytest.mark.parametrize("model", SPARSE)
def test_a_sparse_model_is_refused_with_what_is_not_served(model: str, options: tuple[str, ...]) -> None:
    result = invoke("explain", "--arch", "sm90", "--model", model, *options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"NoBackend: {MODELS[model].why_not_served}. --dense asks for dense attention" in result.stderr
    assert invoke_json("explain", "--arch", "sm90", "--model", model, *options)["kind"] == "NoBackend"


@pytest.mark.parametrize("model", SPARSE)
def test_dense_attention_of_a_sparse_model_is_answered_under_a_note(model: str) -> None:
    result = invoke("explain", "--arch", "sm90", "--model", model, "--dense")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Dense attention of a sparse model\n  note: {MODELS[model].title} has sparse ")
    values = invoke_json("explain", "--arch", "sm90", "--model", model, "--dense")
    assert values["note"] == MODELS[model].why_not_served
    assert values["chosen"] not in (None, "reference")


def test_dense_changes_nothing_for_a_dense_model() -> None:
    assert invoke("explain", "--arch", "sm90", "--dense").stdout == invoke("explain", "--arch", "sm90").stdout


def test_a_backend_that_cannot_serve_exits_1_with_its_reason() -> None:
    result = invoke("explain", "--arch", "sm90", "--backend", "cpu")
    assert result.exit_code == 1
    assert "cpu: refused: not registered for sm90, whose backends are" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "gpt-5"), "model: expected one of deepseek-v2-lite, deepseek-v3"),
        (("--tp", "7"), "expected one of 1, 2, 4, 8, 16, 32, 64, 128, got 7"),
        (("--tp", "2", "--heads", "4"), "expected --heads or --tp, not both, got 4 and 2"),
        (("--dtype", "int8"), "dtype: expected one of bf16, fp16, fp32, got 'int8'"),
        (("--cache-format", "nf4"), "cache_format: expected one of bf16, fp16, fp32, fp8_e4m3, fp8_e4m3fnuz, fp8_656"),
        (("--cache-format", "fp16"), "kv_cache: expected torch.bfloat16 like q"),
        (("--arch", "gfx942", "--cache-format", "fp8_e4m3"), "gfx942 reads torch.float8_e4m3fnuz"),
        (("--backend", "best"), "cpu, reference, got"),
    ],
)
def test_a_wrong_word_exits_2_and_lists_what_is_allowed(options: tuple[str, ...], message: str) -> None:
    result = invoke("explain", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_invalid_environment_is_a_message_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_MLA_BACKEND", "best")
    result = invoke("explain", "--arch", "cpu")
    assert result.exit_code == 2
    assert "error: PORTABLE_MLA_BACKEND: expected one of " in result.stderr
