"""A real worker process: what it imports, how fast it starts, how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import uvloop

from tests.worker.process.fake_master import FakeMaster
from xllm.config.cluster import ClusterSettings
from xllm.config.load import encode_settings
from xllm.config.master import MasterSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import DependencyError, FencedError
from xllm.protocol.actor.children import ChildExit, Children, ChildSpec
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import (
    NewSequence,
    StepItem,
    StepPlan,
    StepResult,
    StopWorker,
    WorkerFailed,
    WorkerReady,
)
from xllm.protocol.transport.context import Transport
from xllm.worker.process import main
from xllm.worker.toy.stream import predict

FRESH = """
import sys
before = set(sys.modules)
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.worker import process
from xllm.worker.factory import make_executor
make_executor(Settings(worker=WorkerSettings(engine="toy"))).load(lambda done, total: None)
print(*sorted(set(sys.modules) - before))
"""
LIGHT = {"xllm", "zmq", "msgspec", "structlog", "uvloop", "rich", "pygments"}
"""Packages that a toy worker may import beside the standard library."""
MAX_OWN_MODULES = 90


@pytest.mark.process
def test_the_toy_worker_imports_little() -> None:
    """Its start is imports: `benchmarks/startup.py` says how long they take."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    packages = {module.split(".")[0] for module in modules if "." in module}
    assert packages - sys.stdlib_module_names <= LIGHT
    assert sum(module.startswith("xllm.") for module in modules) < MAX_OWN_MODULES


async def spawn_worker(master: FakeMaster, model_path: str = ""):
    exits: list[ChildExit] = []
    children = Children(exits.append)
    settings = Settings(
        cluster=ClusterSettings(heartbeat_s=0.05, log_level="warning"),
        master=MasterSettings(name="m", worker_endpoint=master.socket.endpoint),
        worker=WorkerSettings(engine="toy"),
        model=ModelSettings(path=model_path),
    )
    children.start(ChildSpec("worker", main, (encode_settings(settings),)))
    return children, exits


@pytest.mark.process
@pytest.mark.parametrize("end", ["stop", "sigterm", "sigkill", "refused"])
def test_a_worker_process_serves_and_ends(run_dir, end: str) -> None:
    async def scenario() -> None:
        transport = Transport()
        master = FakeMaster(transport, f"ipc://{run_dir}/w")
        if end == "refused":
            (run_dir / "tokenizer.json").write_text("no JSON")
        children, exits = await spawn_worker(master, str(run_dir))
        try:
            if end == "refused":
                failed = await master.wait_for(WorkerFailed)
                assert "tokenizer.json" in failed.message
                await master.until(lambda: exits)
                assert exits[0].code == DependencyError.exit_code
                return
            await master.wait_for(WorkerReady)
            sampling = SamplingParams(seed=1)
            new = NewSequence(0, (30, 31), (), sampling, 0)
            master.send(StepPlan(0, (StepItem(0, 0, 0, 2, (1,)),), (new,)))
            result = await master.wait_for(StepResult)
            assert list(result.tokens[0]) == predict((30, 31), sampling, 0, 1)
            if end == "stop":
                master.send(StopWorker())
            else:
                number = signal.SIGTERM if end == "sigterm" else signal.SIGKILL
                children.signal("worker", number)
            await master.until(lambda: exits and master.gone)
            codes = {"sigkill": -signal.SIGKILL, "sigterm": 0, "stop": FencedError.exit_code}
            assert exits[0].code == codes[end]
        finally:
            children.kill_all()
            await master.until(lambda: not children.pids)
            master.socket.close()
            transport.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario(), 90))


@pytest.mark.process
def test_a_worker_dies_with_its_parent(run_dir) -> None:
    code = f"""
import asyncio, os
from tests.worker.process.test_worker_process import FakeMaster, spawn_worker
from xllm.protocol.step import WorkerReady
from xllm.protocol.transport.context import Transport
async def scenario():
    master = FakeMaster(Transport(), "ipc://{run_dir}/w")
    children, _ = await spawn_worker(master)
    await master.wait_for(WorkerReady)
    print(children.pids["worker"], flush=True)
    os.kill(os.getpid(), 9)
if __name__ == "__main__":
    asyncio.run(scenario())
"""
    script = run_dir / "parent.py"
    script.write_text(code)
    environ = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=environ
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)

    async def scenario() -> None:
        async with asyncio.timeout(2):
            while os.path.exists(f"/proc/{pid}") and not _is_zombie(pid):
                await asyncio.sleep(0.01)

    asyncio.run(scenario())


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
