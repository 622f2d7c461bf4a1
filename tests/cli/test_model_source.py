"""Which directory a model setting means."""

from __future__ import annotations

import pytest

from xllm.cli.model_source import resolve_model
from xllm.config.served_model import ModelSettings
from xllm.errors import DependencyError


def test_a_directory(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    path = str(tmp_path / "m")
    assert resolve_model(ModelSettings(path=path)) == (path, "m")
    assert resolve_model(ModelSettings(path=path, name="x")) == (path, "x")


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(DependencyError, match=r"config\.json"):
        resolve_model(ModelSettings(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "nowhere", "a/b/c", "../a"])
def test_neither_directory_nor_hub_id(path):
    with pytest.raises(DependencyError, match="neither"):
        resolve_model(ModelSettings(path=path))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DependencyError, match="cannot be reached") as caught:
        resolve_model(ModelSettings(path="nobody/nothing-at-all"))
    assert "http" not in str(caught.value)
