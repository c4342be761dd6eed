"""The README keeps step with the code."""

from __future__ import annotations

import re

import pytest

from tests.support.readme_tables import README, rendered


def test_its_tables_are_what_the_code_says() -> None:
    text = README.read_text()
    assert text == rendered(text), "run python -m tests.support.readme_tables"


def test_its_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example[1], names)
    assert "chosen" in capsys.readouterr().out
    assert getattr(names["out"], "shape", None) == (2, 16, 512)
