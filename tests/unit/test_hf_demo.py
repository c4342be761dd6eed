"""portable-mla demo --hf: a model of transformers, its attention and ours."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from portable_mla import integrations
from portable_mla.cli import hf_demo
from tests.support.invoking import invoke, invoke_json

pytestmark = pytest.mark.usefixtures("plain_environment")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_both_write_the_same_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install portable-mla[transformers]")
    monkeypatch.setattr(hf_demo, "NEW_TOKENS", 2)
    values = invoke_json("demo", "--hf", "--device", device)
    assert (values["passed"], values["layers_patched"], values["tokens_generated"]) == (True, 4, 6)
    assert values["our_cache_bytes_in_use"] < values["stock_cache_bytes"]  # left padding takes no pages
    assert "public domain" in values["text"]


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    for name in [name for name in sys.modules if name.startswith("portable_mla.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(integrations, "transformers", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    result = invoke("demo", "--hf", "--device", "cpu")
    assert result.exit_code == 2
    assert "needs transformers 5.15 or newer (pip install portable-mla[transformers])" in result.stderr
