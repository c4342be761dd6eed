#!/usr/bin/env bash
# Set-up, lint, tests, compile gate, demo and GPU runs of portable_mla: one entry for people and for CI.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
CONSTRAINTS=$ROOT/ci/constraints.txt
NEWEST_TRITON=triton==3.9.0 # the newest that ci/compile/budgets.json has figures for
NEEDED=(torch numpy triton pytest pytest_timeout hypothesis typer rich)
LINTERS=(ruff mypy pyright)
PY= # the Python that runs everything, chosen by setup

usage() {
  cat >&2 <<'EOF'
usage: bash ci/run.sh VERB [ARGUMENTS]

  setup               make an environment that can run the rest (every verb does this by itself)
  lint                ruff format, ruff check, mypy, pyright, and shellcheck where it is installed
  test [PYTEST ARGS]  the test suite, for instance: bash ci/run.sh test -k planner
  compile [ARGS]      compile every GPU kernel for every architecture, without a GPU, and hold registers, spills
                      and shared memory to the budgets in ci/compile/budgets.json, for instance: compile --arch sm90
  compile-newest [ARGS]  the same with the newest Triton that there are budgets for
  emulate [ARGS]      run the AMD kernels, compiled for gfx942 and gfx950, on an emulated GPU, without a GPU. TINYGRAD_SRC
                      names a tinygrad source tree (ci/emulate/source.py has the commit); clang must be on PATH
  emulate-newest [ARGS]  the same with the newest Triton
  aiter [ARGS]        on an AMD GPU: decode beside AITER as a table
  guarded [PYTEST ARGS]  on a GPU: the contract tests without torch's caching allocator, so that reads far outside of a
                      tensor can fault
  tiles ARCH [PYTEST ARGS]  on an NVIDIA GPU: the contract tests with the tiles of another NVIDIA architecture, and its
                      code as far as that runs: the PTX of an older one, no wgmma in place of a newer one's
  demo [DEMO ARGS]    portable-mla demo
  gpu [PYTEST ARGS]   for GPU runners: portable-mla doctor, then the test suite.
                      PORTABLE_MLA_TEST_REQUIRE names the hardware that must be there, for instance sm90

An environment with all that is needed is used as it is. Otherwise packages go to .venv, and a torch
that python3 already has is used and never replaced. CI_TORCH=cpu or CI_TORCH=cuda chooses the build
of torch to install; without it, a machine with an NVIDIA GPU gets cuda and any other gets cpu.
EOF
  exit 2
}

say() { printf '==> %s\n' "$*" >&2; }

die() {
  printf 'ci/run.sh: %s\n' "$*" >&2
  exit 1
}

