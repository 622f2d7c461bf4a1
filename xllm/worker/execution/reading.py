"""What is read of a model before there is memory for its KV: its weights, on their platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.worker.collectives.making import place_engine
from xllm.worker.execution.loading import LoadedModel, load_model, resolve_model_len
from xllm.worker.kernels.selection import require_team
from xllm.worker.platform.platform import Platform
from xllm.worker.platform.selection import select_platform


@dataclasses.dataclass(frozen=True, slots=True)
class ReadModel:
    """A model that lacks its KV memory. `model_len`: tokens that it and the settings allow."""

    directory: Path
    platform: Platform
    loaded: LoadedModel
    model_len: int


def read_model(
    settings: Settings, progress: Callable[[int, int], None], *, is_alone: bool
) -> ReadModel:
    """Read the model that the settings name. Raises ConfigError or DependencyError. A longest
    context that holds for further models, too (not `is_alone`), may be more than this one has."""
    model, worker = settings.model, settings.worker
    if not model.path:
        raise ConfigError("model.path is empty: no model directory", param="model.path")
    directory = Path(model.path)
    platform = select_platform(worker.device, worker.rank)
    loaded = load_model(
        directory,
        model.dtype,
        platform,
        progress,
        model.implementation,
        num_threads=place_engine(settings, platform.name),
        kernels=worker.kernels,
        quantization=model.quantization,
        asked=model if is_alone else dataclasses.replace(model, max_model_len=0),
        rank=worker.rank,
        num_ranks=settings.master.num_workers,
        invariant=worker.deterministic,
    )
    if worker.kv_dtype != "auto":
        require_team(loaded.team, "worker.kv_dtype", worker.kv_dtype)
    length = resolve_model_len(settings, loaded.model.config)
    return ReadModel(directory, platform, loaded, length)
