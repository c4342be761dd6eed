"""Vendor libraries: every state in which one may be is a reason that explain and doctor give, and nothing is imported
before it is about to be chosen."""

from __future__ import annotations

import sys

import pytest

from portable_mla import CacheFormat, Phase, Settings, explain, select
from portable_mla.dispatch.registry import BACKENDS, ORDER
from tests.support import fake_libraries as fakes
from tests.support.invoking import invoke, invoke_json
from tests.support.library_machine import FP16, Machine, reasons, request, shape

pytestmark = pytest.mark.usefixtures("plain_environment")
EXITS = "raise SystemExit('rocminfo is missing')\n"


@pytest.mark.parametrize(
    ("arch", "backend", "missing"),
    [
        ("sm90", "flashmla", ("flash_mla: missing", "vllm/third_party/flashmla: missing")),
        ("sm90", "flash_attn3", ("flash_attn_interface: missing", "vllm/vllm_flash_attn: missing")),
        ("sm90", "flashinfer", ("flashinfer: missing",)),
    ],
)
def test_a_missing_library_is_a_reason(here: Machine, arch: str, backend: str, missing: tuple[str, ...]) -> None:
    assert reasons(arch, backend) == missing


def test_a_torch_for_another_runtime_is_a_reason_and_nothing_is_imported(here: Machine) -> None:
    here.install("flash_mla", EXITS, files=fakes.FLASH_MLA_FILES)
    here.runs("HIP 7.1")
    assert reasons("sm90", "flashmla")[0] == ("flash_mla: needs a torch built for CUDA, this one is built for HIP 7.1")
    assert "flash_mla" not in sys.modules


def test_pypis_unrelated_aiter_is_told_from_amds_and_not_imported(here: Machine) -> None:
    here.install("aiter", EXITS, distribution=("aiter", "0.13.20191203"))
    here.runs("HIP 7.1")
    (reason,) = reasons("gfx942", "aiter")
    assert reason.startswith("aiter: unrelated namesake 0.13.20191203 without mla.py and ops, at ")
    assert "aiter" not in sys.modules


def test_a_vllm_without_the_build_is_a_reason(here: Machine) -> None:
    here.install("vllm", EXITS, distribution=("vllm", "0.9.0"))
    assert reasons("sm90", "flashmla")[1] == ("vllm/third_party/flashmla: vllm 0.9.0 is a build without it")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import absent_dependency\n", "ModuleNotFoundError: No module named 'absent_dependency'"),
        ("raise OSError('flash.so: undefined symbol: _ZN3c10')\n", "OSError: flash.so: undefined symbol: _ZN3c10"),
        (EXITS, "SystemExit: rocminfo is missing"),
        ("raise RuntimeError('no driver')\n", "RuntimeError: no driver"),
    ],
)
def test_a_library_that_breaks_at_import_is_a_reason(here: Machine, source: str, why: str) -> None:
    here.install("flash_mla", source, files=fakes.FLASH_MLA_FILES)
    assert reasons("sm90", "flashmla") == (f"flash_mla: broken at import: {why}",)


@pytest.mark.parametrize(
    ("module", "source", "files", "backend", "why"),
    [
        (
            "flash_mla",
            "def get_mla_metadata(a): pass\n",
            fakes.FLASH_MLA_FILES,
            "flashmla",
            "has no flash_mla_with_kvc",
        ),
        (
            "flash_mla",
            "def get_mla_metadata(a): pass\ndef flash_mla_with_kvcache(q, k_cache): pass\n",
            fakes.FLASH_MLA_FILES,
            "flashmla",
            "flash_mla_with_kvcache has no parameter block_table, cache_seqlens, softmax_scale",
        ),
        (
            "flash_mla",
            fakes.UPSTREAM_WITHOUT_DENSE,
            fakes.FLASH_MLA_FILES,
            "flashmla",
            "too new: dense decode was removed",
        ),
        ("flash_attn_interface", "", (), "flash_attn3", "has no flash_attn_with_kvcache"),
        ("flashinfer.mla", "", fakes.FLASHINFER_FILES, "flashinfer", "has no BatchMLAPagedAttentionWrapper"),
    ],
)
def test_a_library_of_another_age_is_a_reason(
    here: Machine, module: str, source: str, files: tuple[str, ...], backend: str, why: str
) -> None:
    here.install(module, source, files=files)
    assert why in reasons("sm90", backend)[0]


