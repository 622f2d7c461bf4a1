"""Where sockets may listen: taken, stale, impossible and forbidden addresses."""

import os
import socket as sockets

import pytest

from tests.protocol.socket_pairs import BOTH, echo_pair, run, until
from xllm.errors import BrokenError, ClosedError, ConfigError, ListenError, NameTakenError
from xllm.protocol.generation import AbortRequest
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket
from xllm.protocol.transport.endpoint import own_endpoint
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket


def test_ipv6_loopback_can_be_bound():
    async def main():
        transport = Transport()
        router, dealer, got = echo_pair(transport, "tcp://[::1]:0")
        dealer.send(AbortRequest(id=1))
        await until(lambda: got)
        for thing in (dealer, router, transport):
            thing.close()

    if not sockets.has_ipv6:
        pytest.skip("no IPv6 here")
    run(main())


def test_an_ipc_path_cannot_be_stolen_and_a_stale_one_is_taken_over(tmp_path):
    async def main():
        transport = Transport()
        path = f"ipc://{tmp_path}/s"
        (tmp_path / "s").touch()  # what a killed process left
        (tmp_path / "s.lock").touch()
        router = RouterSocket(transport, path, BOTH, lambda i, m, f: None)
        with pytest.raises(NameTakenError, match=f"in use by process {os.getpid()}:") as caught:
            RouterSocket(transport, path, BOTH, lambda i, m, f: None)
        assert str(caught.value).endswith(f"another directory than {tmp_path}")
        router.close()
        assert os.listdir(tmp_path) == []
        transport.close()

    run(main())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.1:0"])
def test_other_machines_need_keys(address):
    async def main():
        transport = Transport()
        with pytest.raises(ConfigError, match="keys"):
            RouterSocket(transport, address, BOTH, lambda i, m, f: None)
        with pytest.raises(BrokenError, match="key"):
            DealerSocket(transport, "tcp://192.0.2.1:9", BOTH, lambda m, f: None)
        with pytest.raises(ConfigError, match="characters"):
            RouterSocket(transport, "ipc:///tmp/" + "x" * 120, BOTH, lambda i, m, f: None)
        transport.close()
        with pytest.raises(ClosedError):
            PublisherSocket(transport, "inproc://x")

    run(main())


def test_a_taken_port_is_one_clear_error():
    async def main():
        transport = Transport()
        with sockets.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ListenError, match="cannot listen") as caught:
                PublisherSocket(transport, f"tcp://127.0.0.1:{port}")
            assert caught.value.exit_code == 71
            with pytest.raises(ListenError, match="cannot listen"):
                PublisherSocket(transport, "ipc:///nowhere/at/all")
        transport.close()

    run(main())


def test_a_socket_lies_in_the_run_directory_unless_its_endpoint_is_configured():
    assert own_endpoint("tcp://127.0.0.1:5", "/run/x", "a-bus") == "tcp://127.0.0.1:5"
    assert own_endpoint("", "/run/x", "a-bus") == "ipc:///run/x/a-bus"
    with pytest.raises(ConfigError, match=r"a-bus has no endpoint, and cluster\.run_dir"):
        own_endpoint("", "", "a-bus")
