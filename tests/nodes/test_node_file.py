"""The node file: what it says becomes checked settings of each process."""

from __future__ import annotations

import tomllib

import pytest

from tests.architecture.sources import ROOT
from xllm.cli.main import run_command
from xllm.cli.node_file import ROLES, as_toml, parse_node, read_node_file
from xllm.config.load import load
from xllm.errors import ConfigError

NODE = """
[node]
name = "a"
run_dir = "/run/a"
log_dir = "/log"
{address}
[cluster]
registry = "tcp://127.0.0.1:2400"
[worker]
engine = "toy"
[[process]]
role = "router"
[process.router]
port = 1234
[[process]]
role = "registry"
[[process]]
role = "master"
device = "cpu"
[process.worker]
toy_step_ms = 1.5
"""


def parsed(text, address=""):
    return parse_node(tomllib.loads(text.format(address=address)))


def settings_of(process, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(as_toml(process.sections))
    return load({}, str(path), {})


def test_processes_are_ordered_named_and_configured(tmp_path):
    node = parsed(NODE)
    assert [(p.name, p.role) for p in node.processes] == [
        ("a-registry", "registry"),
        ("a-master", "master"),
        ("a-router", "router"),
    ]
    router = settings_of(node.processes[2], tmp_path)
    assert (router.router.name, router.router.port) == ("a-router", 1234)
    assert router.cluster.registry == "tcp://127.0.0.1:2400"
    assert router.cluster.run_dir == "/run/a"
    assert router.router.bus_endpoint == ""
    master = settings_of(node.processes[1], tmp_path)
    assert (master.worker.engine, master.worker.device) == ("toy", "cpu")
    assert master.worker.toy_step_ms == 1.5
    assert router.worker.toy_step_ms == 0.0


def test_an_address_opens_what_other_nodes_need(tmp_path):
    node = parsed(NODE, 'address = "127.0.0.1"')
    master = settings_of(node.processes[1], tmp_path).master
    assert master.endpoint == master.bus_endpoint == "tcp://127.0.0.1:0"
    assert master.worker_endpoint == ""
    assert settings_of(node.processes[2], tmp_path).router.zmq_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("[node]", "[nodes]"), "nodes"),
        (('name = "a"', ""), "node.name"),
        (('name = "a"', 'name = "a/b"'), "node.name"),
        (('name = "a"', "name = 5"), "node.name"),
        (('role = "router"', 'role = "rooter"'), "role"),
        (('role = "registry"', 'role = "router"'), "two processes"),
        (("device", "devise"), "did you mean device"),
        (("[process.worker]", "[process.wörker]"), "wörker"),
        (("[worker]", "[[worker]]"), "worker"),
    ],
)
def test_mistakes_are_named(change, word):
    text = NODE.replace(*change, 1)
    if "ö" in text:
        text = NODE.replace("[process.worker]", '[process."wörker"]')
    with pytest.raises(ConfigError, match=word):
        parsed(text)


def test_a_file_that_is_not_there_or_no_toml(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_node_file(str(tmp_path / "none"))
    path = tmp_path / "bad"
    path.write_text("= = =")
    with pytest.raises(ConfigError, match=str(path)):
        read_node_file(str(path))
    path.write_text(NODE.format(address="").replace('"router"', '"rooter"', 1))
    with pytest.raises(ConfigError, match=f"{path}: process 1: role must be .*, not 'rooter'"):
        read_node_file(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("port = 1234", 'port = "a"'), "router.port (FILE) must be a whole number, not 'a'"),
        (("port = 1234", "port = 70000"), "router.port (FILE) must be at most 65535"),
        (("port = 1234", "prot = 1"), "FILE: unknown setting router.prot"),
        (('registry = "tcp://127.0.0.1:2400"', ""), "FILE: [cluster] registry is missing"),
        (("port = 1234", 'name = "a/b"'), "FILE: router.name 'a/b'"),
    ],
)
def test_a_setting_that_a_process_would_refuse_is_told_of_the_users_file(
    tmp_path, capsys, change, words
):
    text = NODE.format(address="").replace(*change, 1)
    text = text[: text.index('[[process]]\nrole = "registry"')]
    path = tmp_path / "node.toml"
    path.write_text(text.replace("/run/a", f"{tmp_path}/r").replace("/log", f"{tmp_path}/l"))
    assert run_command(["node", "start", str(path)]) == 64
    assert words.replace("FILE", f"{path}, process a-router") in capsys.readouterr().err


def test_texts_survive_the_way_to_the_processes(tmp_path):
    odd = 'quo"te \\ back\nline é ☃'
    path = tmp_path / "x.toml"
    path.write_text(as_toml({"model": {"path": odd}, "cluster": {"name": "c"}}), encoding="utf-8")
    assert tomllib.loads(path.read_text(encoding="utf-8"))["model"]["path"] == odd


def test_the_example_is_a_node_file(tmp_path):
    node = read_node_file(str(ROOT / "scripts" / "node-example.toml"))
    assert {process.role for process in node.processes} == set(ROLES) - {"worker"}
    for process in node.processes:
        assert settings_of(process, tmp_path).cluster.registry == "tcp://10.0.0.1:2400"
