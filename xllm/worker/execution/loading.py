"""From a model directory and settings to a model that can run: configuration and weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import structlog
import torch

from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.errors import ConfigError, DependencyError
from xllm.worker.kernels.selection import require_team, select_team
from xllm.worker.kernels.team import Team
from xllm.worker.loader.checkpoint import Checkpoint, open_checkpoint
from xllm.worker.loader.config import ModelConfig, RawConfig, read_config
from xllm.worker.loader.pooling import GENERATES, ModelTask, resolve_task
from xllm.worker.loader.shards import ShardPlan
from xllm.worker.loader.weights import WeightTable, load_weights
from xllm.worker.models.model import NativeModel, WholeModel
from xllm.worker.models.registry import find_family, is_headless, is_native
from xllm.worker.platform.platform import Platform, resolve_dtype

_log = structlog.get_logger("worker")

_PREFIX = "model."
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights, and what is known of it only now."""

    model: NativeModel | WholeModel
    dtype: torch.dtype
    revision: str
    num_bytes: int
    team: Team | None
    """Who computes it; None: torch alone."""
    task: ModelTask = GENERATES
    head_rows: int = 0
    """Logits that each of several ranks gives, the last one perhaps fewer; 0: there is one rank."""


def load_model(
    directory: Path,
    asked_dtype: str,
    platform: Platform,
    progress: Callable[[int, int], None],
    implementation: str = "auto",
    *,
    num_threads: int = 0,
    kernels: str = "auto",
    quantization: str = "none",
    asked: ModelSettings | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    invariant: bool = False,
) -> LoadedModel:
    """Set the platform up for a model and read its configuration and weights onto the device.
    `implementation` and `quantization`: see ModelSettings; `num_threads` and `kernels`: see
    WorkerSettings. `asked` says which task the model is for (one that embeds is loaded without its
    head), and the context that it must have; `rank`: its part is read of several. `invariant`:
    see select_team.

    Raises ConfigError or DependencyError naming the file, key or tensor that stands in the way,
    or the memory that is lacking.
    """
    raw, asked = read_config(directory), asked or ModelSettings()
    task = resolve_task(asked, directory, headless=is_headless(raw.architecture()))
    select = functools.partial(select_team, kernels, platform.device, invariant=invariant)
    if implementation == "transformers" or (
        implementation == "auto" and not is_native(raw.architecture())
    ):
        _check_library(raw, quantization, num_ranks)
        prepare = functools.partial(platform.prepare, num_threads)
        loaded = _load_library(directory, raw, asked_dtype, platform, progress, prepare, select)
        _check_model_len(asked, loaded.model.config)
        return dataclasses.replace(loaded, task=task)
    family = find_family(raw.architecture())
    checkpoint = open_checkpoint(directory)
    config = family.read(raw)
    _check_model_len(asked, config)
    dtype = resolve_dtype(asked_dtype, config.dtype or checkpoint.dtype(), platform.name == "cpu")
    unused: tuple[str, ...] = (_HEAD,)
    if task.pooling:
        config = dataclasses.replace(config, has_head=False)
    else:
        config, unused = _settle_tie(config, checkpoint)
    shards = ShardPlan(config, rank, num_ranks) if num_ranks > 1 else None
    quantized = quantization != "none"
    _check_room(checkpoint, dtype, platform, quantized=quantized, num_ranks=num_ranks)
    platform.prepare(num_threads, checkpoint.num_elements * dtype.itemsize)
    team = select(dtype, torch.get_num_threads(), head_dim=config.head_dim)
    if quantization != "none":
        require_team(team, "model.quantization", quantization)
    table = WeightTable(dtype, platform.device, team, quantization, shards, platform.back_end_ops())
    model = family.build(config if shards is None else shards.local, table)
    _settle_names(table, checkpoint, config.tie_word_embeddings)
    load_weights(checkpoint, table, progress, unused)
    model.finish()
    rows = 0 if shards is None else shards.head_rows
    revision = checkpoint.revision(directory)
    return LoadedModel(model, dtype, revision, table.num_bytes, team, task, rows)


