"""Run the AMD kernels, compiled for an architecture, on an emulated GPU, and hold the results to the reference.

TINYGRAD_SRC=PATH python -m tests.emulated.run [--arch gfx942 gfx950] [--only TEXT] [--jobs 2] [--json] [--record]

Each kernel is launched by the library itself, with the tiles, constants and arguments of a real GPU; kernels broken in
one line must be noticed. Exits with 1 when a result is wrong or a broken kernel passes, with 2 without an emulator.
--record notes in ci/evidence.json what passed with this Triton version.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import triton

from ci.emulate.driver import install
from ci.emulate.source import COMMIT, NoEmulator, check_source
from ci.evidence import record_emulated
from portable_mla.core.arch import ARCHS
from tests.emulated.checks import CHECKS, MUTANTS, caught

EMULATED = ("gfx942", "gfx950")
BROKEN = "broken: "


@dataclass(frozen=True)
class Outcome:
    """One check on one architecture. detail: the errors, or what is wrong."""

    arch: str
    name: str
    passed: bool
    detail: str
    seconds: float


def names(only: str) -> list[str]:
    """The checks with `only` in their names, broken kernels last."""
    return [name for name in (*CHECKS, *(BROKEN + mutant for mutant in MUTANTS)) if only in name]


def prepare(arch: str, cache: str) -> None:
    """Of each process: one architecture, one thread."""
    os.environ["TRITON_CACHE_DIR"] = cache  # a kernel found in a cache would prove nothing
    install(ARCHS[arch])


def run_check(arch: str, name: str) -> Outcome:
    """In a prepared process."""
    start = time.perf_counter()
    try:
        passed, detail = True, _detail(arch, name)
    except Exception as error:  # noqa: BLE001 (whatever ends a check is its outcome, and others go on)
        passed, detail = False, _said(error)
    return Outcome(arch, name, passed, detail, round(time.perf_counter() - start, 1))


def _said(error: Exception) -> str:
    """An error in one line, or as its traceback ends where it has no message."""
    if not str(error):
        return traceback.format_exc(limit=-1)
    first = str(error).splitlines()[0]
    return first if isinstance(error, AssertionError | NotImplementedError) else f"{type(error).__name__}: {first}"


def _detail(arch: str, name: str) -> str:
    if name.startswith(BROKEN):
        return f"noticed: {caught(name.removeprefix(BROKEN), arch)}"
    errors = CHECKS[name](arch)
    if errors is None:
        return "as defined"
    return f"row RMS {errors.row_rms:.1e}, mean ratio {errors.mean_ratio:.2f}, LSE {errors.lse:.3f} of its bound"


def run_all(archs: Sequence[str], only: str, jobs: int) -> list[Outcome]:
    """Every check on every architecture; says what it does as it goes."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="emulate_") as cache:
        pools = {
            arch: ProcessPoolExecutor(max(jobs // len(archs), 1), get_context("spawn"), prepare, (arch, cache))
            for arch in archs
        }
        pending: dict[Future[Outcome], tuple[str, str]] = {
            pools[arch].submit(run_check, arch, name): (arch, name) for name in names(only) for arch in archs
        }
        try:
            for future in as_completed(pending):
                outcomes.append(found := _outcome(future, *pending[future]))
                print(f"[{len(outcomes)}/{len(pending)}] {described(found)}", file=sys.stderr, flush=True)
        finally:
            for pool in pools.values():
                pool.shutdown(cancel_futures=True)
    return outcomes


def _outcome(future: Future[Outcome], arch: str, name: str) -> Outcome:
    try:
        return future.result()
    except BrokenProcessPool:  # a segmentation fault, which also ends what the process would have run next
        return Outcome(arch, name, passed=False, detail="its process died, in this check or in one before", seconds=0)


def described(outcome: Outcome) -> str:
    """One line."""
    verdict = "ok" if outcome.passed else "WRONG"
    return f"{outcome.arch} {outcome.name}: {verdict}, {outcome.detail} ({outcome.seconds:.1f} s)"


def main() -> int:
    """Run the checks, and name what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=EMULATED, default=list(EMULATED), metavar="ARCH")
    parser.add_argument("--only", default="", metavar="TEXT", help="checks whose name has TEXT in it, such as prefill")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes, one a core if unsaid"
    )
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    parser.add_argument("--record", action="store_true", help="note in ci/evidence.json what passed")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record needs all checks of an architecture: leave --only out")
    if not names(options.only):
        parser.error(f"--only: expected a part of one of {', '.join(names(''))}; got {options.only!r}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, and an interpreted process cannot compile: unset it")
    try:
        check_source()
    except NoEmulator as missing:
        parser.error(str(missing))
    start = time.perf_counter()
    outcomes = run_all(options.arch, options.only, options.jobs)
    wrong = [outcome for outcome in outcomes if not outcome.passed]
    if options.json:
        versions = {"triton": triton.__version__, "tinygrad": COMMIT}
        print(json.dumps({**versions, "outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))
    else:
        seconds = time.perf_counter() - start
        print(f"{len(outcomes)} checks on Triton {triton.__version__} in {seconds:.0f} s: {len(wrong)} wrong")
        for outcome in wrong:
            print(described(outcome))
    if options.record and not wrong:
        record_emulated(triton.__version__, options.arch, len(CHECKS))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
