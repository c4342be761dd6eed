"""The structure: arrows point down, imports stay lazy, one import name, files that read in one sitting."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portable_mla.core.arch import ARCHS

ROOT = Path(__file__).parents[2]
# A folder or top-level module may import those of lower layers and its own.
LAYERS = (
    ("errors",),
    ("core",),
    ("runtime",),
    ("metadata",),
    ("dispatch", "models"),
    ("settings",),
    ("decode",),
    ("prefill", "cache"),
    ("mixed",),
    ("layer",),
    ("__init__",),
    ("integrations",),
    ("cli",),
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}
BACKENDS_MAY_IMPORT = {"core", "runtime", "metadata", "errors"}
INTERFACE = "dispatch.interface"  # of dispatch, what backends see
SHARED = ("triton", "library")  # folders of backends that the others may import


def sources(folder: str) -> list[Path]:
    """Python files of a top-level folder."""
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "portable_mla/backends" not in str(path)]


def imports(path: Path) -> Iterator[str]:
    """Every module of this project that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [f"portable_mla.{a.name}" for a in node.names] if node.module == "portable_mla" else [node.module or ""]
            )
        for name in names:
            if name.split(".")[0] == "portable_mla" and "." in name:
                yield name.split(".", 1)[1]


def module_of(path: Path) -> str:
    """The top-level module or subpackage that a file of portable_mla belongs to."""
    return path.relative_to(ROOT / "portable_mla").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("portable_mla"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_a_higher_layer_or_a_backend(path: Path) -> None:
    own = module_of(path)
    assert own in RANK, f"{own} has no layer: add it to LAYERS"
    if own == "cli":  # the public surface, and the reference to check against
        return
    for imported in imports(path):
        other = imported.split(".")[0]
        assert other != "backends", f"{path} names a backend; registry.py alone does, as a string"
        assert RANK[other] < RANK[own] or other == own, f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", sources("backends"), ids=lambda path: str(path.relative_to(ROOT)))
def test_backends_import_the_contract_and_never_each_other(path: Path) -> None:
    family = path.relative_to(ROOT / "backends").parts[0].removesuffix(".py")
    for imported in imports(path):
        parts = imported.split(".")
        shared = parts[0] == "backends" and parts[1] in (*SHARED, family)
        contract = parts[0] in BACKENDS_MAY_IMPORT or imported.startswith(INTERFACE)
        assert contract or shared, f"{path} imports {imported}"


def test_only_device_asks_torch_about_hardware() -> None:
    asks = re.compile(r"torch\.(version\.(hip|cuda)|cuda\.(get_device_(properties|capability)|device_count))")
    guilty = [
        path for folder in ("portable_mla", "backends") for path in sources(folder) if asks.search(path.read_text())
    ]
    assert [path.name for path in guilty] == ["device.py"]


def test_architecture_names_stand_in_few_places() -> None:
    names = re.compile("|".join(rf'"{name}"' for name in ARCHS if name != "cpu"))
    allowed = {"arch.py", "registry.py", "nvidia.py", "amd.py", "kernels_by_arch.py"}
    for folder in ("portable_mla", "backends"):
        for path in sources(folder):
            assert path.name in allowed or not names.search(path.read_text()), f"{path} names an architecture"


def fresh(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_backend_no_kernel_compiler_and_no_vendor() -> None:
    code = "import sys, portable_mla; print(*sorted(sys.modules))"
    loaded = fresh(code).split()
    unwanted = ("portable_mla.backends", "triton", "aiter", "flash_mla", "flashinfer", "typer", "transformers")
    assert [name for name in loaded if name.startswith(unwanted)] == []


def test_importing_does_not_touch_a_gpu() -> None:
    code = "import torch; torch.cuda._lazy_init = lambda: 1 / 0; import portable_mla as p; print(p.arch_of('cpu').name)"
    assert fresh(code).split() == ["cpu"]


def test_backends_have_one_import_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import backends"], capture_output=True, text=True, cwd=ROOT)
    assert "import portable_mla.backends, not backends" in done.stderr


def test_the_link_to_backends_is_relative() -> None:
    assert (ROOT / "portable_mla" / "backends").readlink() == Path("../backends")


def test_the_top_level_is_what_it_should_be() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    assert top <= {"pyproject.toml", "portable_mla", "backends", "tests", "ci", "README.md"}


@pytest.mark.parametrize("folder", ["portable_mla", "backends", "ci"])
def test_files_and_functions_read_in_one_sitting(folder: str) -> None:
    for path in sources(folder):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, f"{path} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                jit = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= (120 if jit else 60), f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_public_things_have_a_docstring() -> None:
    for folder in ("portable_mla", "backends"):
        for path in sources(folder):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree) or not tree.body, f"{path} has no docstring"
            for node in tree.body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_nothing_can_run_code_from_data() -> None:
    banned = {"eval", "exec", "pickle", "torch.load", "marshal", "shelve"}
    for folder in ("portable_mla", "backends"):
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text())):
                used = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                assert used not in banned, f"{path}:{getattr(node, 'lineno', 0)} calls {used}"
            assert not set(re.findall(r"^import (\w+)", path.read_text(), re.MULTILINE)) & banned
