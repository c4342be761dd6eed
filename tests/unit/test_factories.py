"""torch's default dtype and device never change a result: every factory call names both."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "arange as_tensor asarray empty empty_strided eye full linspace logspace ones rand randint randn randperm tensor "
    "zeros"
)
FACTORIES = {f"torch.{name}" for name in NAMES.split()}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Calls of torch's factories in the package."""
    for folder in ("portable_mla", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "portable_mla/backends" in str(path):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}", node


def missing(call: ast.Call) -> set[str]:
    """What a call leaves to torch's defaults."""
    given = {keyword.arg for keyword in call.keywords}
    return set() if None in given else {"dtype", "device"} - given


def test_every_factory_call_names_dtype_and_device() -> None:
    found = {place: missing(call) for place, call in calls()}
    assert len(found) > 30, "the search finds the calls that are there"
    assert {place: names for place, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("torch.zeros(3)", {"dtype", "device"}),
        ("torch.full(n, 0.0, dtype=d)", {"device"}),
        ("torch.zeros(3, dtype=d, device=e)", set()),
    ],
)
def test_a_call_that_leaves_something_out_is_found(text: str, names: set[str]) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call) and missing(call) == names
