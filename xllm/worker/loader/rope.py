"""Rotary settings of a config.json, in the old spelling and the new one.

Old: `rope_theta` beside `rope_scaling` {"type" or "rope_type", ...}. New: `rope_parameters` holds
all of it. What the engine does not compute is refused by name; nothing is silently ignored.
"""

from __future__ import annotations

import math
from typing import Any

from xllm.errors import ConfigError
from xllm.worker.loader.config import RawConfig, RopeConfig, positive_number

_DEFAULT_THETA = 10000.0


def read_rope(raw: RawConfig) -> RopeConfig:
    """The rotary settings; raises ConfigError for kinds other than default, linear, llama3
    and yarn, and for partial rotation."""
    table = raw.table("rope_scaling") or raw.table("rope_parameters")
    if any(isinstance(value, dict) for value in table.values()):
        raise ConfigError("config.json: rope_parameters by layer type are not supported")
    kind = table.get("rope_type", table.get("type", "default"))
    theta = positive_number(
        "rope_theta", table.get("rope_theta") or raw.number("rope_theta", _DEFAULT_THETA)
    )
    partial = table.get("partial_rotary_factor", raw.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"config.json: partial_rotary_factor {partial!r} is not supported")
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig("linear", theta, factor=_required(table, "factor"))
        case "llama3":
            return RopeConfig(
                "llama3",
                theta,
                factor=_required(table, "factor"),
                original_max_positions=_original_positions(raw, table),
                low_freq_factor=_required(table, "low_freq_factor"),
                high_freq_factor=_required(table, "high_freq_factor"),
            )
        case "yarn":
            return _read_yarn(raw, table, theta)
    raise ConfigError(
        f"config.json: rope type {kind!r} is not supported (default, linear, llama3, yarn)"
    )


def _read_yarn(raw: RawConfig, table: dict[str, Any], theta: float) -> RopeConfig:
    """YaRN (Peng et al., 2023): cos and sin are scaled by 0.1 ln(factor) + 1 unless the file
    gives the scale, or the two coefficients whose scales' ratio it is."""
    original = _original_positions(raw, table)
    if table.get("factor") is None:
        factor = raw.integer("max_position_embeddings") / original
    else:
        factor = _required(table, "factor")
    scale = table.get("attention_factor")
    if scale is not None:
        attention = positive_number("attention_factor", scale)
    elif table.get("mscale") and table.get("mscale_all_dim"):
        attention = _yarn_scale(factor, _required(table, "mscale"))
        attention /= _yarn_scale(factor, _required(table, "mscale_all_dim"))
    else:
        attention = _yarn_scale(factor, 1.0)
    return RopeConfig(
        "yarn",
        theta,
        factor=factor,
        original_max_positions=original,
        beta_fast=positive_number("beta_fast", table.get("beta_fast") or 32),
        beta_slow=positive_number("beta_slow", table.get("beta_slow") or 1),
        attention_factor=attention,
        truncate=bool(table.get("truncate", True)),
    )


def _yarn_scale(factor: float, coefficient: float) -> float:
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def _required(table: dict[str, Any], key: str) -> float:
    if table.get(key) is None:
        raise ConfigError(f"config.json: rope scaling lacks {key}")
    return positive_number(key, table[key])


def _original_positions(raw: RawConfig, table: dict[str, Any]) -> int:
    """Positions the model was trained with before scaling."""
    value = raw.values.get("original_max_position_embeddings")
    if value is None:
        value = table.get("original_max_position_embeddings")
    if value is None:
        return raw.integer("max_position_embeddings")
    return int(positive_number("original_max_position_embeddings", value))
