"""A cluster of two "nodes" on this machine, made by the scripts alone, over TCP with keys.

Node A has the registry, a router and a KV cache daemon; node B a master and its worker (the toy
engine, whose streams are known).
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.cli.toy_model import expected_ids, make_toy_model
from tests.free_ports import free_port
from tests.nodes.node_scripts import (
    logs,
    pids,
    run_script,
    stopped_at_the_end,
    wait_until,
)
from xllm.client import Client
from xllm.protocol.transport.security import create_keys

pytestmark = pytest.mark.process

SHARED = """
[node]
name = "{node}"
address = "127.0.0.1"
run_dir = "{run_dir}"
log_dir = "{log_dir}"
[cluster]
name = "two"
registry = "tcp://127.0.0.1:{port};key={key}"
keys_dir = "{keys_dir}"
heartbeat_s = 0.05
shutdown_s = 5.0
[model]
path = "{model}"
name = "toy"
"""

NODE_A = """
[[process]]
role = "registry"
[[process]]
role = "router"
[process.router]
port = 0
zmq_port = {zmq_port}
zmq_host = "127.0.0.1"
[[process]]
role = "kvcache"
[process.kvcache]
dram_bytes = 1048576
"""

NODE_B = """
[worker]
engine = "toy"
[[process]]
role = "master"
device = "cpu"
"""


class Cluster:
    """The two node files and what goes into them."""

    def __init__(self, run_dir, tmp_path):
        self.model = make_toy_model(tmp_path / "model")
        self.zmq_port, port = free_port(), free_port()
        keys = {name: create_keys(str(tmp_path / f"keys-{name}")) for name in "ab"}
        for mine, other in ("ab", "ba"):
            done = run_script("keys", "allow", tmp_path / f"keys-{mine}", other, keys[other])
            assert done.returncode == 0, done.stderr
        self.router_key = keys["a"]
        self.keys_dir = str(tmp_path / "keys-b")
        self.files = {}
        for name, text in (("a", NODE_A), ("b", NODE_B)):
            shared = SHARED.format(
                node=name,
                run_dir=run_dir / name,
                log_dir=tmp_path / f"log-{name}",
                port=port,
                key=keys["a"],
                keys_dir=tmp_path / f"keys-{name}",
                model=self.model,
            )
            file = tmp_path / f"{name}.toml"
            file.write_text(shared + text.format(zmq_port=self.zmq_port))
            self.files[name] = file

    def start(self, name):
        done = run_script("node-start", self.files[name], "--timeout", 20)
        assert done.returncode == 0, done.stderr + logs(self.files[name])

    def client(self):
        return Client(
            f"tcp://127.0.0.1:{self.zmq_port}", server_key=self.router_key, keys_dir=self.keys_dir
        )

    def check_an_answer(self):
        prompt = (20, 30, 40, 50)
        with self.client() as client:
            wait_until(lambda: client.health().ready, 20.0)
            answer = client.generate(prompt, max_tokens=20, temperature=0.0, timeout_s=20.0)
        assert tuple(answer.choices[0].token_ids) == expected_ids(
            self.model, prompt, 20, temperature=0.0
        )


def test_two_nodes_serve_together_and_stop_cleanly(run_dir, tmp_path):
    cluster = Cluster(run_dir, tmp_path)
    files = cluster.files
    with stopped_at_the_end(files["b"], files["a"]):
        cluster.start("a")
        cluster.start("b")
        cluster.check_an_answer()
        # A node may leave and come back.
        stopped = run_script("node-stop", files["b"])
        assert "b-master: stopped" in stopped.stdout
        cluster.start("b")
        cluster.check_an_answer()
        # The registry may die: what is known goes on, and comes back with it.
        os.kill(pids(files["a"])["a-registry"], signal.SIGKILL)
        wait_until(lambda: not pids(files["a"])["a-registry"])
        cluster.check_an_answer()
        cluster.start("a")
        cluster.check_an_answer()
        for name in "ba":
            stopped = run_script("node-stop", files[name])
            assert stopped.returncode == 0
            assert "killed" not in stopped.stdout, stopped.stdout + logs(files[name])
            assert set(pids(files[name]).values()) == {0}
            assert os.listdir(run_dir / name) == []
