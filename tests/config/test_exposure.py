"""What may listen where without keys."""

from __future__ import annotations

import pytest

from xllm.config.exposure import check_exposure, is_local_endpoint, is_loopback
from xllm.config.load import load
from xllm.errors import ConfigError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "", "10.0.0.1", "example.org", "127.1"])
def test_beyond_loopback(host):
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("", True),
        ("ipc:///x/y", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://*:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://10.0.0.1:5", False),
    ],
)
def test_endpoints(endpoint, local):
    assert is_local_endpoint(endpoint) is local


@pytest.mark.parametrize(
    "flags",
    [
        {"router.host": "0.0.0.0"},
        {"router.zmq_host": "10.1.2.3"},
        {"router.zmq_host": "10.1.2.3", "router.api_key_file": "keys"},
        {"master.endpoint": "tcp://*:7"},
    ],
)
def test_refused_without_protection(flags):
    with pytest.raises(ConfigError, match="beyond loopback"):
        check_exposure(load(flags, None, {}))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"router.host": "0.0.0.0", "router.api_key_file": "keys"},
        {"router.zmq_host": "10.1.2.3", "cluster.keys_dir": "keys"},
    ],
)
def test_allowed(flags):
    check_exposure(load(flags, None, {}))
