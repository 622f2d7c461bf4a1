"""One instance whose two ranks are on two "nodes": run directories, keys and processes of their
own, everything started by the node scripts, over TCP with CURVE."""

from __future__ import annotations

import os
import signal

import pytest

from tests.fixtures.models import make_model
from tests.free_ports import free_port
from tests.nodes.node_scripts import (
    logs,
    pids,
    run_script,
    stopped_at_the_end,
    wait_until,
)
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from xllm.client import Client
from xllm.protocol.transport.security import create_keys

pytestmark = pytest.mark.process

NUM_TOKENS = 16
START_S = 90.0

SHARED = """
[node]
name = "{node}"
address = "127.0.0.1"
run_dir = "{run_dir}"
log_dir = "{log_dir}"
[cluster]
registry = "tcp://127.0.0.1:{registry_port};key={key_a}"
keys_dir = "{keys_dir}"
heartbeat_s = 0.05
shutdown_s = 5.0
[model]
path = "{model}"
name = "tiny"
[worker]
device = "cpu"
num_threads = 1
kv_cache_bytes = 4194304
collective_host = "127.0.0.1"
"""

NODES = {
    "a": """
[[process]]
role = "registry"
[[process]]
role = "router"
[process.router]
port = 0
zmq_port = {zmq_port}
zmq_host = "127.0.0.1"
""",
    "b": """
[master]
num_workers = 2
spawn_workers = false
worker_endpoint = "tcp://127.0.0.1:{worker_port}"
[[process]]
role = "master"
[[process]]
role = "worker"
[process.worker]
rank = 0
""",
    "c": """
[master]
num_workers = 2
spawn_workers = false
worker_endpoint = "tcp://127.0.0.1:{worker_port};key={key_b}"
[[process]]
role = "worker"
[process.worker]
rank = 1
""",
}


class RankNodes:
    """The three node files: a router's, and those of an instance's two halves."""

    def __init__(self, run_dir, tmp_path):
        self.model = make_model("qwen3", tmp_path / "model")
        self.keys_dir = str(tmp_path / "keys-a")
        self.keys = {name: create_keys(str(tmp_path / f"keys-{name}")) for name in NODES}
        for mine in NODES:
            for other in NODES:
                if other != mine:
                    done = run_script(
                        "keys", "allow", tmp_path / f"keys-{mine}", other, self.keys[other]
                    )
                    assert done.returncode == 0, done.stderr
        self.zmq_port = free_port()
        ports = {
            "zmq_port": self.zmq_port,
            "registry_port": free_port(),
            "worker_port": free_port(),
        }
        self.files = {}
        for name, text in NODES.items():
            self.files[name] = tmp_path / f"{name}.toml"
            self.files[name].write_text(
                (SHARED + text).format(
                    node=name,
                    run_dir=run_dir / name,
                    log_dir=tmp_path / f"log-{name}",
                    keys_dir=tmp_path / f"keys-{name}",
                    key_a=self.keys["a"],
                    key_b=self.keys["b"],
                    model=self.model,
                    **ports,
                )
            )

    def start(self, name):
        done = run_script("node-start", self.files[name], "--timeout", 50)
        assert done.returncode == 0, done.stderr + logs(self.files[name])
        return done.stdout

    def generate(self, prompt):
        address = f"tcp://127.0.0.1:{self.zmq_port}"
        with Client(address, server_key=self.keys["a"], keys_dir=self.keys_dir) as client:
            wait_until(lambda: client.health().ready, START_S)
            answer = client.generate(
                tuple(prompt),
                max_tokens=NUM_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                timeout_s=START_S,
            )
        return list(answer.choices[0].token_ids)


def one_rank_tokens(directory, prompt):
    driver = PlanDriver(directory)
    job = driver.job(prompt, NUM_TOKENS)
    driver.generate([job])
    driver.executor.close()
    return job.output


def test_an_instance_over_two_nodes(run_dir, tmp_path):
    nodes = RankNodes(run_dir, tmp_path)
    files = nodes.files
    (prompt,) = random_prompts(1, 40, 40)
    expected = one_rank_tokens(nodes.model, prompt)
    with stopped_at_the_end(files["b"], files["c"], files["a"]):
        nodes.start("a")
        assert "c-worker: loaded" in nodes.start("c")  # it waits for its master
        lines = nodes.start("b").splitlines()
        assert [line.split(":")[0] for line in lines] == ["b-worker", "b-master"]
        assert nodes.generate(prompt) == expected
        # A node's rank may die; the other one waits for it, with what it has loaded.
        before = pids(files["b"])
        os.kill(pids(files["c"])["c-worker"], signal.SIGKILL)
        wait_until(lambda: not pids(files["c"])["c-worker"])
        nodes.start("c")
        assert nodes.generate(prompt) == expected
        assert pids(files["b"]) == before
        for name in "bca":
            stopped = run_script("node-stop", files[name])
            assert stopped.returncode == 0
            assert "killed" not in stopped.stdout, stopped.stdout + logs(files[name])
            assert os.listdir(run_dir / name) == []
