"""Settings from flags, a TOML file and XLLM_* variables, in that order: the first that has a
value wins; what none has keeps its default.

An unknown key or variable, a wrong type or a value out of its bound refuses to start: ConfigError
(exit code 64) that names it. Only `environment` knows the process's real environment.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

import msgspec

from xllm.config.cpu_list import check_affinity
from xllm.config.environment import read_environment
from xllm.config.scheduling import check_scheduling
from xllm.config.settings import Settings
from xllm.config.table import (
    SettingEntry,
    build_settings,
    check_value,
    describe_kind,
    near_matches,
    setting_table,
)
from xllm.errors import ConfigError

PREFIX = "XLLM_"
CONFIG_VARIABLE = "XLLM_CONFIG"
"""Names the TOML file where no flag does."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a cluster or a process: a part of registry keys, file names and endpoints."""
NOT_SETTINGS = frozenset({CONFIG_VARIABLE, "XLLM_TORCH"})
"""Variables with our prefix that are no settings: the file's name, and what scripts install."""


def load(
    flags: Mapping[str, object] | None = None,
    file: str | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """The merged settings. `flags` by key (`section.field`); `file`: path of a TOML file;
    `environ`: the environment (default: the process's own); `defaults` by key: what a command
    has in place of the dataclasses' own."""
    table = setting_table()
    variables = read_environment() if environ is None else environ
    path = file or variables.get(CONFIG_VARIABLE) or None
    values = dict(defaults or {})
    values.update(_from_variables(table, variables))
    if path is not None:
        values.update(_from_file(table, path))
    for key, value in (flags or {}).items():
        if key not in table:
            raise ConfigError(f"unknown setting {key}{near_matches(key, table)}", param=key)
        values[key] = check_value(table[key], value, "flag")
    settings = build_settings(values)
    _check_together(settings)
    return settings


def encode_settings(settings: Settings) -> bytes:
    """Settings as bytes: the argument of a process's `main`."""
    return msgspec.msgpack.encode(settings)


def decode_settings(data: bytes) -> Settings:
    """The Settings that `encode_settings` wrote; ConfigError for other bytes."""
    try:
        return msgspec.msgpack.decode(data, type=Settings)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"these bytes are no settings: {error}") from error


def _from_variables(
    table: Mapping[str, SettingEntry], environ: Mapping[str, str]
) -> dict[str, object]:
    by_variable = {entry.variable: entry for entry in table.values()}
    values: dict[str, object] = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        entry = by_variable.get(name)
        if entry is None:
            raise ConfigError(
                f"unknown variable {name}{near_matches(name, by_variable)}", param=name
            )
        values[entry.key] = check_value(entry, text, name)
    return values


def _from_file(table: Mapping[str, SettingEntry], path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}", param="config") from error
    sections = {entry.section for entry in table.values()}
    values: dict[str, object] = {}
    for section, body in tree.items():
        if section not in sections or not isinstance(body, dict):
            raise ConfigError(
                f"{path}: unknown section {section}{near_matches(section, sections)}",
                param=section,
            )
        for name, value in body.items():
            key = f"{section}.{name}"
            if key not in table:
                near = near_matches(key, table)
                raise ConfigError(f"{path}: unknown setting {key}{near}", param=key)
            if isinstance(value, str) and table[key].type is not str:
                kind = describe_kind(table[key])
                raise ConfigError(f"{key} ({path}) must be {kind}, not {value!r}", param=key)
            values[key] = check_value(table[key], value, path)
    return values


def _check_together(settings: Settings) -> None:
    names = {
        "cluster.name": settings.cluster.name,
        "router.name": settings.router.name,
        "master.name": settings.master.name,
        "kvcache.name": settings.kvcache.name,
    }
    for key, name in names.items():
        if not NAME.fullmatch(name) and (name or key == "cluster.name"):
            raise ConfigError(
                f"{key} {name[:80]!r}: 1 to 64 letters, digits, '.', '_', '-', the first of them "
                "a letter or a digit",
                param=key,
            )
    check_scheduling(settings.scheduler)
    check_affinity(settings.worker.cpu_affinity)
    size = settings.worker.block_size
    if size & (size - 1):
        raise ConfigError(
            f"worker.block_size must be a power of two, not {size}", param="worker.block_size"
        )
    if settings.model.max_model_len == 1:
        raise ConfigError(
            "model.max_model_len must be 0 or at least 2", param="model.max_model_len"
        )
