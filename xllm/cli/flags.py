"""Click options made from the settings: a setting is a flag without a line written here.

Values stay texts until `load` checks them, so that flags, file and variables are refused in the
same words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from xllm.config.load import load
from xllm.config.table import SettingEntry, setting_table

F = TypeVar("F", bound=Callable[..., Any])

ALIASES: dict[str, str] = {
    "model.path": "--model",
    "model.name": "--served-model-name",
    "model.more": "--more-models",
    "model.max_model_len": "--max-model-len",
    "model.dtype": "--dtype",
    "model.quantization": "--quantization",
    "router.host": "--host",
    "router.port": "--port",
    "router.zmq_host": "--zmq-host",
    "router.zmq_port": "--zmq-port",
    "router.api_key_file": "--api-key-file",
    "worker.device": "--device",
    "worker.kv_dtype": "--kv-dtype",
    "worker.engine": "--engine",
    "worker.deterministic": "--deterministic",
    "serve.instances": "--instances",
    "serve.routers": "--routers",
    "cluster.registry": "--registry",
    "cluster.log_level": "--log-level",
    "cluster.log_dir": "--log-dir",
}
"""Short names of the flags that people use most."""

_MARK = "setting__"


def settings_options(
    *sections: str, defaults: Mapping[str, object] | None = None
) -> Callable[[F], F]:
    """Decorator: options for every setting of these sections, and `--config`. The command gets
    them as one argument, `settings`, merged with file and variables. `defaults` replace those
    of the dataclasses for this command."""
    table = setting_table()
    entries = [entry for entry in table.values() if entry.section in sections]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(*args: Any, config: str | None, **kwargs: Any) -> Any:
            flags = {
                name.removeprefix(_MARK).replace("__", "."): kwargs.pop(name)
                for name in list(kwargs)
                if name.startswith(_MARK)
            }
            given = {key: value for key, value in flags.items() if value is not None}
            settings = load(given, config, defaults=defaults)
            return function(*args, settings=settings, **kwargs)

        decorated: Any = command
        for entry in reversed(entries):
            decorated = _option(entry, (defaults or {}).get(entry.key, entry.default))(decorated)
        config_option = click.option(
            "--config", metavar="FILE", help="TOML file with settings, one table a section."
        )
        result: F = config_option(decorated)
        return result

    return decorate


def _option(entry: SettingEntry, default: object) -> Callable[[F], F]:
    name = f"{_MARK}{entry.section}__{entry.name}"
    flags = [ALIASES[entry.key]] if entry.key in ALIASES else []
    flags.append(entry.flag)
    if entry.type is bool:
        shown = "on" if default else "off"
        pairs = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
        return click.option(name, *pairs, default=None, help=f"{entry.info.doc} [default: {shown}]")
    metavar = "|".join(entry.info.choices) or entry.info.unit.upper() or _METAVARS[entry.type]
    shown = f" [default: {default}]" if default != "" else ""
    return click.option(name, *flags, metavar=metavar, default=None, help=entry.info.doc + shown)


_METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X"}
