"""Settings: where values come from, which refuse to start, and that every field is described."""

from __future__ import annotations

import pytest

from xllm.config.load import decode_settings, encode_settings, load
from xllm.config.settings import Settings
from xllm.config.table import build_settings, setting_table
from xllm.errors import ConfigError


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "xllm.toml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_the_dataclasses_own():
    assert load({}, None, {}) == Settings()


def test_flags_win_over_file_and_file_over_variables(config_file):
    path = config_file("[router]\nport = 2\nzmq_port = 2\n")
    environ = {"XLLM_ROUTER_PORT": "1", "XLLM_ROUTER_ZMQ_PORT": "1", "XLLM_SERVE_INSTANCES": "3"}
    settings = load({"router.port": 4}, path, environ)
    assert (settings.router.port, settings.router.zmq_port) == (4, 2)
    assert settings.serve.instances == 3


def test_file_named_by_a_variable(config_file):
    path = config_file('[model]\nname = "m"\n')
    assert load({}, None, {"XLLM_CONFIG": path}).model.name == "m"


def test_other_variables_are_not_ours():
    assert load({}, None, {"HOME": "/x", "XLLMX": "1", "XLLM_TORCH": "torch"}) == Settings()


def test_a_commands_own_defaults_lose_against_everything():
    own = {"cluster.log_level": "warning"}
    assert load({}, None, {}, defaults=own).cluster.log_level == "warning"
    environ = {"XLLM_CLUSTER_LOG_LEVEL": "debug"}
    assert load({}, None, environ, defaults=own).cluster.log_level == "debug"


@pytest.mark.parametrize(
    ("flags", "text", "environ", "words"),
    [
        ({"router.prot": 1}, "", {}, ["router.prot", "router.port"]),
        ({}, "[router]\nprot = 1\n", {}, ["router.prot", "router.port"]),
        ({}, "[ruter]\nport = 1\n", {}, ["ruter", "router"]),
        ({}, "port = 1\n", {}, ["port"]),
        ({}, "", {"XLLM_ROUTER_PROT": "1"}, ["XLLM_ROUTER_PROT", "XLLM_ROUTER_PORT"]),
        ({"router.port": "x"}, "", {}, ["router.port", "flag", "whole number"]),
        ({"router.port": True}, "", {}, ["router.port"]),
        ({}, '[router]\nport = "1"\n', {}, ["router.port", "whole number, not '1'"]),
        ({}, "[router]\nport = 1.5\n", {}, ["router.port"]),
        ({}, "", {"XLLM_ROUTER_PORT": "70000"}, ["router.port", "65535", "70000"]),
        ({"serve.instances": 0}, "", {}, ["serve.instances", "at least 1"]),
        ({"cluster.heartbeat_s": float("nan")}, "", {}, ["cluster.heartbeat_s"]),
        ({"worker.engine": "fast"}, "", {}, ["worker.engine", "native", "toy", "fast"]),
        ({"worker.block_size": 24}, "", {}, ["worker.block_size", "power of two"]),
        ({}, "[router\n", {}, ["TOML"]),
        ({"master.name": "a/b"}, "", {}, ["master.name", "'a/b'", "64 letters"]),
        ({"kvcache.name": "-a"}, "", {}, ["kvcache.name", "a letter or a digit"]),
        ({}, "[router]\nname = 'a b'\n", {}, ["router.name"]),
        ({}, "", {"XLLM_CLUSTER_NAME": ""}, ["cluster.name"]),
        ({"cluster.name": "c" * 65}, "", {}, ["cluster.name"]),
    ],
)
def test_refusals_name_the_setting_and_the_bound(flags, text, environ, words, config_file):
    path = config_file(text)
    with pytest.raises(ConfigError) as caught:
        load(flags, path, environ)
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match="cannot read"):
        load({}, "/nowhere/xllm.toml", {})


@pytest.mark.parametrize(
    ("text", "value"), [("64MiB", 64 << 20), ("2g", 2 << 30), ("1048576", 1 << 20)]
)
def test_sizes_may_have_a_unit(text, value):
    assert load({"kvcache.dram_bytes": text}, None, {}).kvcache.dram_bytes == value


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("FALSE", False), ("1", True), ("no", False)]
)
def test_words_for_booleans(text, value):
    settings = load({}, None, {"XLLM_SERVE_KVCACHE": text})
    assert settings.serve.kvcache is value


def test_settings_survive_their_bytes():
    settings = load({"router.port": 4, "cluster.heartbeat_s": 1, "model.path": "ü"}, None, {})
    assert decode_settings(encode_settings(settings)) == settings


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80" * 2, b"\x81\xa5model\x01"])
def test_other_bytes_are_no_settings(data):
    with pytest.raises(ConfigError):
        decode_settings(data)


@pytest.mark.parametrize("entry", setting_table().values(), ids=lambda entry: entry.key)
def test_every_setting_is_described(entry):
    assert entry.type in (str, int, float, bool)
    assert type(entry.default) is entry.type
    assert entry.info.doc.strip().endswith(".")
    assert len(entry.info.doc) >= 10
    unit_of = {"_s": "s", "_ms": "ms", "_bytes": "bytes", "_tokens": "tokens"}
    for suffix, unit in unit_of.items():
        if entry.name.endswith(suffix):
            assert entry.info.unit == unit
    if entry.type in (int, float):
        assert entry.info.low is not None
        assert entry.default >= entry.info.low


def test_the_table_builds_what_it_describes():
    values = {key: entry.default for key, entry in setting_table().items()}
    assert build_settings(values) == Settings()
