"""The models of one instance: the first one's settings, and those of each further one.

`model.more` names further models as PATH or NAME=PATH; whatever else is set holds for all.
"""

from __future__ import annotations

import dataclasses
import os

from xllm.config.settings import Settings
from xllm.errors import ConfigError


def each_model(settings: Settings) -> tuple[Settings, ...]:
    """The settings of each model, the first one's first, as if it were the only one. ConfigError
    where a name is missing or taken twice, or where models cannot share."""
    if not settings.model.more:
        return (settings,)
    if settings.master.num_workers > 1:
        raise ConfigError(
            f"model.more: several models share one worker, and master.num_workers is "
            f"{settings.master.num_workers}",
            param="model.more",
        )
    first = settings.model
    found = [(model_name(first.name, first.path), first.path)]
    for text in settings.model.more.split(","):
        name, is_named, path = text.strip().partition("=")
        if not is_named:
            name, path = "", name
        if not path:
            raise ConfigError(
                f"model.more: {text!r} names no model; PATH or NAME=PATH, separated by commas",
                param="model.more",
            )
        found.append((model_name(name.strip(), path.strip()), path.strip()))
    names = [name for name, _ in found]
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise ConfigError(f"model.more: two models are named {twice!r}", param="model.more")
    return tuple(
        dataclasses.replace(
            settings, model=dataclasses.replace(first, name=name, path=path, more="")
        )
        for name, path in found
    )


def join_models(settings: tuple[Settings, ...]) -> Settings:
    """What `each_model` takes apart."""
    more = ",".join(f"{one.model.name}={one.model.path}" for one in settings[1:])
    model = dataclasses.replace(settings[0].model, more=more)
    return dataclasses.replace(settings[0], model=model)


def model_name(name: str, path: str) -> str:
    """The name under which clients know a model: the one given, or the last part of its path."""
    return name or os.path.basename(os.path.normpath(path)) if name or path else ""
