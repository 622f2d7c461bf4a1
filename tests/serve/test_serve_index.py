"""Routers of a running service know what each instance has cached: after load, after the death of a
router and of an instance. What they know is compared with what the instances answer themselves."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request

import pytest

from tests.cli.toy_model import make_toy_model
from tests.serve.served import Served, alive, wait_until
from xllm import Client
from xllm.kvcache.hashing import HASH_BYTES
from xllm.protocol.bus import SnapshotOfBlocks
from xllm.protocol.codec import Decoder
from xllm.protocol.instance import InstanceReply, QuerySnapshot
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

pytestmark = pytest.mark.process
INSTANCES = 3
SHARED = tuple(range(70, 134))
"""A system prompt of several blocks."""


@pytest.fixture
def served(tmp_path_factory):
    model = make_toy_model(tmp_path_factory.mktemp("toy") / "toy-model")
    flags = ("--instances", str(INSTANCES), "--router-policy", "prefix-aware")
    with Served(model, f"/tmp/{tmp_path_factory.mktemp('xi').name}", *flags) as served:
        yield served
    assert served.process.returncode == 0


def figure(served, name) -> float:
    """The sum of the router's samples of a metric, of models only."""
    address = served.http.removesuffix("/v1")
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^xllm_kv_index_{name}(?:{{(.*)}})? (\S+)$", text, re.M)
    assert found, name
    return sum(float(value) for labels, value in found if 'model="-"' not in labels)


async def ask_instances(endpoints) -> list[bytes]:
    """The hashes that each instance has, from itself."""
    transport = Transport()
    answers: list[bytes] = []
    sockets = []

    def heard(message, frames) -> None:
        assert isinstance(message, SnapshotOfBlocks)
        answers.append(message.hashes)

    try:
        for endpoint in endpoints:
            decoder = Decoder[InstanceReply](InstanceReply)
            sockets.append(DealerSocket(transport, endpoint, decoder, heard))
        async with asyncio.timeout(20):
            while not all(socket.connected for socket in sockets):
                await asyncio.sleep(0.01)
            for socket in sockets:
                socket.send(QuerySnapshot())
            while len(answers) < len(sockets):
                await asyncio.sleep(0.01)
    finally:
        for socket in sockets:
            socket.close()
        transport.close()
    return answers


def cached(served) -> tuple[int, int]:
    """(distinct blocks, blocks by instance) that the instances say they have."""
    paths = [path for path in served.run_dir.rglob("*-instance") if path.is_socket()]
    assert len(paths) == INSTANCES
    found = asyncio.run(ask_instances([f"ipc://{path}" for path in paths]))
    keys = {one[at : at + 8] for one in found for at in range(0, len(one), HASH_BYTES)}
    return len(keys), sum(len(one) // HASH_BYTES for one in found)


def is_equal(served) -> bool:
    """Whether nobody is unknown and the router has as many blocks as there are. That they are the
    same ones is what the digest of each heartbeat says, or it would be unknown."""
    if figure(served, "publishers") < INSTANCES or figure(served, "unknown_publishers"):
        return False
    return (figure(served, "blocks"), figure(served, "entries")) == cached(served)


def load(served, count) -> None:
    """So many requests at once, half of them with a common beginning."""
    with Client(re.search(r"ZeroMQ\s+(\S+)", served.text)[1], timeout_s=60) as client:
        wait_until(lambda: client.health().ready, 60, "an instance")
        prompts = [
            (*(SHARED if number % 2 else ()), *range(60, 62 + number % 40), 62 + number // 40)
            for number in range(count)
        ]
        for prompt in prompts:
            done = client.generate(prompt, max_tokens=24, seed=3)
            assert len(done.token_ids) == 24


def restarted(served, kind, pid, num_ready) -> None:
    """The process is gone, and another in its place is ready."""
    wait_until(lambda: not alive([pid]), 20, "its end")
    wait_until(
        lambda: served.num_ready(kind) > num_ready,
        60,
        f"a new {kind}",
    )


def check_load(served) -> None:
    """The index is what the instances have."""
    # Until it has heard of an instance, what that stored comes as a whole, not as events.
    wait_until(lambda: is_equal(served), 30, "a router that hears all instances")
    load(served, 80)
    wait_until(lambda: is_equal(served), 30, "no divergence after load")
    assert figure(served, "blocks") > 80
    assert figure(served, "events_total") > 80
    assert figure(served, "digest_mismatches_total") == 0
    # What was promised was there, but for the last block of a prompt that is cached as a whole.
    promised, found = figure(served, "promised_tokens_total"), figure(served, "found_tokens_total")
    assert figure(served, "promises_total") >= 80
    assert promised > 0
    assert found > 0
    assert figure(served, "broken_promises_total") == 0


def check_router(served) -> None:
    """A router that is killed comes back with an equal index."""
    load(served, 20)
    before = cached(served)
    assert before[0] > 20
    pid = served.child("router")
    num_ready = served.num_ready("router")
    os.kill(pid, signal.SIGKILL)
    restarted(served, "router", pid, num_ready)
    wait_until(lambda: is_equal(served), 30, "no divergence of the new router")
    assert figure(served, "resyncs_total") >= INSTANCES
    assert cached(served) == before
    load(served, 20)
    wait_until(lambda: is_equal(served), 30, "no divergence after more load")
    assert figure(served, "digest_mismatches_total") == 0


def check_instance(served) -> None:
    """An instance that is killed takes its blocks along and begins anew."""
    load(served, 20)
    wait_until(lambda: is_equal(served), 30, "no divergence before")
    before = figure(served, "entries")
    pid = served.child("master")
    num_ready = served.num_ready("master")
    os.kill(pid, signal.SIGKILL)
    restarted(served, "master", pid, num_ready)
    wait_until(lambda: is_equal(served), 30, "no divergence after the instance's end")
    assert figure(served, "entries") < before
    load(served, 40)
    wait_until(lambda: is_equal(served), 30, "no divergence after more load")


def test_the_index_is_what_the_instances_have_whoever_dies(served):
    """One service for all of it: a start takes longer than the rest."""
    check_load(served)
    check_router(served)
    check_instance(served)
