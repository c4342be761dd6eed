"""AMD's kernels on an emulated GPU: a small case where the emulator is, and what the job says elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ci.emulated.code_object import pack_arguments
from ci.emulated.lanes import WAVE, Lanes
from ci.emulated.memory import M0, buffer_to_lds, global_to_lds
from ci.emulated.source import COMMIT, VARIABLE, NoEmulator, check_source
from ci.evidence import read_evidence, record_emulated

ROOT = Path(__file__).parent.parent
SMALL = "128+32, large logits"


def emulate(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The job, in a process of its own, since a process launches on one kind of GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "ci/emulate.py", "--arch", "gfx942", "--jobs", "1", *options]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


def _missing() -> str:
    try:
        check_source()
    except NoEmulator as reason:
        return str(reason)
    return ""


@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(_missing()), reason=_missing() or "the emulator is here")
def test_a_decode_on_an_emulated_gpu_is_within_the_acceptance_rule() -> None:
    done = emulate("--only", SMALL, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout)
    assert values["tinygrad"] == COMMIT
    assert [(one["name"], one["passed"]) for one in values["outcomes"]] == [(f"decode {SMALL}", True)]


@pytest.mark.parametrize(("source", "message"), [("", "is unset"), ("/nowhere", "is '/nowhere', which has no")])
def test_without_an_emulator_it_says_what_to_do(source: str, message: str) -> None:
    done = emulate(**{VARIABLE: source})
    assert done.returncode == 2
    assert message in done.stderr
    assert f"git -C tinygrad checkout {COMMIT}" in done.stderr


def test_a_name_that_no_check_has_is_refused_with_those_that_there_are() -> None:
    done = emulate("--only", "fp4")
    assert done.returncode == 2
    assert "--only: expected a part of one of decode 512+64, 16 heads, " in done.stderr


def test_the_workflow_checks_out_the_commit_that_is_documented() -> None:
    workflow = (ROOT / ".github/workflows/emulated.yml").read_text()
    assert re.findall(r"ref: (\w+)", workflow) == [COMMIT]


def test_arguments_are_aligned_to_their_sizes() -> None:
    tensor = torch.zeros(4)
    block = pack_arguments([("i32", 7), ("*fp32", tensor), ("fp32", 0.5), ("*i8", None)], null_pointers=1)
    expected = [7, tensor.data_ptr(), 0x3F000000, 0, 0]
    assert [int.from_bytes(block[at : at + 8], "little") for at in range(0, 40, 8)] == expected


def wave_over(source: torch.Tensor, step: int) -> Lanes:
    """Registers of a wave whose lanes read `source` in steps of bytes, by s[0:1] or the buffer s[0:3]; M0 is 64."""
    vectors, accumulators = (np.zeros((256, WAVE), np.uint32) for _ in range(2))
    lanes = Lanes(np.zeros(260, np.uint32), vectors, accumulators, np.zeros(4096, np.uint8))
    address = source.data_ptr()
    lanes.scalars[:3] = address & 0xFFFFFFFF, address >> 32, source.nbytes
    lanes.scalars[M0] = 64
    lanes.vectors[0] = np.arange(WAVE) * step
    return lanes


@pytest.mark.parametrize("size", [4, 16])
def test_a_load_into_lds_puts_lanes_side_by_side_and_zeros_for_what_is_behind_the_buffer(size: int) -> None:
    source = torch.arange(1, 1 + 16 * WAVE, dtype=torch.int32)
    lanes = wave_over(source, step=2 * size)
    lanes.scalars[2] = 40 * 2 * size + 8  # the buffer ends behind lane 40 less its offset of 8
    lanes.active[3] = False
    first, zero = SimpleNamespace(offset=0), SimpleNamespace(offset=128)
    buffer_to_lds(size)(SimpleNamespace(srsrc=first, vaddr=first, soffset=zero, offset=8, offen=1, idxen=0), lanes)
    found = lanes.lds[64 + 8 : 64 + 8 + size * WAVE].reshape(WAVE, size)
    data = source.numpy().view(np.uint8)
    for lane in range(WAVE):
        there = lane < 40 and lane != 3
        expected = data[8 + 2 * size * lane :][:size] if there else np.zeros(size, np.uint8)
        assert (found[lane] == expected).all(), f"lane {lane}"
    assert not lanes.lds[:72].any()


def test_a_load_into_lds_by_address_counts_its_offset_on_both_sides() -> None:
    source = torch.arange(4 * WAVE, dtype=torch.int32)
    lanes = wave_over(source, step=8)
    lanes.vectors[0] += 4
    scalar, vector = SimpleNamespace(offset=0), SimpleNamespace(offset=256)
    global_to_lds(4)(SimpleNamespace(saddr=scalar, addr=vector, offset=(1 << 13) - 4), lanes)
    assert lanes.lds[60 : 60 + 4 * WAVE].view(np.int32).tolist() == list(range(0, 2 * WAVE, 2))


def test_what_passed_is_noted_beside_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps({"silicon": {"sm90": "H100"}, "emulated": {"gfx942": {"3.6.0": 1}}}))
    record_emulated("3.9.0", ["gfx942", "gfx950"], 27, path)
    assert read_evidence(path) == {
        "silicon": {"sm90": "H100"},
        "emulated": {"gfx942": {"3.6.0": 1, "3.9.0": 27}, "gfx950": {"3.9.0": 27}},
    }
