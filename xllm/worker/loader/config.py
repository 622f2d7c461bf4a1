"""A model's configuration files, read into one frozen, typed form.

RawConfig reads config.json with bounds and named errors; each family's file in `models` turns it
into a ModelConfig, for the defaults of missing keys differ by family. Nothing here knows torch.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from xllm.errors import ConfigError, DependencyError


@dataclasses.dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `kind` is default, linear, llama3 or yarn; the other fields
    belong to those kinds that name them in their papers, and are neutral elsewhere."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Layers whose feed-forward half is `num_experts` gated MLPs, of which a row passes `top_k`;
    `normalise`: the probabilities of those are made to sum to one."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalise: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention and a gated MLP.

    `layer_windows`: per layer, how many of the last positions a token sees, itself included
    (0: all). `dtype` names the checkpoint's type, "" where it does not say.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    rope: RopeConfig
    layer_windows: tuple[int, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = ""
    eos_ids: tuple[int, ...] = ()
    experts: ExpertConfig | None = None
    has_head: bool = True
    """Whether logits can be had; a model that only embeds has none."""


class RawConfig:
    """config.json (and generation_config.json) of a model directory, read key by key.

    Every accessor raises ConfigError naming the key where the value has a wrong type or is out
    of its bound. A key whose value is null counts as missing.
    """

    def __init__(self, values: dict[str, Any], generation: dict[str, Any] | None = None) -> None:
        self.values = values
        self.generation = generation or {}

    def has(self, key: str) -> bool:
        """Whether the key is there with a value."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """An integer of at least `low`; without a default the key must be there."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"config.json: {key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"config.json: {key} must be an integer >= {low}, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.values.get(key)
        return default if value is None else positive_number(key, value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"config.json: {key} must be a string, not {value!r}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty where it is missing."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {key} must be an object, not {value!r}")
        return value

    def architecture(self) -> str:
        """The first Hugging Face architecture name."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError("config.json: architectures must be a list of names")
        return names[0]

    def dtype(self) -> str:
        """The checkpoint's type by either spelling of its key; "" where it does not say."""
        return self.text("dtype", "") or self.text("torch_dtype", "")

    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text: those of generation_config.json, then those of config.json."""
        found: list[int] = []
        for source, values in (("generation_", self.generation), ("", self.values)):
            value = values.get("eos_token_id")
            for token in value if isinstance(value, list) else [value]:
                if token is None or token in found:
                    continue
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ConfigError(f"{source}config.json: eos_token_id: {token!r} is no id")
                found.append(token)
        return tuple(found)


def positive_number(key: str, value: object) -> float:
    """`value` as a positive float, or ConfigError naming the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def read_config(directory: Path) -> RawConfig:
    """Read a model directory's configuration files.

    Raises DependencyError where the directory or config.json is absent, ConfigError where a file
    is no JSON object, asks for code from the directory (`auto_map`) or for quantized weights.
    """
    if not directory.is_dir():
        raise DependencyError(f"model.path: {directory} is no directory", param="model.path")
    config = directory / "config.json"
    if not config.is_file():
        raise DependencyError(f"model.path: {directory} has no config.json", param="model.path")
    values = _read_object(config)
    generation = directory / "generation_config.json"
    raw = RawConfig(values, _read_object(generation) if generation.is_file() else {})
    if raw.has("auto_map"):
        raise ConfigError(
            "config.json: auto_map asks to run code from the model directory, which is never done"
        )
    if raw.has("quantization_config"):
        raise ConfigError("config.json: quantization_config: quantized weights are not supported")
    return raw


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold a JSON object")
    return values
