"""The file of tenants' limits: one TOML table a tenant.

    [alice]
    requests_per_minute = 600
    tokens_per_minute = 200_000
    concurrency = 8

What a table leaves out is what the settings say for everybody. Unknown keys refuse to start.
"""

from __future__ import annotations

import dataclasses
import tomllib

from xllm.config.admission import MAX_PER_MINUTE, AdmissionSettings
from xllm.errors import ConfigError
from xllm.router.admission.tenants import TenantGate, TenantLimits

_FIELDS = tuple(field.name for field in dataclasses.fields(TenantLimits))


def make_gate(settings: AdmissionSettings) -> TenantGate:
    """The gate of these settings, and of the file that they name."""
    others = TenantLimits(
        settings.requests_per_minute, settings.tokens_per_minute, settings.concurrency
    )
    path = settings.tenant_limits_file
    return TenantGate(read_limits(path, others) if path else {}, others)


def read_limits(path: str, others: TenantLimits) -> dict[str, TenantLimits]:
    """Limits by tenant. ConfigError for whatever is not as above."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise _bad(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _bad(f"{path} is no TOML: {error}") from error
    return {name: _limits(f"{path}, tenant {name}", table, others) for name, table in tree.items()}


def _limits(where: str, table: object, others: TenantLimits) -> TenantLimits:
    if not isinstance(table, dict):
        raise _bad(f"{where}: a table of {', '.join(_FIELDS)} is needed")
    for key, value in table.items():
        if key not in _FIELDS:
            raise _bad(f"{where}: {key} is none of {', '.join(_FIELDS)}")
        if type(value) is not int or not 0 <= value <= MAX_PER_MINUTE:
            raise _bad(f"{where}: {key} must be from 0 to {MAX_PER_MINUTE}, not {value!r}")
    return dataclasses.replace(others, **table)


def _bad(message: str) -> ConfigError:
    param = "admission.tenant_limits_file"
    return ConfigError(f"{param}: {message}", param=param)
