"""Adapters of vendor libraries, over stand-ins that keep the libraries' conventions: the contract holds, schedules
follow the lengths, and faults of a library are errors that name it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from portable_mla import BackendError, NoBackend, arch_named, select
from portable_mla.core.checks import span_bytes
from portable_mla.decode.arguments import DecodeArguments
from portable_mla.dispatch.interface import CallMemo, DecodeInputs, decode_runner
from portable_mla.metadata import DecodeBuffers, Limits, Status
from tests.support import acceptance
from tests.support import fake_libraries as fakes
from tests.support.cases import Case, Problem, build
from tests.support.library_machine import Machine
from tests.support.targets import Target

pytestmark = pytest.mark.usefixtures("plain_environment")

VLLM_FLASH_MLA = "vllm.third_party.flashmla.flash_mla_interface"
LIBRARIES: dict[str, tuple[str, str, str, str, tuple[str, ...]]] = {
    "flash_mla 1": ("sm90", "flashmla", "flash_mla", fakes.flash_mla_source("first"), fakes.FLASH_MLA_FILES),
    "flash_mla 2": ("sm90", "flashmla", "flash_mla", fakes.flash_mla_source("second"), fakes.FLASH_MLA_FILES),
    "flash_mla 3": ("sm90", "flashmla", "flash_mla", fakes.flash_mla_source("third"), fakes.FLASH_MLA_FILES),
    "sgl-flash-mla": ("sm90", "flashmla", "flash_mla", fakes.SGL_FLASH_MLA, fakes.FLASH_MLA_FILES),
    "vllm flashmla": ("sm90", "flashmla", VLLM_FLASH_MLA, fakes.VLLM_FLASH_MLA, ()),
    "flash_attn_interface": ("sm90", "flash_attn3", "flash_attn_interface", fakes.FLASH_ATTN_UPSTREAM, ()),
    "vllm flash_attn": ("sm90", "flash_attn3", "vllm.vllm_flash_attn", fakes.FLASH_ATTN_VLLM, ()),
    "flashinfer 0.6": ("sm90", "flashinfer", "flashinfer.mla", fakes.FLASHINFER_06, fakes.FLASHINFER_FILES),
    "flashinfer 0.7": ("sm120", "flashinfer", "flashinfer.mla", fakes.FLASHINFER_07, fakes.FLASHINFER_FILES),
    "flashinfer table": ("sm100", "flashinfer", "flashinfer.mla", fakes.FLASHINFER_07, fakes.FLASHINFER_FILES),
    "aiter": ("gfx942", "aiter", "aiter", "v0.1.20", fakes.AITER_FILES),
    "aiter persistent": ("gfx950", "aiter_persistent", "aiter", "v0.1.20", fakes.AITER_FILES),
}
CASES = [
    Case((130, 65, 1), heads=16, page_size=64),
    Case((0, 200, 0), heads=16, page_size=64, content="needle"),
    Case((64, 63, 129), heads=5, page_size=64, garbage="hot", content="split_skew"),
    Case((130, 3, 1), heads=16, page_size=64, max_query_len=2),
    Case((130, 65, 9, 0), heads=16, page_size=16, query_lens=(1, 3, 2, 0), max_query_len=3, padding=2),
    Case((70, 65), heads=16, page_size=32, dtype="fp16"),
    Case((130, 65, 0, 200), heads=40, page_size=64, max_query_len=2, content="fingerprint"),
]


def put(here: Machine, library: str) -> tuple[str, str]:
    """Install a library; its architecture and its backend."""
    arch, backend, module, source, files = LIBRARIES[library]
    if module == "aiter":
        here.runs("HIP 7.1")
        fakes.install_aiter(here.folder, source)
    else:
        here.install(module, source, files=files)
    return arch, backend


class Bound:
    """A runner of a library over the problem's capacity, on the CPU."""

    def __init__(self, arch: str, backend: str, problem: Problem) -> None:
        arguments = DecodeArguments(
            problem.q, problem.kv_cache, problem.batch, problem.latent_dim, problem.softmax_scale
        )
        self.request = replace(arguments.request(deterministic=False), arch=arch_named(arch))
        chosen = select(self.request, backend)
        self.runner = decode_runner(chosen, self.request)
        self.status = Status.allocate(problem.q.device)
        shape, capacity = self.request.shape, self.request.capacity
        self.buffers = DecodeBuffers(capacity, shape.page_size, chosen.needs(self.request), self.status)

    def step(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan and run, into results full of NaN."""
        self.runner.plan(self.buffers.update(problem.batch, self.request.capacity.max_pages))
        return self.run(problem)

    def run(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """Run into results full of NaN, twice: the second call knows what the first has worked out."""
        inputs = problem.inputs._replace(memo=CallMemo())
        first, second = [
            (
                torch.full_like(problem.q[..., : problem.latent_dim], torch.nan),
                torch.full(problem.q.shape[:2], torch.nan),
            )
            for _ in range(2)
        ]
        for out, lse in (first, second):
            self.runner.run(inputs, out, lse, softmax_scale=problem.softmax_scale)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9))
        return second


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_library_serves_by_our_contract_or_refuses(here: Machine, library: str, case: Case) -> None:
    arch, backend = put(here, library)
    problem = build(case)
    try:
        bound = Bound(arch, backend, problem)
    except NoBackend as refusal:
        pytest.skip(str(refusal))
    acceptance.check(problem, *bound.step(problem))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_serves_something(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    bound = Bound(arch, backend, problem)
    assert bound.runner.graph_safe is (library not in ("flashinfer 0.6", "flashinfer 0.7", "aiter persistent"))
    bound.step(problem)
    assert sum(bound.runner.memory().values()) > 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_schedules_follow_the_lengths_and_layers_share_them(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    cases = [
        Case(lens, heads=16, page_size=64, seed=seed)
        for seed, lens in enumerate([(300, 7, 64), (1, 299, 65), (0, 300, 2)])
    ]
    problems = [build(case) for case in cases]
    pages = max(problem.kv_cache.shape[0] for problem in problems)
    bound = Bound(arch, backend, max(problems, key=lambda problem: problem.kv_cache.shape[0]))
    assert bound.request.capacity.max_pages == pages
    for problem in (*problems, problems[0]):
        acceptance.check(problem, *bound.step(problem))
        acceptance.check(problem, *bound.run(problem))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_smaller_batch_leaves_nothing_of_the_one_before(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    bound = Bound(arch, backend, problem)
    bound.step(problem)
    fewer = problem.first(1)
    acceptance.check(fewer, *bound.step(fewer))


@pytest.mark.parametrize("library", LIBRARIES)
def test_results_may_have_any_outer_strides(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    bound = Bound(arch, backend, problem)
    dense = bound.step(problem)
    tokens, heads = problem.q.shape[:2]
    out = torch.full((heads + 1, tokens, problem.latent_dim), torch.nan, dtype=problem.q.dtype).transpose(0, 1)[:, 1:]
    lse = torch.full((heads, tokens), torch.nan).T
    bound.runner.run(problem.inputs, out, lse, softmax_scale=problem.softmax_scale)
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense[1])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("page", [-1, 2**31 - 1, 10_000])
def test_a_page_that_is_not_there_makes_its_rows_nan_and_no_other(here: Machine, library: str, page: int) -> None:
    arch, backend = put(here, library)
    # Finite in every slot, so that nothing but the adapter makes NaN of a page read in its stead.
    problem = build(replace(CASES[0], garbage="zero"))
    table = problem.batch.block_table.clone()
    table[1, 0] = page
    bad, bound = problem.with_table(table), Bound(arch, backend, problem)
    out, lse = bound.step(bad)
    assert bool(out[1].isnan().all()) and bool(lse[1].isnan().all())
    good = problem.only(0)
    acceptance.check(good, out[:1], lse[:1])
    with pytest.raises(IndexError, match=f"request 1: expected a page in .* got {page}"):
        bound.status.check(Limits(bound.request.capacity.max_pages, 10**6, 1, 3))


@pytest.mark.parametrize("library", ["sgl-flash-mla", "vllm flashmla", "flash_attn_interface", "vllm flash_attn"])
def test_what_a_call_is_remembered_by_holds_no_tensor_of_it(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    bound = Bound(arch, backend, problem)
    bound.step(problem)
    inputs = DecodeInputs(problem.q.clone(), problem.kv_cache.clone(), CallMemo())
    out, lse = bound.run(problem)
    bound.runner.run(inputs, out, lse, softmax_scale=problem.softmax_scale)
    memo, kept = inputs.memo, [weakref.ref(tensor) for tensor in (inputs.q, inputs.kv_cache, out, lse)]
    assert memo is not None and memo.layout is not None
    del inputs, out, lse
    assert [tensor() for tensor in kept] == [None] * 4


def test_queries_that_q_does_not_have_never_reach_the_library(here: Machine) -> None:
    arch, backend = put(here, "vllm flash_attn")
    problem = build(Case((130, 65, 9), heads=4, page_size=16, query_lens=(1, 3, 2), max_query_len=3))
    bound = Bound(arch, backend, problem)
    out, lse = bound.step(problem)
    few = problem.with_q(problem.q[:4])
    less, less_lse = bound.step(few)
    assert torch.equal(less, out[:4]) and torch.equal(less_lse, lse[:4])
    shorter = bound.step(problem.with_q(problem.q[:3]))
    assert bool(shorter[0][1:].isnan().all())
    with pytest.raises(IndexError, match="request 1: its query tokens end at 4"):
        bound.status.check(Limits(bound.request.capacity.max_pages, 10**6, 3, 6))


FAULTS: list[tuple[str, Callable[[str], str], str]] = [
    (
        "flash_mla 3",
        lambda s: s.replace("return fakes.flash_mla(", "return ("),
        "returned Tensor|returned out of shape",
    ),
    (
        "flash_mla 3",
        lambda s: s.replace("assert is_fp8_kvcache is False", "raise RuntimeError('CUDA error: 700')"),
        "700",
    ),
    ("flash_mla 3", lambda s: s.replace("fakes.Schedule(), None", "None"), "NoneType for its schedule"),
    ("vllm flash_attn", lambda s: s.replace("assert fa_version == 3", "return q, None"), "returned out of shape"),
    ("vllm flash_attn", lambda s: s.replace("assert fa_version == 3", "return out, None"), "NoneType for lse"),
    (
        "vllm flash_attn",
        lambda s: s.replace("assert batch_size", "raise ValueError('no sm90')\n    assert batch_size"),
        "no sm90",
    ),
    (
        "flashinfer 0.6",
        lambda s: s.replace("return out, lse", "return out.clone(), lse"),
        "another tensor than the out",
    ),
    (
        "flashinfer 0.6",
        lambda s: s.replace("self.plan_csr", "raise OSError('nvcc not found')\n        self.plan_csr"),
        "nvcc",
    ),
]


@pytest.mark.parametrize(("library", "broken", "match"), FAULTS, ids=range(len(FAULTS)))
def test_a_fault_of_the_library_is_an_error_that_names_it(
    here: Machine, library: str, broken: Callable[[str], str], match: str
) -> None:
    arch, backend, module, source, files = LIBRARIES[library]
    here.install(module, broken(source), files=files)
    assert broken(source) != source
    problem = build(CASES[0])
    bound = Bound(arch, backend, problem)
    with pytest.raises(BackendError, match=match) as caught:
        bound.step(problem)
    assert module.split(".")[0] in str(caught.value)


def test_what_a_library_raises_is_the_cause(here: Machine) -> None:
    source = fakes.flash_mla_source(checks="raise RuntimeError('illegal memory access')")
    here.install("flash_mla", source, files=fakes.FLASH_MLA_FILES)
    problem = build(CASES[0])
    bound = Bound("sm90", "flashmla", problem)
    with pytest.raises(
        BackendError, match="flash_mla_with_kvcache raised RuntimeError: illegal memory access"
    ) as caught:
        bound.step(problem)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("library", ["flash_mla 3", "vllm flash_attn", "flashinfer 0.6"])
def test_a_cache_at_odd_strides_is_refused_before_the_library_is_called(here: Machine, library: str) -> None:
    arch, backend = put(here, library)
    problem = build(CASES[0])
    pages, page_size, width = problem.kv_cache.shape
    flat = torch.zeros(pages * page_size * (width + 1), dtype=problem.q.dtype)
    odd = flat.as_strided((pages, page_size, width), (page_size * (width + 1), width + 1, 1))
    bound = Bound(arch, backend, problem)
    with pytest.raises(NoBackend, match="needs a kv_cache whose address and strides are multiples of 16 bytes"):
        bound.step(problem.with_cache(odd))


def test_flashinfer_refuses_rows_that_its_offsets_do_not_reach(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    from portable_mla.backends.nvidia.flashinfer import runner as flashinfer_runner

    arch, backend = put(here, "flashinfer 0.6")
    problem = build(CASES[0])
    q_end, cache_end = problem.q.numel(), problem.kv_cache.numel()
    assert span_bytes(problem.q) == 2 * q_end < 2 * cache_end == span_bytes(problem.kv_cache)
    bound = Bound(arch, backend, problem)
    monkeypatch.setattr(flashinfer_runner, "MOST_OFFSET", cache_end)
    looked: list[int] = []

    def noted(tensor: torch.Tensor) -> int:
        looked.append(span_bytes(tensor))
        return looked[-1]

    monkeypatch.setattr(flashinfer_runner, "span_bytes", noted)
    acceptance.check(problem, *bound.step(problem))
    assert len(looked) == 3, "a call that is like one before is not looked at again"
    monkeypatch.setattr(flashinfer_runner, "MOST_OFFSET", q_end)
    with pytest.raises(NoBackend, match=f"needs all of kv_cache within {q_end} elements of its first"):
        bound.step(problem)


@pytest.mark.parametrize("release", fakes.RELEASES)
def test_every_release_of_aiter_serves_or_says_why_not(here: Machine, release: str) -> None:
    here.runs("HIP 7.1")
    fakes.install_aiter(here.folder, release)
    problem = build(CASES[0])
    old = int(release.split(".")[-1]) < 9
    if old:
        with pytest.raises(NoBackend, match=r"mla_decode_fwd has no parameter .*return_lse"):
            Bound("gfx942", "aiter", problem)
        return
    acceptance.check(problem, *Bound("gfx942", "aiter", problem).step(problem))
    acceptance.check(problem, *Bound("gfx950", "aiter_persistent", problem).step(problem))


def test_the_persistent_kernels_get_work_for_the_query_length_they_are_called_with(here: Machine) -> None:
    here.runs("HIP 7.1")
    fakes.install_aiter(here.folder, "v0.1.20")
    problem = build(Case((130, 65), heads=20, page_size=64, max_query_len=3))
    acceptance.check(problem, *Bound("gfx950", "aiter_persistent", problem).step(problem))


def test_an_aiter_whose_second_stage_writes_no_lse_is_refused(here: Machine) -> None:
    here.runs("HIP 7.1")
    fakes.install_aiter(here.folder, "v0.1.12", writes_lse=False)
    with pytest.raises(NoBackend, match="aiter: too old: its second stage writes no LSE"):
        Bound("gfx942", "aiter", build(CASES[0]))


def test_a_cache_of_4_gib_is_refused() -> None:
    from portable_mla.backends.amd.aiter.backend import BACKEND
    from tests.support.library_machine import request

    asked = request("gfx942")
    big = replace(asked, capacity=replace(asked.capacity, cache_bytes=2**32))
    assert BACKEND.reasons_unsupported(big) == (f"needs a cache below {2**32} bytes, got {2**32} (ROCm/aiter#4452)",)


def test_targets_know_which_backends_are_libraries() -> None:
    assert not Target("cpu", "cpu").of_a_library
