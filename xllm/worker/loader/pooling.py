"""What a model is served for, and how its rows become one vector: the settings' word, or that of
the files which sentence-transformers keeps beside a model. Nothing here knows torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from xllm.config.served_model import ModelSettings
from xllm.errors import ConfigError

_MODULES = "modules.json"
_POOLING = "1_Pooling/config.json"
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_NAMES = {"lasttoken": "last", "mean": "mean"}
_PREFIX = "pooling_mode_"


@dataclasses.dataclass(frozen=True, slots=True)
class ModelTask:
    """`task`: generate or embed. `pooling`: last or mean where it embeds, else empty."""

    task: str = "generate"
    pooling: str = ""


GENERATES = ModelTask()
"""What most models are for."""


def resolve_task(settings: ModelSettings, directory: Path, *, headless: bool = False) -> ModelTask:
    """The task of the model in `directory`. `headless`: its checkpoint cannot generate.

    Raises ConfigError where what the settings ask for, or what the directory's files describe,
    cannot be done."""
    has_files = (directory / _MODULES).is_file() or (directory / _POOLING).is_file()
    task = settings.task
    if task == "auto":
        task = "embed" if headless or has_files else "generate"
    if task == "generate":
        if headless:
            raise ConfigError(
                "model.task is generate and the checkpoint has no head: it can embed only",
                param="model.task",
            )
        if settings.pooling != "auto":
            raise ConfigError(
                f"model.pooling is {settings.pooling} and model.task generate, which pools nothing",
                param="model.pooling",
            )
        return GENERATES
    _check_modules(directory / _MODULES)
    pooling = settings.pooling
    if pooling == "auto":
        pooling = _read_pooling(directory / _POOLING)
    return ModelTask("embed", pooling)


def _check_modules(path: Path) -> None:
    """Raise ConfigError where a text passes more than the model, a pooling and a norm."""
    if not path.is_file():
        return
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ConfigError(f"{path.name} must hold a list of objects", param="model.path")
    for module in modules:
        name = str(module.get("type", "")).rpartition(".")[2]
        if name not in _KNOWN_MODULES:
            raise ConfigError(
                f"{path.name}: module {name[:100]!r} is not supported "
                f"({', '.join(_KNOWN_MODULES)} are)",
                param="model.path",
            )


def _read_pooling(path: Path) -> str:
    """The pooling that sentence-transformers has for the model; last where it has none."""
    if not path.is_file():
        return "last"
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{_POOLING} must hold a JSON object", param="model.path")
    mode = values.get("pooling_mode")
    if isinstance(mode, str):
        modes = [mode]
    else:
        chosen = (name for name, on in values.items() if on is True and name.startswith(_PREFIX))
        modes = [name.removeprefix(_PREFIX).removesuffix("_tokens") for name in chosen]
    if len(modes) != 1 or modes[0] not in _NAMES:
        raise ConfigError(
            f"{_POOLING} asks for pooling {' and '.join(modes)[:100] or 'by nothing'}; lasttoken "
            f"and mean are supported (model.pooling overrides it)",
            param="model.pooling",
        )
    return _NAMES[modes[0]]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="model.path") from error
