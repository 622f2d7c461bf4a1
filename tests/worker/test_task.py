"""What a model is served for, from the settings and the files beside it."""

from __future__ import annotations

import json

import pytest

from xllm.config.served_model import ModelSettings
from xllm.errors import ConfigError
from xllm.worker.loader.pooling import GENERATES, ModelTask, resolve_task

TRANSFORMER = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MODES = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")


def write(directory, modules=(TRANSFORMER, POOLING, NORMALIZE), pooling=None):
    if modules is not None:
        (directory / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


def modes(*chosen):
    flags = {f"pooling_mode_{name}": name in chosen for name in MODES}
    return {"word_embedding_dimension": 8, "include_prompt": True, **flags}


@pytest.mark.parametrize(
    ("settings", "headless", "task"),
    [
        ({}, False, GENERATES),
        ({}, True, ModelTask("embed", "last")),
        ({"task": "embed"}, False, ModelTask("embed", "last")),
        ({"task": "embed", "pooling": "mean"}, True, ModelTask("embed", "mean")),
        ({"task": "generate"}, False, GENERATES),
    ],
)
def test_a_plain_directory(tmp_path, settings, headless, task):
    assert resolve_task(ModelSettings(**settings), tmp_path, headless=headless) == task


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        (modes("mean_tokens"), "mean"),
        (modes("lasttoken"), "last"),
        ({"pooling_mode": "mean"}, "mean"),
        (None, "last"),
    ],
)
def test_the_files_of_an_embedding_model(tmp_path, pooling, name):
    write(tmp_path, pooling=pooling)
    assert resolve_task(ModelSettings(), tmp_path) == ModelTask("embed", name)
    assert resolve_task(ModelSettings(task="generate"), tmp_path) == GENERATES
    other = "last" if name == "mean" else "mean"
    assert resolve_task(ModelSettings(pooling=other), tmp_path).pooling == other


@pytest.mark.parametrize(
    ("modules", "pooling", "settings", "what"),
    [
        ((TRANSFORMER, POOLING, DENSE), None, {}, "'Dense'"),
        ({"a": 1}, None, {}, "list of objects"),
        ((TRANSFORMER,), modes("cls_token"), {}, "cls"),
        ((TRANSFORMER,), modes("mean_tokens", "max_tokens"), {}, "mean and max"),
        ((TRANSFORMER,), modes(), {}, "nothing"),
        ((TRANSFORMER,), [1], {}, "JSON object"),
        ((TRANSFORMER,), {"pooling_mode": "weightedmean"}, {}, "weightedmean"),
        (None, None, {"pooling": "mean"}, "pools nothing"),
        (None, None, {"pooling": "mean", "task": "generate"}, "pools nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, modules, pooling, settings, what):
    write(tmp_path, modules, pooling)
    with pytest.raises(ConfigError, match=what):
        resolve_task(ModelSettings(**settings), tmp_path)


def test_a_checkpoint_without_a_head_cannot_generate(tmp_path):
    with pytest.raises(ConfigError, match="no head"):
        resolve_task(ModelSettings(task="generate"), tmp_path, headless=True)


def test_files_that_are_no_json_are_named(tmp_path):
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match=r"modules\.json"):
        resolve_task(ModelSettings(), tmp_path)


def test_the_settings_go_before_a_pooling_that_is_not_supported(tmp_path):
    write(tmp_path, pooling=modes("cls_token"))
    assert resolve_task(ModelSettings(pooling="last"), tmp_path) == ModelTask("embed", "last")
