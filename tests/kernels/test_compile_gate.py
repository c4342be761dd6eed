"""The compile gate: it flags what is wrong, its budgets cover every tile rule, and a kernel of each vendor compiles."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from ci.compile import gate
from ci.compile.cache_variants import fp8_requests
from ci.compile.cross_compile import Resources
from portable_mla.backends.triton.backend import GEOMETRIES, MAX_HEADS, MAX_QUERY_LEN, PREFILL_GEOMETRIES
from portable_mla.backends.triton.config import amd as amd_tiles
from portable_mla.backends.triton.config import nvidia as nvidia_tiles
from portable_mla.backends.triton.config.decode import TileRequest, choose_tile
from portable_mla.backends.triton.config.prefill import PrefillTileRequest
from portable_mla.core.arch import ARCHS

ROOT = Path(__file__).parents[2]
PAGE_SIZES = (1, 2, 16, 32, 48, 64, 128, 544)
NAME = "decode 512+64 64x64w8s2 descriptor"
BUDGET = Resources(registers=255, spills=16, loop_spills=0, shared=216 * 1024, matrix={"HGMMA": 76})
PREFILL_RULES = nvidia_tiles.PREFILL_RULES | amd_tiles.PREFILL_RULES
RECORDED = sorted(gate.read_budgets())
SPILL_IN_LOOP = {  # on Triton 3.6: the faster of two, or a way out that few calls take
    "sm80": {
        "decode 512+64 16x32w4s3 fp8_656 x2", "decode 512+64 64x32w8s3 fp8_e4m3", "decode 512+64 64x32w8s3 fp8_e4m3 x2",
    },
    "sm86": {
        "decode 512+64 32x32w4s2 fp8_e4m3", "decode 512+64 32x32w4s2 fp8_e4m3 x2",
        "prefill 64+64/128 128x64w8s2 pointer",
    },
    "sm89": {"prefill 64+64/128 128x64w8s2 pointer"},
    "sm90": {
        "decode 512+64 16x64w4s3 unaligned", "decode 512+64 32x64w8s3 unaligned", "decode 512+64 64x64w8s2 unaligned",
        "decode 512+64 64x64w8s2 gather x2", "gluon prefill 128+64 v 128 bfloat16 causal",
        "prefill 256+0/256 128x64w8s2 descriptor",
    },
    "sm100": {"decode 512+64 16x64w4s3 unaligned", "decode 512+64 32x64w8s3 unaligned"},
    "sm120": {
        "decode 512+0 16x32w4s3 descriptor", "decode 512+64 16x32w4s3 descriptor", "decode 512+64 16x32w4s3 fp16",
        "decode 512+64 16x32w4s3 descriptor x2", "decode 512+64 16x32w4s3 gather x2",
        "prefill 64+64/128 128x64w8s2 pointer",
    },
    "gfx950": {"prefill 64+32/64 128x64w4s1e2 pointer"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (replace(BUDGET, shared=ARCHS["sm90"].shared_memory + 1), "of shared memory"),
        (replace(BUDGET, matrix={}), "no matrix instruction"),
        (replace(BUDGET, spills=24), "spills 24, the budget is 16"),
        (replace(BUDGET, loop_spills=1), "in the loop"),
        (replace(BUDGET, registers=BUDGET.registers + gate.SLACK_REGISTERS + 1), "registers, the budget is"),
    ],
)
def test_the_gate_flags_each_fault_by_name(found: Resources, fault: str) -> None:
    wrong = gate.violations("sm90", {NAME: found}, {NAME: BUDGET})
    assert len(wrong) == 1
    assert wrong[0].startswith(f"sm90 {NAME}: ")
    assert fault in wrong[0]


def test_the_gate_flags_a_missing_budget() -> None:
    assert "no budget" in gate.violations("sm90", {NAME: BUDGET}, {"another": BUDGET})[0]
    assert "no budgets for Triton" in gate.violations("sm90", {NAME: BUDGET}, {})[0]


def test_the_gate_passes_what_is_within_its_budget() -> None:
    within = replace(BUDGET, registers=BUDGET.registers + gate.SLACK_REGISTERS, spills=0)
    assert (
        gate.violations("sm90", {NAME: within, "plan": replace(BUDGET, matrix={})}, {NAME: BUDGET, "plan": BUDGET})
        == []
    )


def test_recorded_budgets_read_back_as_they_were_and_other_versions_stay(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    gate.record({"sm90": {NAME: BUDGET}}, path)
    path.write_text(path.read_text().replace(f'"{gate.version()}"', '"0.1"'))
    gate.record({"sm90": {NAME: BUDGET}, "gfx942": {"plan": BUDGET}}, path)
    assert gate.read_budgets(path) == {
        "0.1": {"sm90": {NAME: BUDGET}},
        gate.version(): {"sm90": {NAME: BUDGET}, "gfx942": {"plan": BUDGET}},
    }


@pytest.mark.parametrize("arch", gate.RULES)
def test_every_request_has_a_rule_and_every_rule_a_request(arch: str) -> None:
    used = {gate.rule_of(arch, request) for request in fp8_requests(arch)}
    for rows, page_size, geometry in itertools.product(range(1, MAX_HEADS * MAX_QUERY_LEN + 1), PAGE_SIZES, GEOMETRIES):
        request = TileRequest(rows, *geometry, page_size)
        rule = gate.rule_of(arch, request)
        assert choose_tile(gate.RULES[arch], request) is rule.tile
        used.add(rule)
    assert used == set(gate.RULES[arch]), "a rule that no request follows is dead"


def test_every_architecture_with_a_gpu_has_rules() -> None:
    assert set(gate.RULES) == set(PREFILL_RULES) == set(ARCHS) - {"cpu"}


@pytest.mark.parametrize("arch", gate.RULES)
def test_every_prefill_geometry_has_a_rule_and_is_compiled_and_every_rule_has_a_geometry(arch: str) -> None:
    rules, names = PREFILL_RULES[arch], list(gate.variants(arch))
    used = set()
    for nope, rope, v_dim in PREFILL_GEOMETRIES:
        request = PrefillTileRequest(nope + rope, v_dim)
        rule = next(rule for rule in rules if rule.when(request))
        assert choose_tile(rules, request) is rule.tile
        used.add(rule)
        loads = {"pointer": ["pointer"], "descriptor": ["descriptor", "unaligned"]}[rule.tile.loads]
        of_one = [name for name in names if name.startswith(f"prefill {nope}+{rope}/{v_dim} ")]
        assert {name.split()[-1] for name in of_one} >= set(loads)
    assert used == set(rules), "a rule that no geometry follows is dead"


@pytest.mark.parametrize("arch", gate.RULES)
def test_the_gate_compiles_every_rule_geometry_and_dtype(arch: str) -> None:
    compiled = [*gate.rule_requests(arch), *fp8_requests(arch)]
    assert {gate.rule_of(arch, request) for request in compiled} == set(gate.RULES[arch])
    names = list(gate.variants(arch))
    for latent_dim, rope_dim in GEOMETRIES:
        assert any(name.startswith(f"decode {latent_dim}+{rope_dim} ") for name in names)
    for ending in (" fp16", " fp8_656", "write bf16", "spread", "rows", "grouped", "plan"):
        assert any(name.endswith(ending) for name in names)


@pytest.mark.parametrize("triton_version", RECORDED)
@pytest.mark.parametrize("arch", gate.RULES)
def test_every_variant_has_a_budget_and_fits(arch: str, triton_version: str) -> None:
    budgets = gate.read_budgets()[triton_version].get(arch, {})
    stale = "record the tiles' budgets anew: python -m ci.compile.gate --record"
    missing = {name for name in gate.variants(arch) if name not in budgets}
    assert not missing | set(budgets) - set(gate.variants(arch)), stale
    assert gate.violations(arch, budgets, budgets) == []


@pytest.mark.parametrize("triton_version", RECORDED)
@pytest.mark.parametrize("arch", gate.RULES)
def test_a_budget_of_any_variant_that_were_less_would_be_exceeded(arch: str, triton_version: str) -> None:
    budgets = gate.read_budgets()[triton_version][arch]
    for name, found in budgets.items():
        tight = [replace(found, registers=found.registers - gate.SLACK_REGISTERS - 1)]
        tight += [replace(found, spills=found.spills - 1)] if found.spills else []
        tight += [replace(found, loop_spills=found.loop_spills - 1)] if found.loop_spills else []
        for budget in tight:
            assert len(gate.violations(arch, {name: found}, {name: budget})) == 1


@pytest.mark.parametrize("arch", gate.RULES)
def test_recorded_budgets_are_within_the_architecture_and_spill_in_no_new_loop(arch: str) -> None:
    budgets = gate.read_budgets()["3.6"][arch]
    most = 512 if ARCHS[arch].vendor == "amd" else 255
    assert max(one.registers for one in budgets.values()) <= most
    assert {name for name, one in budgets.items() if one.loop_spills} == SPILL_IN_LOOP.get(arch, set())


def test_a_kernel_of_each_vendor_compiles_within_its_budget() -> None:
    if gate.version() not in RECORDED:
        pytest.skip(f"budgets are recorded for Triton {', '.join(RECORDED)}, this is {gate.version()}")
    command = [sys.executable, "-m", "ci.compile.gate", "--arch", "sm90", "gfx942", "--only", "fp16", "--jobs", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "4 kernels" in done.stdout  # a decode and a prefill of each
    assert "HGMMA" in done.stdout
    assert "_f16" in done.stdout
