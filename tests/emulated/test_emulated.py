"""AMD's kernels on an emulated GPU: a small case where the emulator is, and what the job says elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ci.emulate import float8
from ci.emulate.code_object import pack_arguments
from ci.emulate.halves import in_low_registers
from ci.emulate.instructions import repair_of
from ci.emulate.lanes import VECTOR, WAVE, Lanes
from ci.emulate.memory import M0, buffer_to_lds, global_to_lds, read_buffer, read_transposed, write_buffer, write_lds
from ci.emulate.source import COMMIT, VARIABLE, NoEmulator, check_source
from ci.evidence import read_evidence, record_emulated
from tests.emulated.checks import CHECKS, MUTANTS
from tests.emulated.run import run_check

ROOT = Path(__file__).parents[2]
SMALL = "128+32, large logits"


def emulate(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The job, in a process of its own, since a process launches on one kind of GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.emulated.run", "--arch", "gfx942", "--jobs", "1", *options]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_broken_kernel_changes_is_in_the_kernel_once(name: str) -> None:
    _, _, mutant, _ = MUTANTS[name]
    assert mutant.module.__file__ is not None
    assert Path(mutant.module.__file__).read_text().count(mutant.line) == 1


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


def of_buffer(data: int, offset: int) -> SimpleNamespace:
    """An access of the buffer s[0:3] at v0 and an offset; v[data] is loaded or stored."""
    first, zero = SimpleNamespace(offset=0), SimpleNamespace(offset=128)
    return SimpleNamespace(
        srsrc=first, vaddr=SimpleNamespace(offset=VECTOR), soffset=zero, offset=offset, offen=1, idxen=0,
        vdata=SimpleNamespace(offset=VECTOR + data),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("half", ["", "low", "high"])
def test_a_load_of_less_than_a_word_takes_its_bytes_and_zeros_behind_the_end(dtype: Any, half: str) -> None:
    source = torch.arange(4 * WAVE, dtype=torch.int32) * 0x01234567
    size = np.dtype(dtype).itemsize
    lanes = wave_over(source, step=size)
    lanes.scalars[2] = 40 * size + size  # lane 39's is the last: it is read from an offset of one value
    lanes.active[3] = False
    lanes.vectors[1] = 0xABCD1234
    read_buffer(dtype, half)(of_buffer(1, offset=size), lanes)
    values = source.numpy().view(dtype)[1 : WAVE + 1].astype(np.int64)
    for lane in range(WAVE):
        word = int(values[lane]) & 0xFFFFFFFF if lane < 40 else 0
        kept = {"": word, "low": 0xABCD0000 | word & 0xFFFF, "high": 0x1234 | (word & 0xFFFF) << 16}[half]
        assert int(lanes.vectors[1, lane]) == (0xABCD1234 if lane == 3 else kept), f"lane {lane}"


@pytest.mark.parametrize(("size", "shift"), [(1, 0), (2, 0), (1, 16), (2, 16)])
def test_a_store_of_less_than_a_word_leaves_the_bytes_beside_it(size: int, shift: int) -> None:
    target = torch.full((4 * WAVE,), 0x77, dtype=torch.uint8)
    lanes = wave_over(target, step=2 * size)
    lanes.scalars[2] = 40 * 2 * size
    lanes.active[3] = False
    lanes.vectors[1] = np.arange(WAVE) * 0x01030507 & 0xFFFFFFFF
    write_buffer(size, shift)(of_buffer(1, offset=size), lanes)
    expected = np.full(4 * WAVE, 0x77, np.uint8)
    for lane in set(range(40)) - {3}:
        word = int(lanes.vectors[1, lane]) >> shift & (1 << 8 * size) - 1
        expected[size + 2 * size * lane :][:size] = np.frombuffer(word.to_bytes(size, "little"), np.uint8)
    assert target.tolist() == expected.tolist()


def test_an_offset_into_lds_is_added_modulo_32_bits_as_compilers_fold_it_into_negative_bases() -> None:
    lanes = wave_over(torch.zeros(1), step=0)
    lanes.vectors[0] = (np.arange(WAVE) * 4 - 1024) & 0xFFFFFFFF
    lanes.vectors[1] = np.arange(1, WAVE + 1)
    first, data = SimpleNamespace(offset=VECTOR), SimpleNamespace(offset=VECTOR + 1)
    write_lds(4)(SimpleNamespace(addr=first, data0=data, offset0=0, offset1=8), lanes)
    assert np.flatnonzero(lanes.lds.view(np.uint32)).tolist() == list(range(256, 256 + WAVE))
    assert lanes.lds.view(np.uint32)[256 : 256 + WAVE].tolist() == list(range(1, WAVE + 1))


class VOP2(SimpleNamespace):
    """A decoded instruction of two operands, which is known by its form."""


def decoded_shift(source: int, shift: int, result: int) -> tuple[VOP2, bytes]:
    """v_ashrrev_i16 v[result], v[shift], v[source] and its bytes."""
    registers = {"src0": shift, "vsrc1": source, "vdst": result}
    operands = {name: SimpleNamespace(offset=VECTOR + register) for name, register in registers.items()}
    word = 44 << 25 | result << 17 | source << 9 | VECTOR + shift
    return VOP2(canonical_op_bits={"d": 16, "s0": 16, "s1": 16}, **operands), word.to_bytes(4, "little") + bytes(12)


@pytest.mark.parametrize("registers", [(1, 2, 3), (130, 2, 3), (130, 131, 132), (130, 130, 130), (0, 200, 1)])
def test_16_bits_in_any_register_are_worked_on_in_low_ones_and_the_upper_half_becomes_0(
    registers: tuple[int, int, int],
) -> None:
    source, shift, result = registers
    lanes = wave_over(torch.zeros(1), step=0)
    lanes.vectors[:] = np.random.default_rng(1).integers(0, 1 << 32, lanes.vectors.shape)
    lanes.active[3] = False
    before = lanes.vectors.copy()
    decoded, raw = decoded_shift(*registers)
    halves = in_low_registers(decoded, "V_ASHRREV_I16_E32", raw)
    assert halves is not None

    def operate() -> None:  # as the emulator does, of which no register above 127 may be asked
        word = int.from_bytes(halves.code.raw[:4], "little")
        places = [word >> 9 & 0xFF, word & 0xFF, word >> 17 & 0xFF]
        assert max(places) < 128
        values = lanes.vectors[places[0]].astype(np.uint16).view(np.int16) >> (lanes.vectors[places[1]] & 15)
        upper = lanes.vectors[places[2]] & np.uint32(0xFFFF0000)
        lanes.vectors[places[2]][lanes.active] = (upper | values.astype(np.uint16))[lanes.active]

    halves.run(operate, lanes)
    expected = before.copy()
    found = (before[source].astype(np.uint16).view(np.int16) >> (before[shift] & 15)).astype(np.uint16)
    expected[result][lanes.active] = found[lanes.active]
    np.testing.assert_array_equal(lanes.vectors, expected)


def test_an_instruction_on_32_bits_runs_as_it_is() -> None:
    decoded, raw = decoded_shift(130, 131, 132)
    decoded.canonical_op_bits = {"d": 32, "s0": 32, "s1": 32}
    assert in_low_registers(decoded, "V_ASHRREV_I32_E32", raw) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transposing_read_gives_each_lane_a_column_of_its_sixteens_rows(dtype: Any) -> None:
    each, rng = 8 // np.dtype(dtype).itemsize, np.random.default_rng(1)
    lanes = wave_over(torch.zeros(1), step=0)
    lanes.lds[:] = rng.integers(0, 256, lanes.lds.size)
    lanes.vectors[0] = rng.permutation(WAVE) * 32  # rows need not lie behind one another
    places = [SimpleNamespace(offset=VECTOR + index) for index in (0, 2)]
    read_transposed(dtype)(SimpleNamespace(addr=places[0], vdst=places[1], offset0=16, offset1=1), lanes)
    found = np.ascontiguousarray(lanes.vectors[2:4].T).view(dtype)  # [lane, value]
    for lane in range(WAVE):
        column, first = lane % 16, lane // 16 * 16
        for row in range(each):  # as many rows as a lane has values, each fetched by 16 / each lanes
            fetched = int(lanes.vectors[0, first + row * (16 // each) + column // each]) + 256 + 16
            assert found[lane, row] == lanes.lds[fetched:].view(dtype)[column % each], f"lane {lane}, row {row}"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e4m3fn])
def test_pairs_of_fp8_are_those_of_the_architecture(dtype: torch.dtype) -> None:
    lanes = wave_over(torch.zeros(1), step=0)
    lanes.fnuz = dtype is torch.float8_e4m3fnuz
    lanes.vectors[1] = np.arange(4 * WAVE, dtype=np.uint8).view(np.uint32)
    expected = torch.arange(4 * WAVE, dtype=torch.uint8).view(dtype).float().reshape(WAVE, 4)
    lanes.scalars[242] = np.float32(1.0).view(np.uint32)  # where operands find the constant
    source, target, one = (SimpleNamespace(offset=at) for at in (VECTOR + 1, VECTOR + 2, 242))

    def check(upper: bool, times: float = 1.0) -> None:
        found = torch.from_numpy(lanes.vectors[2:4].view(np.float32).T.copy())
        torch.testing.assert_close(found, expected[:, 2 * upper :][:, :2] * times, rtol=0, atol=0, equal_nan=True)

    float8.widen_pair(SimpleNamespace(src0=source, vdst=target), lanes)
    check(upper=False)
    for upper in (False, True):
        half = float8.WORD_1 if upper else float8.WORD_0
        float8.widen_selected_pair(SimpleNamespace(vsrc0=source, vdst=target, src0_sel=half, s0=0), lanes)
        check(upper)
        float8.widen_scaled_pair(SimpleNamespace(src0=source, src1=one, vdst=target, opsel=int(upper)), lanes)
        check(upper)
    lanes.scalars[242] = np.float32(0.375).view(np.uint32)  # of which the exponent counts: 2**-2
    float8.widen_scaled_pair(SimpleNamespace(src0=source, src1=one, vdst=target, opsel=0), lanes)
    check(upper=False, times=0.25)


def test_a_conversion_of_fp8_that_is_not_ours_is_refused() -> None:
    assert repair_of("VOP1_SDWA", "V_CVT_PK_F32_FP8_E32") is float8.widen_selected_pair
    with pytest.raises(NotImplementedError, match="float8.py has no VOP3 V_CVT_PK_FP8_F32"):
        repair_of("VOP3", "V_CVT_PK_FP8_F32")


def test_whatever_ends_a_check_is_its_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arch: str) -> None:
        raise RuntimeError("unknown variable")

    monkeypatch.setitem(CHECKS, "merge", fail)
    outcome = run_check("gfx942", "merge")
    assert (outcome.passed, outcome.detail) == (False, "RuntimeError: unknown variable")


def test_what_passed_is_noted_beside_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps({"silicon": {"sm90": "H100"}, "emulated": {"gfx942": {"3.6.0": 1}}}))
    record_emulated("3.9.0", ["gfx942", "gfx950"], 27, path)
    assert read_evidence(path) == {
        "silicon": {"sm90": "H100"},
        "emulated": {"gfx942": {"3.6.0": 1, "3.9.0": 27}, "gfx950": {"3.9.0": 27}},
    }