def _check_model_len(asked: ModelSettings, config: ModelConfig) -> None:
    """ConfigError for a longer context than the model has: nobody would see that it is cut."""
    if asked.max_model_len > config.max_positions:
        raise ConfigError(
            f"model.max_model_len must be at most {config.max_positions}, which is what the "
            f"model's config.json allows (0 takes all of it), not {asked.max_model_len}",
            param="model.max_model_len",
        )


def _check_library(raw: RawConfig, quantization: str, num_ranks: int) -> None:
    """ConfigError for what models by way of the library cannot do."""
    if quantization != "none":
        raise ConfigError(
            f"model.quantization: {quantization} is for native models, and "
            f"{raw.architecture()} runs through transformers here",
            param="model.quantization",
        )
    if num_ranks > 1:
        raise ConfigError(
            f"master.num_workers: {raw.architecture()} by way of transformers runs on 1 rank, "
            f"not {num_ranks}",
            param="master.num_workers",
        )


def _load_library(
    directory: Path,
    raw: RawConfig,
    asked_dtype: str,
    platform: Platform,
    progress: Callable[[int, int], None],
    prepare: Callable[[int], None],
    select: Callable[..., Team | None],
) -> LoadedModel:
    # It takes seconds to import and most models do without.
    from xllm.worker.models.transformers_loading import load_transformers_model

    checkpoint = open_checkpoint(directory)
    dtype = resolve_dtype(asked_dtype, raw.dtype() or checkpoint.dtype(), platform.name == "cpu")
    _check_room(checkpoint, dtype, platform)
    prepare(checkpoint.num_elements * dtype.itemsize)
    progress(0, checkpoint.total_bytes)
    model, num_bytes = load_transformers_model(raw, checkpoint, dtype, platform.device)
    team = select(dtype, torch.get_num_threads(), head_dim=model.config.head_dim)
    progress(checkpoint.total_bytes, checkpoint.total_bytes)
    return LoadedModel(model, dtype, checkpoint.revision(directory), num_bytes, team)


def _check_room(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    platform: Platform,
    *,
    quantized: bool = False,
    num_ranks: int = 1,
) -> None:
    """Raise DependencyError where the weights do not fit what memory is free: on a CPU the
    kernel would end the process half-way. Quantized ones are taken for bytes."""
    needed = checkpoint.num_elements * (1 if quantized else dtype.itemsize) // num_ranks
    free = platform.memory().free_bytes
    if needed > free:
        raise DependencyError(
            f"model.path: the weights take {needed} bytes as {dtype}{', rounded' * quantized}, "
            f"{free} are free on {platform.describe()}",
            param="model.path",
        )


def _settle_tie(config: ModelConfig, checkpoint: Checkpoint) -> tuple[ModelConfig, tuple[str, ...]]:
    """Whether embedding and head are one, and the tensors that are then not needed: a tied
    checkpoint may hold both, and if they differ, the file is right and the flag is not."""
    entries = checkpoint.entries
    if not config.tie_word_embeddings or _EMBEDDING not in entries or _HEAD not in entries:
        return config, ()
    if checkpoint.equal(_EMBEDDING, _HEAD):
        return config, (_HEAD,)
    return dataclasses.replace(config, tie_word_embeddings=False), ()


def _settle_names(table: WeightTable, checkpoint: Checkpoint, is_tied: bool) -> None:
    """Call the targets as the checkpoint does: some tied ones name their one matrix after the head,
    and those of a model without a head have its inner names."""
    entries = checkpoint.entries
    if _EMBEDDING in entries:
        return
    if _EMBEDDING.removeprefix(_PREFIX) in entries:
        table.targets = {
            name.removeprefix(_PREFIX): targets for name, targets in table.targets.items()
        }
    elif is_tied and _HEAD in entries:
        table.targets[_HEAD] = table.targets.pop(_EMBEDDING)


def resolve_model_len(settings: Settings, config: ModelConfig) -> int:
    """The longest prompt + output: the settings' where they are tighter than the model. Warns
    where they are not, as they may be for one of several models."""
    asked, most = settings.model.max_model_len, config.max_positions
    if asked <= most:
        return asked or most
    _log.warning("context_cut_to_model", model=settings.model.name, asked=asked, max_model_len=most)
    return most