def test_vllm_with_another_flash_attention_alone_is_a_reason(here: Machine) -> None:
    source = fakes.FLASH_ATTN_VLLM.replace("return None", "return 'FA3 is unavailable due to: no module'")
    here.install("vllm.vllm_flash_attn", source)
    assert reasons("sm90", "flash_attn3") == ("vllm/vllm_flash_attn: FA3 is unavailable due to: no module",)


def test_the_second_build_serves_where_the_first_is_broken(here: Machine) -> None:
    here.install("flash_mla", EXITS, files=fakes.FLASH_MLA_FILES)
    here.install("vllm.third_party.flashmla.flash_mla_interface", fakes.VLLM_FLASH_MLA)
    assert reasons("sm90", "flashmla") == ()


def test_a_library_that_comes_after_the_chosen_backend_is_not_imported(here: Machine) -> None:
    here.install("flash_mla", EXITS, files=fakes.FLASH_MLA_FILES)
    explanation = explain(request("sm90"))
    assert explanation.chosen == ORDER["sm90"][0]
    assert "flashmla: supported, comes after the chosen one" in str(explanation)
    assert "flash_mla" not in sys.modules


def test_a_broken_library_is_passed_over_and_said(here: Machine) -> None:
    here.install("flash_mla", EXITS, files=fakes.FLASH_MLA_FILES)
    here.install("flash_attn_interface", fakes.FLASH_ATTN_UPSTREAM)
    explanation = explain(request("sm90"), disabled=frozenset({"triton", "gluon"}))
    assert explanation.chosen == "flash_attn3"
    assert "flashmla: flash_mla: broken at import: SystemExit" in str(explanation)


def test_explain_names_aiters_reasons_for_an_architecture_that_is_not_here(here: Machine) -> None:
    text = invoke("explain", "--arch", "gfx942", "--query-len", "3", "--cache-format", "fp8_e4m3fnuz").stdout
    for reason in (
        "aiter: refused: aiter: missing",
        "aiter: needs a torch built for HIP, this one is built for CUDA 13.0",
        "needs a cache in bf16 (its others return no LSE), got fp8_e4m3fnuz",
    ):
        assert reason in text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shape": shape(rope_dim=0)}, "needs latent+rope of 512+64, got 512+0 (vllm#56314)"),
        ({"shape": shape(heads=129)}, "needs at most 128 heads, got 129"),
        ({"max_query_len": 3}, "needs 1 query token(s) a request with 16 heads, got 3 (ROCm/aiter#2720, #4711)"),
        ({"uniform_queries": False}, "needs uniform_queries, got ragged: one length picks the kernel"),
        ({"deterministic": True}, "needs deterministic off: where a context is split depends on the batch"),
        ({"phase": Phase.prefill}, "needs phase decode, got prefill"),
        ({"shape": shape(q_dtype=FP16, cache_format=CacheFormat.fp16)}, "needs a cache in bf16"),
    ],
)
def test_aiter_refuses_what_its_allow_list_leaves_out(here: Machine, changes: dict[str, object], why: str) -> None:
    assert any(reason.startswith(why) for reason in reasons("gfx942", "aiter", **changes))