# setup [MODULE...]: chooses PY, and installs what is missing. The modules are wanted beside NEEDED.
setup() {
  local machine
  machine=$(command -v python3) || die "no python3 on PATH; install Python 3.$(oldest_minor) or newer"
  if [[ $machine != "$VENV"/* ]] && has_everything "$machine" "$@"; then
    use_in_place "$machine"
    return
  fi
  "$VENV/bin/python" -c '' 2>/dev/null || make_venv "$machine"
  PY=$VENV/bin/python
  install_once test,cli
}

# transformers is no need: without it, or without a network to fetch it, its tests skip and say so.
want_transformers() {
  if [[ $PY == "$VENV"/* ]]; then
    (install_once transformers) || say "note: transformers could not be installed; its tests skip"
  fi
}

has_everything() {
  local absent
  is_recent "$1" && absent=$(missing "$1" "${NEEDED[@]}" "${@:2}") && [[ -z $absent ]]
}

use_in_place() {
  PY=$1
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  say "using $PY, which has all that is needed; nothing is installed"
}

# The oldest Python 3.x that pyproject.toml allows.
oldest_minor() { sed -n 's/^requires-python = ">=3\.\([0-9]*\).*/\1/p' "$ROOT/pyproject.toml"; }

is_recent() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $(oldest_minor)))"; }

# missing PYTHON MODULE...: those it cannot find. It looks without importing: torch takes seconds to import.
missing() {
  "$1" - "${@:2}" <<'EOF'
import sys
from importlib.util import find_spec

print(*(name for name in sys.argv[1:] if find_spec(name) is None))
EOF
}

make_venv() {
  local options=(--clear)
  is_recent "$1" || die "portable_mla needs Python 3.$(oldest_minor) or newer and $1 is $("$1" -V 2>&1); \
with a newer one elsewhere, make .venv with it (for instance python3.12 -m venv .venv) and start again"
  if [[ -z $(missing "$1" torch) ]]; then
    say "making .venv on top of the packages of $1, whose torch stays as it is"
    options+=(--system-site-packages)
  else
    say "making .venv with $("$1" -V)"
  fi
  "$1" -m venv "${options[@]}" "$VENV" ||
    die "$1 cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
  [[ ${#options[@]} -eq 1 ]] || see_parent_venv "$1"
}

# A venv made from a venv sees the packages of the base Python only, and ROCm images keep torch in a venv.
see_parent_venv() {
  "$1" - "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'EOF'
import sys
import sysconfig
from pathlib import Path

if sys.prefix != sys.base_prefix:
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    Path(sys.argv[1], "machine_packages.pth").write_text(line)
EOF
}

# install_once EXTRAS: installs unless .venv was made from the same Python, pyproject.toml and constraints.
install_once() {
  local stamp=$VENV/.installed-$1 wanted
  wanted=$({ "$PY" -VV && echo "$ROOT" && cat "$ROOT/pyproject.toml" "$CONSTRAINTS"; } | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  install_project "$1"
  echo "$wanted" >"$stamp"
}

# No build isolation: on a venv over a venv it takes setuptools from the lower one, which may be too old.
install_project() {
  local before setuptools
  setuptools=$(pinned setuptools)
  [[ -z $(missing "$PY" torch) ]] || install_torch
  before=$(torch_build)
  [[ -z $(missing "$PY" triton) ]] || install_triton "$before"
  say "installing portable_mla[$1] beside torch $before"
  keep_installed <"$CONSTRAINTS" >"$VENV/constraints.txt"
  pip_install "$setuptools"
  pip_install --constraint "$VENV/constraints.txt" --no-build-isolation --editable "${ROOT}[$1]" ||
    die "pip could not install portable_mla[$1] (see above); torch $before stays, so pyproject.toml has to allow it"
  [[ $(torch_build) == "$before" ]] || die "torch was $before and became $(torch_build); remove .venv and start again"
}

pip_install() { "$PY" -m pip install -qq --disable-pip-version-check --no-input "$@"; }

pinned() { grep --max-count=1 "^$1==" "$CONSTRAINTS" || die "ci/constraints.txt has no version for $1"; }

torch_build() {
  "$PY" -W ignore -c 'import torch; v = torch.version; print(f"{torch.__version__} (cuda {v.cuda}, hip {v.hip})")'
}

install_torch() {
  local torch build=${CI_TORCH:-cpu}
  torch=$(pinned torch)
  if [[ -z ${CI_TORCH:-} && -e /dev/nvidia0 ]]; then build=cuda; fi
  if [[ -e /dev/kfd ]]; then
    say "note: python3 has no torch; to use the AMD GPU, start from a ROCm build of torch as ci/rocm.Dockerfile does"
  fi
  case $build in
    cpu) install_cpu_torch "$torch" ;;
    cuda)
      say "installing $torch, the build for NVIDIA GPUs"
      pip_install "$torch"
      ;;
    *) die "CI_TORCH must be cpu or cuda, got '$build'" ;;
  esac
}

# A CPU build is far smaller than the default with its CUDA libraries: a wheel at hand first, then the index uv knows.
install_cpu_torch() {
  say "installing $1: is a CPU wheel at hand?"
  if ! pip_install --no-index --no-deps "$1+cpu" 2>/dev/null; then
    say "none is; asking PyTorch's CPU index"
    uv_install --no-deps --torch-backend=cpu "$1" || say "that index does not answer; taking the default build"
  fi
  pip_install "$1" # what torch depends on, and torch itself if it is not there yet
}

# uv_install ARGUMENTS...: fails within seconds where the index cannot be reached.
uv_install() {
  local uv
  uv=$(pinned uv)
  pip_install "$uv" &&
    UV_HTTP_CONNECT_TIMEOUT=5 UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=0 \
      "$PY" -m uv pip install --quiet --python "$PY" "$@"
}

# ROCm's torch brings its own triton, which the public package of that name would overwrite.
install_triton() {
  if [[ $1 != *"hip None"* || $(uname -s) != Linux ]]; then
    say "note: triton is missing and cannot be installed beside torch $1"
    return
  fi
  local triton
  triton=$(pinned triton)
  say "installing $triton"
  pip_install "$triton"
}

# The constraints, with what decides about the GPU held at the version that is already there.
keep_installed() {
  "$PY" -c '
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

for line in sys.stdin:
    name = line.partition("==")[0]
    if name in ("torch", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            line = f"{name}=={version(name)}"
    print(line.rstrip())
'
}

lint() {
  local failed=()
  setup "${LINTERS[@]}"
  if [[ $PY == "$VENV"/* ]]; then install_once dev; fi
  check "$PY" -m ruff format --check .
  check "$PY" -m ruff check .
  check "$PY" -m mypy
  check "$PY" -m pyright --pythonpath "$PY"
  if command -v shellcheck >/dev/null; then check shellcheck ci/run.sh .ci/run; fi
  [[ ${#failed[@]} -eq 0 ]] || die "lint failed: ${failed[*]}"
  say "lint passed"
}

# check COMMAND...: runs it and notes a failure, so that one run shows everything there is to mend.
check() {
  local name=$*
  name=${name#"$PY -m "}
  say "$name"
  "$@" || failed+=("[$name]")
}

# One process a core, each with one thread, where pytest-xdist is at hand.
run_tests() {
  local spread=()
  if "$PY" -c 'import xdist' 2>/dev/null; then
    spread=(-n "$(nproc)" --dist worksteal)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
  say "pytest ${spread[*]}${*:+ $*}"
  "$PY" -m pytest "${spread[@]}" "$@"
}

compile_gate() {
  say "compile gate${*:+ $*}"
  "$PY" -m ci.compile.gate "$@"
}

# with_newest_triton COMMAND...: that Triton lies in a folder of its own, in front of the installed one for the command.
with_newest_triton() {
  local folder=$VENV/$NEWEST_TRITON
  mkdir -p "$VENV"
  if [[ ! -d $folder ]]; then
    say "fetching $NEWEST_TRITON"
    pip_install --no-deps --target "$folder.part" "$NEWEST_TRITON"
    mv "$folder.part" "$folder"
  fi
  PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$@"
}

command_line() {
  say "portable-mla $*"
  "$PY" -c 'import sys; from portable_mla.cli import main; sys.argv[0] = "portable-mla"; sys.exit(main())' "$@"
}

gpu() {
  [[ -n ${PORTABLE_MLA_TEST_REQUIRE:-} ]] || die "gpu: set PORTABLE_MLA_TEST_REQUIRE to the hardware this runner must have \
(for instance sm90, sm120, gfx942, gfx950), so that a run without it fails instead of skipping its tests"
  setup
  say "PORTABLE_MLA_TEST_REQUIRE=$PORTABLE_MLA_TEST_REQUIRE"
  print_devices || die "gpu: torch $(torch_build) sees no GPU on this machine"
  command_line doctor
  run_tests "$@"
}

# Without the caching allocator a tensor has an allocation of its own, rounded up to what the driver maps at once: a
# read far outside of it can fault, one just behind it may not.
guarded() {
  setup
  print_devices || die "guarded: torch $(torch_build) sees no GPU on this machine"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTORCH_NO_HIP_MEMORY_CACHING=1 run_tests tests/contract/test_contract.py tests/contract/test_edges.py "$@"
}

print_devices() {
  "$PY" - <<'EOF'
import sys

import torch

for index in range(torch.cuda.device_count()):
    print(f"device {index}: {torch.cuda.get_device_properties(index)}", flush=True)
sys.exit(not torch.cuda.is_available())
EOF
}

main() {
  local verb=${1:-}
  cd "$ROOT"
  case $verb in
    setup | lint)
      [[ $# -eq 1 ]] || usage
      "$verb"
      ;;
    test)
      setup
      want_transformers
      run_tests "${@:2}"
      ;;
    compile-newest)
      setup
      with_newest_triton compile_gate "${@:2}"
      ;;
    compile)
      setup
      compile_gate "${@:2}"
      ;;
    demo)
      setup
      if [[ " $* " == *" --hf "* ]]; then want_transformers; fi
      command_line demo "${@:2}"
      ;;
    emulate)
      setup
      "$PY" -m tests.emulated.run "${@:2}"
      ;;
    emulate-newest)
      setup
      with_newest_triton "$PY" -m tests.emulated.run "${@:2}"
      ;;
    aiter)
      setup
      "$PY" -m ci.bench_decode --only table --contenders ours aiter "${@:2}"
      ;;
    guarded) guarded "${@:2}" ;;
    tiles)
      [[ $# -ge 2 ]] || usage
      setup
      PORTABLE_MLA_TEST_TILES=$2 run_tests tests/contract/test_contract.py tests/contract/test_edges.py tests/contract/test_prefill.py "${@:3}"
      ;;
    gpu) gpu "${@:2}" ;;
    *) usage ;;
  esac
}

main "$@"
