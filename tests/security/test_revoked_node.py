"""Two nodes over TCP with keys: what they listen on, and one whose key the other revokes.

Real processes, started by the node scripts; the toy engine, whose streams are known.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.cli.toy_model import expected_ids
from tests.nodes.node_scripts import pids, stopped_at_the_end
from tests.nodes.test_two_nodes import Cluster
from tests.security.listeners import tcp_listeners, udp_sockets, unix_listeners
from tests.serve.served import wait_until
from xllm.cli.keys import allow_peer, revoke_peer
from xllm.client import Client
from xllm.errors import XllmError

pytestmark = pytest.mark.process
PROMPT = (20, 30, 40, 50)


def test_a_revoked_node_is_out_until_it_is_allowed_again(run_dir, tmp_path):
    cluster = Cluster(run_dir, tmp_path)
    files = cluster.files
    keys_a = str(tmp_path / "keys-a")
    with stopped_at_the_end(files["b"], files["a"]):
        cluster.start("a")
        cluster.start("b")
        processes = {**pids(files["a"]), **pids(files["b"])}
        check_listeners(processes, cluster.zmq_port)
        address = f"tcp://127.0.0.1:{cluster.zmq_port}"
        with Client(address, server_key=cluster.router_key, keys_dir=keys_a) as client:
            wait_until(lambda: answers(client, cluster))
            assert revoke_peer(keys_a, "b") == ["b"]
            wait_until(lambda: not is_ready(client))
            assert not answers(client, cluster)
            allow_peer(keys_a, "b", cluster_key(tmp_path))
            wait_until(lambda: answers(client, cluster), 60.0)
        assert {**pids(files["a"]), **pids(files["b"])} == processes


def check_listeners(processes, zmq_port):
    """Loopback only, and one port for each socket that is reached over TCP."""
    found = tcp_listeners(processes.values())
    assert {address for address, _ in found} == {"127.0.0.1"}
    assert zmq_port in {port for _, port in found}
    # Registry; router: HTTP, clients, bus; daemon: endpoint, bus; master: routers, bus, workers.
    assert len(found) <= 9
    assert udp_sockets(processes.values()) == []
    assert all("@" not in path for path in unix_listeners(processes.values()))


def cluster_key(tmp_path):
    text = (tmp_path / "keys-b" / "node.key").read_text()
    return text.partition('public-key = "')[2][:40]


def is_ready(client):
    with contextlib.suppress(XllmError):
        return client.health(timeout_s=5.0).ready
    return True  # no answer is no proof


def answers(client, cluster):
    with contextlib.suppress(XllmError):
        answer = client.generate(PROMPT, max_tokens=8, temperature=0.0, timeout_s=2.0)
        found = tuple(answer.choices[0].token_ids)
        assert found == expected_ids(cluster.model, PROMPT, 8, temperature=0.0)
        return True
    return False
