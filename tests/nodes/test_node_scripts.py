"""The node scripts on a node without models: registry and KV cache daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import pytest

from tests.free_ports import free_port
from tests.nodes.node_scripts import pids, run_script, stopped_at_the_end, wait_until
from tests.registry.etcd_server import one_etcd
from xllm.protocol.codec import Decoder
from xllm.protocol.records import DaemonRecord
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.security import Security, create_keys

pytestmark = pytest.mark.process

NODE = """
[node]
name = "n"
run_dir = "{run_dir}"
log_dir = "{log_dir}"
address = "127.0.0.1"
[cluster]
registry = "tcp://127.0.0.1:{port}"
shutdown_s = 3.0
{more}
[[process]]
role = "kvcache"
[process.kvcache]
dram_bytes = 1048576
[[process]]
role = "registry"
"""


def write_node(run_dir, tmp_path, more=""):
    port = free_port()
    file = tmp_path / "node.toml"
    text = NODE.format(run_dir=run_dir / "run", log_dir=tmp_path / "log", port=port, more=more)
    file.write_text(text)
    return file, port


def daemon_record(port, security=None):
    async def main():
        transport = Transport(security)
        registry = open_registry(f"tcp://127.0.0.1:{port}", transport, timeout_s=5.0)
        entry = await registry.get("/xllm/default/daemons/n-kvcache")
        await registry.close()
        transport.close()
        return Decoder(DaemonRecord).decode(entry.value) if entry else None

    return asyncio.run(main())


def test_start_status_stop(run_dir, tmp_path):
    file, port = write_node(run_dir, tmp_path)
    with stopped_at_the_end(file):
        done = run_script("node-start", file)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split(":")[0] for line in lines] == ["n-registry", "n-kvcache"]
        assert all("listens (pid " in line for line in lines)
        assert daemon_record(port).endpoint.startswith("tcp://127.0.0.1:")
        assert os.stat(run_dir / "run").st_mode & 0o777 == 0o700
        before = pids(file)
        again = run_script("node-start", file)
        assert again.stdout.count("runs already") == 2
        assert pids(file) == before
        text = file.read_text()
        file.write_text(text.replace("shutdown_s = 3.0", "shutdown_s = 4.0"))
        changed = run_script("node-start", file)
        assert (changed.returncode, changed.stdout) == (64, "")
        assert changed.stderr.count("runs with other settings: cluster.shutdown_s") == 2
        file.write_text(text)
        assert pids(file) == before
        status = run_script("node-status", file)
        assert (status.returncode, status.stdout.count("runs (pid ")) == (0, 2)
        stopped = run_script("node-stop", file)
        assert (stopped.returncode, stopped.stdout.count(": stopped")) == (0, 2)
        assert stopped.stdout.splitlines()[-1].startswith("n-registry")
        status = run_script("node-status", file)
        assert (status.returncode, status.stdout.count("does not run")) == (3, 2)
        assert os.listdir(run_dir / "run") == []
        assert (tmp_path / "log" / "n-kvcache.log").read_text()


def test_a_process_that_died_is_told_and_started_again(run_dir, tmp_path):
    file, port = write_node(run_dir, tmp_path)
    with stopped_at_the_end(file):
        assert run_script("node-start", file).returncode == 0
        before = pids(file)
        os.kill(before["n-kvcache"], signal.SIGKILL)
        wait_until(lambda: not pids(file)["n-kvcache"])
        status = run_script("node-status", file)
        assert status.returncode == 3
        assert "n-kvcache: does not run (it ended on its own)" in status.stdout
        assert run_script("node-start", file).returncode == 0
        after = pids(file)
        assert after["n-registry"] == before["n-registry"]
        assert after["n-kvcache"] not in (0, before["n-kvcache"])
        assert daemon_record(port)


def test_a_process_that_does_not_end_is_killed(run_dir, tmp_path):
    file, _ = write_node(run_dir, tmp_path, more="")
    file.write_text(file.read_text().replace("shutdown_s = 3.0", "shutdown_s = 0.0"))
    with stopped_at_the_end(file):
        assert run_script("node-start", file).returncode == 0
        frozen = pids(file)["n-kvcache"]
        os.kill(frozen, signal.SIGSTOP)
        stopped = run_script("node-stop", file)
        assert "n-kvcache: killed after" in stopped.stdout
        assert "n-registry: stopped" in stopped.stdout
        assert set(pids(file).values()) == {0}


def test_a_stale_pid_file_signals_nobody(run_dir, tmp_path):
    file, _ = write_node(run_dir, tmp_path)
    (run_dir / "run").mkdir(mode=0o700)
    # Our own pid with another start time: a number that was given away again.
    (run_dir / "run" / "n-kvcache.pid").write_text(f"{os.getpid()} 12345\n")
    stopped = run_script("node-stop", file)
    assert stopped.returncode == 0
    assert stopped.stdout.count("was not running") == 2


def test_a_process_that_cannot_start_is_one_clear_line(run_dir, tmp_path):
    own_logs = f'registry_wait_s = 0.5\nlog_dir = "{tmp_path / "events"}"'
    file, port = write_node(run_dir, tmp_path, more=own_logs)
    text = file.read_text()
    file.write_text(text[: text.rindex("[[process]]")])  # nobody serves the registry
    with stopped_at_the_end(file):
        done = run_script("node-start", file)
        assert done.returncode == 69
        assert len(done.stderr.splitlines()) == 1
        assert "n-kvcache ended with exit code" in done.stderr
        assert done.stderr.count(f"the registry at tcp://127.0.0.1:{port} did not answer") == 1
        assert done.stdout == ""


def test_the_exit_code_is_that_of_the_process_that_failed(run_dir, tmp_path):
    """What only the process itself can find wrong is told apart as its own exit code does."""
    file, port = write_node(run_dir, tmp_path)
    text = file.read_text()
    with stopped_at_the_end(file), socket.socket() as taken:
        file.write_text(
            text.replace("[[process]]", f'keys_dir = "{tmp_path}/none"\n[[process]]', 1)
        )
        wrong = run_script("node-start", file)
        assert wrong.returncode == 64
        assert "n-registry ended with exit code 64" in wrong.stderr
        assert "no usable key" in wrong.stderr
        taken.bind(("127.0.0.1", port))
        taken.listen()
        file.write_text(text)
        refused = run_script("node-start", file)
        assert refused.returncode == 71
        assert "n-registry ended with exit code 71" in refused.stderr
        assert set(pids(file).values()) == {0}


def test_a_wrong_setting_starts_nothing(run_dir, tmp_path):
    file, _ = write_node(run_dir, tmp_path, more="heartbeat_s = 99")
    done = run_script("node-start", file)
    assert done.returncode == 64
    assert "heartbeat_s" in done.stderr
    assert done.stdout == ""
    assert set(pids(file).values()) == {0}


def test_a_wrong_setting_stops_nothing(run_dir, tmp_path):
    file, _ = write_node(run_dir, tmp_path)
    file.write_text(file.read_text().replace("shutdown_s = 3.0", 'shutdown_s = "soon"'))
    done = run_script("node-stop", file)
    assert (done.returncode, done.stdout) == (64, "")
    assert "cluster.shutdown_s must be a number" in done.stderr


def test_with_keys_only_those_who_are_allowed_get_in(run_dir, tmp_path):
    keys, strange = str(tmp_path / "keys"), str(tmp_path / "strange")
    create_keys(keys)
    create_keys(strange)
    file, port = write_node(run_dir, tmp_path, more=f'keys_dir = "{keys}"')
    with stopped_at_the_end(file):
        done = run_script("node-start", file)
        assert done.returncode == 0, done.stderr
        ours = Security.load(keys)
        assert daemon_record(port, ours).public_key == ours.public_key

        async def stranger():
            transport = Transport(Security.load(strange))
            address = f"tcp://127.0.0.1:{port};key={ours.public_key}"
            registry = open_registry(address, transport, first_timeout_s=1.0)
            try:
                await registry.get("/xllm/default/daemons/n-kvcache")
            finally:
                await registry.close()
                transport.close()

        with pytest.raises(Exception, match="cannot be reached"):
            asyncio.run(stranger())


@pytest.mark.etcd
def test_a_node_whose_registry_is_etcd(run_dir, tmp_path):
    with one_etcd(tmp_path) as server:
        file, port = write_node(run_dir, tmp_path)
        text = file.read_text().replace(f"tcp://127.0.0.1:{port}", server.address)
        file.write_text(text[: text.rindex("[[process]]")])  # etcd is its own server
        with stopped_at_the_end(file):
            done = run_script("node-start", file)
            assert done.returncode == 0, done.stderr
            keys = ["get", "--prefix", "/xllm/", "--keys-only"]
            assert server.ctl(*keys).stdout.split() == ["/xllm/default/daemons/n-kvcache"]
            assert run_script("node-stop", file).returncode == 0
            assert server.ctl(*keys).stdout.split() == []
        file.write_text(text)
        with stopped_at_the_end(file):
            done = run_script("node-start", file)
            assert done.returncode == 64
            assert "etcd is its own server" in done.stderr
