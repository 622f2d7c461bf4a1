"""`xllm serve` on a real etcd that is killed, frozen, cut off and compacted under load.

All of it goes on serving; what changed meanwhile is known soon after.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import pytest

from tests.cli.toy_model import make_toy_model
from tests.free_ports import free_ports
from tests.registry.etcd_server import one_etcd
from tests.registry.tcp_proxy import TcpProxy
from tests.serve.served import Served, alive, wait_until
from tests.serve.stream_load import StreamLoad
from xllm import Client
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.records import InstanceRecord
from xllm.protocol.registry.etcd import EtcdRegistry
from xllm.protocol.registry.etcd_address import parse_etcd_address

# Not marked as `process`: one test has a child of the service replaced, which is no leak of the
# test. The service's end is checked where it ends.
pytestmark = pytest.mark.etcd

SILENT = "the registry does not answer"
MAX_VALUE_BYTES = 4096


class ProxyThread:
    """A TcpProxy in a loop and thread of its own."""

    def __init__(self, target: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.proxy = TcpProxy(target)
        self.endpoint = self.run(self.proxy.start())

    def run(self, coroutine):
        """What a coroutine gives there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def do(self, call) -> None:
        """Call something there."""

        async def main():
            call()

        self.run(main())

    def close(self) -> None:
        """The end."""
        self.run(self.proxy.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with one_etcd(tmp_path_factory.mktemp("etcd")) as member:
        yield member


@pytest.fixture(scope="module")
def proxy(server):
    thread = ProxyThread(server.endpoint)
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def served(model, proxy):
    flags = ("--instances", "2", "--worker-toy-step-ms", "10")
    run_dir = tempfile.mkdtemp(prefix="xe-", dir="/tmp")
    address = f"etcd://{proxy.endpoint}"
    with Served(model, run_dir, "--cluster-registry", address, *flags) as served:
        yield served
        family = served.family()
    assert served.process.returncode == 0, served.text
    wait_until(lambda: not alive(family), 20, "the end of all processes")
    served.run_dir.rmdir()


@pytest.fixture
def client(served):
    with Client(served.zmq, timeout_s=30) as client:
        yield client


def instances(client):
    """Incarnation of each instance that is ready, by name."""
    return {
        one.name: one.incarnation
        for one in client.status()
        if one.kind == "instance" and one.state == "ready"
    }


def registered(server):
    """Incarnation of each instance in etcd, by name."""
    done = server.ctl("get", "--prefix", "/xllm/default/instances/", "-w", "json")
    decoder = Decoder(InstanceRecord)
    records = [decoder.decode(value) for _, value in keys_of(done.stdout)]
    return {one.name: one.incarnation for one in records}


def keys_of(text):
    """(key, value) of each line of etcdctl's JSON."""
    kvs = json.loads(text).get("kvs", [])
    return [(base64.b64decode(kv["key"]), base64.b64decode(kv.get("value", ""))) for kv in kvs]


def wait_equal(server, client):
    """Until the router sees those who are registered, two of them."""

    def equal():
        seen = instances(client)
        return len(seen) == 2 and seen == registered(server)

    wait_until(equal, 60, "equal memberships")


def wait_degraded(client, degraded: bool):
    wait_until(lambda: (SILENT in client.health().degraded) == degraded, 60, f"{degraded=}")


def test_what_is_written_and_how_much(served, server, client, model):
    wait_equal(server, client)
    with StreamLoad(served.zmq, model) as load:
        load.wait_done()
        began, before = time.monotonic(), server.revision()
        wait_until(lambda: time.monotonic() - began > 4.0)
        load.wait_done()
        num_writes = server.revision() - before
        took_s = time.monotonic() - began
    entries = keys_of(server.ctl("get", "", "--prefix", "-w", "json").stdout)
    kinds = {key.split(b"/")[3] for key, _ in entries}
    assert {b"instances", b"routers", b"daemons", b"leader"} <= kinds
    assert all(key.startswith(b"/xllm/default/") for key, _ in entries)
    assert max(len(value) for _, value in entries) <= MAX_VALUE_BYTES
    num_processes = sum(one.kind != "worker" for one in client.status())
    assert num_writes <= num_processes * took_s


def test_etcd_is_killed_and_comes_back(served, server, client, model):
    before = instances(client)
    with StreamLoad(served.zmq, model) as load:
        server.kill()
        wait_degraded(client, True)
        assert instances(client) == before
        load.wait_done(16)
        server.start()
        server.wait_ready()
        wait_equal(server, client)
        wait_degraded(client, False)
        load.wait_done()
    assert instances(client) == before


def freeze(served, server, client, model, seconds):
    before = instances(client)
    with StreamLoad(served.zmq, model) as load:
        server.freeze()
        began = time.monotonic()
        wait_degraded(client, True)
        load.wait_done(16)
        wait_until(lambda: time.monotonic() - began > seconds, seconds + 5)
        assert instances(client) == before
        assert server.state() == "T"
        server.thaw()
        wait_degraded(client, False)
        wait_equal(server, client)
        load.wait_done(16)
    assert instances(client) == before


def test_etcd_freezes_for_longer_than_the_leases(served, server, client, model):
    freeze(served, server, client, model, 7.0)


@pytest.mark.slow
def test_etcd_freezes_for_half_a_minute(served, server, client, model):
    freeze(served, server, client, model, 30.0)


def die_and_join(served, server, client, model, seconds):
    before = instances(client)
    with StreamLoad(served.zmq, model) as load:
        server.kill()
        began = time.monotonic()
        wait_degraded(client, True)
        pid = served.child("master")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(instances(client)) == 1, 60, "the end of the dead")
        assert not alive([pid])
        wait_until(lambda: served.child("master") != pid, 60, "its successor")
        load.wait_done(16)
        wait_until(lambda: time.monotonic() - began > seconds, seconds + 5)
        assert len(instances(client)) == 1
        server.start()
        server.wait_ready()
        wait_equal(server, client)
        load.wait_done()
    after = instances(client)
    assert set(after) == set(before)
    assert sum(after[name] != before[name] for name in before) == 1


