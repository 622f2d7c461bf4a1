"""Where the model is: the bundled one, a directory, or a hub id to download.

Downloads only what is data: weights as safetensors, JSON and templates; no code, no pickles.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import xllm
from xllm.config.models import each_model, join_models
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.errors import DependencyError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
_DEMO_NAME = "xllm-demo"


def demo_model_path() -> str:
    """The directory of the bundled demo model."""
    return str(Path(xllm.__file__).parent / "demo" / "model")


def resolve_models(settings: Settings) -> Settings:
    """The settings with the directories and names of all models that they name; see
    resolve_model."""
    found = []
    for one in each_model(settings):
        path, name = resolve_model(one.model)
        found.append(
            dataclasses.replace(one, model=dataclasses.replace(one.model, path=path, name=name))
        )
    return join_models(tuple(found))


def resolve_model(model: ModelSettings) -> tuple[str, str]:
    """(directory, name that clients use) of the model that the settings name; downloads it where
    that is a hub id. DependencyError where it is not to be had."""
    if not model.path:
        return _checked(demo_model_path(), "the bundled demo model"), model.name or _DEMO_NAME
    directory = Path(model.path).expanduser()
    if directory.is_dir():
        path = str(directory.resolve())
        return _checked(path, f"the model directory {model.path}"), model.name or Path(path).name
    if _HUB_ID.fullmatch(model.path) is None:
        raise DependencyError(
            f"no model at {model.path}: it is neither a directory nor a hub id (name/model)",
            param="model.path",
        )
    return _checked(_download(model), f"the hub's {model.path}"), model.name or directory.name


def _checked(path: str, what: str) -> str:
    if not (Path(path) / "config.json").is_file():
        raise DependencyError(f"{what} has no config.json", param="model.path")
    return path


def _download(model: ModelSettings) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision = model.revision or None
    try:
        return str(
            snapshot_download(
                model.path, revision=revision, allow_patterns=_PATTERNS, etag_timeout=3
            )
        )
    except GatedRepoError:
        reason = "the hub wants an account that may read it"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {model.revision} of it"
    except (RepositoryNotFoundError, HFValidationError):
        reason = "the hub has no such model"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        reason = "the hub cannot be reached, and no copy is here"
    raise DependencyError(f"cannot get {model.path}: {reason}", param="model.path")