@pytest.mark.parametrize(
    ("backend", "changes", "why"),
    [
        ("flashmla", {"shape": shape(page_size=16)}, "needs page_size 64, got 16"),
        ("flashmla", {"uniform_queries": False, "max_query_len": 2}, "needs uniform_queries"),
        ("flashmla", {"shape": shape(cache_format=CacheFormat.fp8_e4m3)}, "needs a bf16 or fp16 cache, got fp8_e4m3"),
        ("flash_attn3", {"shape": shape(latent_dim=256)}, "needs latent+rope of 512+64, got 256+64"),
        ("flash_attn3", {"deterministic": True}, "needs deterministic off"),
        ("flashinfer", {"shape": shape(cache_format=CacheFormat.fp8_656)}, "fa3: needs a bf16 or fp16 cache"),
        ("flashinfer", {"shape": shape(page_size=1), "max_query_len": 3}, "fa3: needs a page_size above 1 for several"),
    ],
)
def test_every_refusal_quotes_both_sides(here: Machine, backend: str, changes: dict[str, object], why: str) -> None:
    assert any(reason.startswith(why) for reason in reasons("sm90", backend, **changes))


@pytest.mark.parametrize(
    ("arch", "kernel"), [("sm80", "fa2"), ("sm90", "fa3"), ("sm100", "trtllm-gen"), ("sm120", "fa2")]
)
def test_flashinfers_kernel_follows_the_architecture(arch: str, kernel: str) -> None:
    from portable_mla.backends.nvidia.flashinfer.backend import kernel_of

    assert kernel_of(request(arch)) == kernel


def test_kernels_without_lse_never_serve() -> None:
    from portable_mla.backends.nvidia.flashinfer.backend import KERNELS

    heads = request("sm120", shape(heads=128))
    for name in ("xqa", "cutlass"):
        assert KERNELS[name].refusals(heads) == ("returns no LSE",)


def test_doctor_has_a_line_for_each_state(here: Machine) -> None:
    here.install("flash_mla", EXITS, files=fakes.FLASH_MLA_FILES)
    here.install("aiter", EXITS, distribution=("aiter", "0.13.20191203"))
    here.install("flash_attn_interface", fakes.FLASH_ATTN_UPSTREAM)
    states = invoke_json("doctor")["backends"]
    assert states["flashmla"] == "unavailable: flash_mla: broken at import: SystemExit: rocminfo is missing"
    assert states["flash_attn3"] == "available"
    assert states["flashinfer"] == "unavailable: flashinfer: missing"
    assert states["aiter"].startswith("unavailable: aiter: unrelated namesake 0.13.20191203")


def test_disabled_backends_are_no_candidates(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTABLE_MLA_DISABLE", "flashinfer, Triton")
    settings = Settings.from_env()
    assert settings.disable == {"flashinfer", "triton"}
    explanation = explain(request("sm90"), disabled=settings.disable)
    assert explanation.chosen == "gluon"
    assert "triton: disabled by PORTABLE_MLA_DISABLE" in str(explanation)
    assert invoke("explain", "--arch", "sm90").stdout.count("refused: disabled by PORTABLE_MLA_DISABLE") == 4, (
        "two backends, for decode and for prefill"
    )


def test_a_disabled_backend_does_not_serve_by_name_either() -> None:
    from portable_mla import NoBackend

    with pytest.raises(NoBackend, match="triton: disabled by PORTABLE_MLA_DISABLE"):
        select(request("sm90"), "triton", frozenset({"triton"}))


@pytest.mark.parametrize("text", ["flashinfr", "triton,,cpu", "", "triton;cpu"])
def test_an_unknown_name_to_disable_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="PORTABLE_MLA_DISABLE: expected a comma list of gluon, triton, flashmla,"):
        Settings.from_env({"PORTABLE_MLA_DISABLE": text})


def test_our_own_kernels_come_first() -> None:
    libraries = {"flashmla", "flash_attn3", "flashinfer", "aiter", "aiter_persistent"}
    for order in ORDER.values():
        own = [name not in libraries for name in order[:-1]]
        assert own == sorted(own, reverse=True)
    assert libraries <= set(BACKENDS)