def test_an_instance_dies_and_another_starts_without_etcd(served, server, client, model):
    die_and_join(served, server, client, model, 3.0)


@pytest.mark.slow
def test_an_instance_dies_and_another_starts_in_a_minute_without_etcd(
    served, server, client, model
):
    die_and_join(served, server, client, model, 60.0)


async def register_ghost(server):
    """Write the record of an instance that is not there, twice."""
    registry = EtcdRegistry(parse_etcd_address(server.address))
    where = "tcp://127.0.0.1:1"
    for incarnation in ("one", "two"):
        record = InstanceRecord("ghost", incarnation, where, where, "m", "m", 1, 1, 16, 1)
        await registry.put("/xllm/default/instances/ghost", encode(record))
    await registry.close()


def test_a_compaction_while_everybody_was_cut_off(served, server, proxy, client, model):
    before = instances(client)
    with StreamLoad(served.zmq, model) as load:
        proxy.do(proxy.proxy.blackhole)
        wait_degraded(client, True)
        asyncio.run(register_ghost(server))
        server.ctl("compact", str(server.revision()))
        load.wait_done(16)
        proxy.do(proxy.proxy.heal)
        wait_degraded(client, False)
        wait_until(lambda: "ghost" in {one.name for one in client.status()}, 60, "the news")
        load.wait_done()
    server.ctl("del", "/xllm/default/instances/ghost")
    assert instances(client) == before


def test_health_over_http_stays_ready(served, server, client):
    address = served.http.removesuffix("/v1")
    server.freeze()
    try:
        wait_degraded(client, True)
        with urllib.request.urlopen(f"{address}/health/ready", timeout=10) as response:
            assert response.status == 200
            assert SILENT in json.load(response)["degraded"]
    finally:
        server.thaw()
    wait_degraded(client, False)


@pytest.mark.parametrize("role", ["router", "kvcache"])
def test_without_etcd_a_process_ends_with_a_clear_line(model, run_dir, role):
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "xllm", role, "--registry", f"etcd://127.0.0.1:{port}"]
    command += ["--cluster-registry-wait-s", "0.5", "--cluster-run-dir", str(run_dir)]
    command += ["--cluster-log-dir", str(run_dir / "logs")]
    if role == "router":
        command += ["--model", model, "--port", "0", "--zmq-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 69, done.stderr
    assert done.stderr.splitlines() == [
        f"xllm: the registry at etcd://127.0.0.1:{port} did not answer in 0.5 s"
    ]
