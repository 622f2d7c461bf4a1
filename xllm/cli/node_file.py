"""The node file: which processes run on a node, with which settings. Reads and checks, only.

    [node]
    name = "a"                     # unique in the cluster
    address = "10.0.0.1"           # where other nodes reach this one; none: this machine only
    run_dir = "/run/xllm/a"        # sockets, pids, configurations; made 0700
    log_dir = "/var/log/xllm"      # one file a process

    [cluster]                      # settings of all processes, as in a file for --config
    registry = "tcp://10.0.0.1:2400"
    keys_dir = "/etc/xllm/keys"

    [[process]]
    role = "router"                # registry, kvcache, master, worker or router
    [process.router]               # settings of this one
    port = 8010

    [[process]]
    role = "master"
    device = "cuda"                # the same as worker.device

Invariant: every process has a name of its own, and its settings were checked.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from typing import Any

from xllm.config.load import NAME
from xllm.config.settings import Settings
from xllm.config.table import near_matches
from xllm.errors import ConfigError

ROLES = ("registry", "kvcache", "worker", "master", "router")
"""In the order in which they are started: a master is ready once its workers are."""
_SECTIONS = tuple(field.name for field in dataclasses.fields(Settings))


@dataclasses.dataclass(frozen=True)
class NodeProcess:
    """One process: its name, role, and settings by section as its file for --config has them."""

    name: str
    role: str
    sections: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class NodeFile:
    """A node and its processes, in the order in which they are started."""

    name: str
    run_dir: str
    log_dir: str
    processes: tuple[NodeProcess, ...]


def read_node_file(path: str) -> NodeFile:
    """The node that a file describes; ConfigError says what is wrong and where."""
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return parse_node(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", param=error.param) from error


def parse_node(content: dict[str, Any]) -> NodeFile:
    """The node that a decoded file describes."""
    _known(content, ("node", "process", *_SECTIONS), "the node file")
    node = content.get("node")
    if not isinstance(node, dict):
        raise ConfigError("the node file has no table [node]", param="node")
    _known(node, ("name", "address", "run_dir", "log_dir"), "[node]")
    for key in node:
        if not isinstance(node[key], str):
            raise ConfigError(f"node.{key} must be a text", param=f"node.{key}")
    for key in ("name", "run_dir", "log_dir"):
        if not node.get(key):
            raise ConfigError(f"node.{key} is missing", param=f"node.{key}")
    if not NAME.fullmatch(node["name"]):
        raise ConfigError(f"node.name {node['name']!r}: letters, digits, '.', '_', '-'")
    shared = {key: dict(_table(content[key], key)) for key in content if key in _SECTIONS}
    tables = content.get("process", [])
    if not isinstance(tables, list) or not tables:
        raise ConfigError("the node file has no [[process]]", param="process")
    processes = [_process(table, node, shared, index) for index, table in enumerate(tables)]
    names = [process.name for process in processes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two processes are called {name}: give them names", param="name")
    processes.sort(key=lambda process: ROLES.index(process.role))
    return NodeFile(node["name"], node["run_dir"], node["log_dir"], tuple(processes))


def as_toml(sections: dict[str, dict[str, Any]]) -> str:
    """Settings by section as a file for --config."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        # JSON's texts, numbers and booleans are TOML's too.
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _process(
    table: object, node: dict[str, str], shared: dict[str, dict[str, Any]], index: int
) -> NodeProcess:
    where = f"process {index + 1}"
    table = _table(table, where)
    _known(table, ("role", "name", "device", *_SECTIONS), where)
    role = table.get("role")
    if role not in ROLES:
        raise ConfigError(
            f"{where}: role must be one of {', '.join(ROLES)}, not {role!r}", param="process.role"
        )
    name = table.get("name", f"{node['name']}-{role}")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{where}: name {name!r}: letters, digits, '.', '_', '-'")
    sections = _defaults(role, name, node)
    for key in _SECTIONS:
        sections.setdefault(key, {}).update(shared.get(key, {}))
        sections[key].update(_table(table.get(key, {}), f"{where}: {key}"))
    if "device" in table:
        sections["worker"]["device"] = table["device"]
    return NodeProcess(name, role, {key: value for key, value in sections.items() if value})


def _defaults(role: str, name: str, node: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the node file need not say: names, directories, addresses that other nodes reach."""
    sections: dict[str, dict[str, Any]] = {"cluster": {"run_dir": node["run_dir"]}}
    if role in ("router", "master", "kvcache"):
        sections[role] = {"name": name}
        if address := node.get("address"):
            sections[role]["bus_endpoint"] = f"tcp://{address}:0"
            if role == "router":
                sections[role]["zmq_host"] = address
            else:
                sections[role]["endpoint"] = f"tcp://{address}:0"
    return sections


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a table")
    return value


def _known(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}{near_matches(key, known)}", param=key)
