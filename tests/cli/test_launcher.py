"""The launcher with children that only report: readiness, restarts, giving up, the end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time

import pytest

from tests.cli.launch_targets import fail, fail_again, fail_once, idle
from xllm.cli import launcher as launcher_module
from xllm.cli.launch_plan import PlannedChild, announcement
from xllm.cli.launcher import LaunchedService
from xllm.cli.screen import LaunchScreen
from xllm.cli.startup import ServiceAddresses
from xllm.config.load import load
from xllm.errors import BrokenError
from xllm.protocol.actor.children import ChildSpec
from xllm.protocol.questions import ModelInfo

pytestmark = pytest.mark.process


class Launch:
    """A launcher in this process, with children as a test plans them."""

    def __init__(self, tmp_path, **targets) -> None:
        self.base = tmp_path / "r"
        self.out = io.StringIO()
        flags = {"cluster.run_dir": str(self.base), "model.name": "m", "cluster.shutdown_s": 1}
        self.service = LaunchedService(
            load(flags, None, {}), LaunchScreen(self.out), plan=self._plan
        )
        self._targets = targets

    def _plan(self, settings, run_dir):
        endpoint = f"ipc://{run_dir}/launch"
        return [
            PlannedChild(
                kind_of(name), ChildSpec(name, target, (endpoint, kind_of(name), name, *args))
            )
            for name, (target, *args) in self._targets.items()
        ]

    @property
    def text(self) -> str:
        return self.out.getvalue()

    async def until(self, condition) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    def run(self, conversation) -> int:
        async def main() -> int:
            running = asyncio.create_task(self.service.run())
            await conversation(self)
            async with asyncio.timeout(20):
                return await running

        return asyncio.run(main())


def kind_of(name) -> str:
    return name.partition("_")[0]


def pids(launch) -> dict[str, int]:
    return dict(launch.service._children.pids)


def test_ready_then_a_clean_end(tmp_path):
    launch = Launch(tmp_path, router=(idle,), master=(idle,), kvcache=(idle,))
    seen = {}

    async def conversation(launch):
        await launch.until(lambda: "Ctrl-C stops" in launch.text)
        seen.update(pids(launch))
        launch.service.interrupt(signal.SIGINT)

    assert launch.run(conversation) == 0
    for name, word in (("router", "listens"), ("master", "ready"), ("kvcache", "listens")):
        assert f"{name}: started" in launch.text
        assert f"{name}: {word} (pid" in launch.text
    assert "50% of" in launch.text
    assert "curl http://h:1/v1/chat/completions" in launch.text
    assert '"model": "m"' in launch.text
    assert "draining, at most 1 s" in launch.text
    assert os.listdir(launch.base) == []
    assert not any(os.path.exists(f"/proc/{pid}") for pid in seen.values())


def test_a_child_that_dies_starts_again(tmp_path):
    launch = Launch(tmp_path, router=(idle,), master=(idle,))

    async def conversation(launch):
        await launch.until(lambda: "Ctrl-C stops" in launch.text)
        first = pids(launch)["master"]
        os.kill(first, signal.SIGKILL)
        await launch.until(lambda: pids(launch).get("master", first) != first)
        await launch.until(lambda: launch.text.count("master: ready") == 2)
        launch.service.interrupt(signal.SIGTERM)

    assert launch.run(conversation) == 0
    assert "ended with signal 9; it starts again\n" in launch.text


def test_a_fenced_child_starts_again_at_once(tmp_path):
    launch = Launch(tmp_path, master=(fail_once, str(tmp_path / "flag")))

    async def conversation(launch):
        await launch.until(lambda: "master: ready" in launch.text)
        launch.service.interrupt(signal.SIGTERM)

    assert launch.run(conversation) == 0
    assert "ended with exit code 75; it starts again" in launch.text
    assert "again in" not in launch.text


@pytest.mark.parametrize("code", [64, 69])
def test_what_cannot_start_is_given_up(tmp_path, capfd, code):
    launch = Launch(tmp_path, router=(idle,), master=(fail, str(code)))
    began = time.monotonic()

    async def conversation(launch):
        pass

    assert launch.run(conversation) == code
    assert time.monotonic() - began < 10
    assert "as asked" in capfd.readouterr().err
    assert os.listdir(launch.base) == []


def kill(launch, name) -> None:
    os.kill(pids(launch)[name], signal.SIGKILL)


def test_the_service_goes_on_without_a_child_that_cannot_be_kept(tmp_path, capfd):
    flags = {name: str(tmp_path / name) for name in ("kvcache", "master_a")}
    launch = Launch(
        tmp_path,
        router=(idle,),
        master_a=(fail_again, flags["master_a"]),
        master_b=(idle,),
        kvcache=(fail_again, flags["kvcache"]),
    )

    async def conversation(launch):
        await launch.until(lambda: "Ctrl-C stops" in launch.text)
        for name in flags:
            kill(launch, name)
        policies = launch.service._policies
        await launch.until(lambda: all(policies[name].quarantined for name in flags))
        assert set(pids(launch)) == {"router", "master_b"}
        launch.service.interrupt(signal.SIGINT)

    assert launch.run(conversation) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "goes on without it" in line]
    assert sorted(line.split()[1] for line in lines) == ["kvcache", "master_a"]
    assert all("as asked; its configuration is wrong" in line for line in lines)
    assert all(line.endswith("starts again in 30 s") for line in lines)


def test_the_last_instance_is_needed(tmp_path, capfd):
    masters = {name: (fail_again, str(tmp_path / name)) for name in ("master_a", "master_b")}
    launch = Launch(tmp_path, router=(idle,), **masters)

    async def conversation(launch):
        await launch.until(lambda: "Ctrl-C stops" in launch.text)
        kill(launch, "master_a")
        await launch.until(lambda: launch.service._policies["master_a"].quarantined)
        kill(launch, "master_b")

    assert launch.run(conversation) == 64
    assert "master_b" in capfd.readouterr().err.splitlines()[-1]


def test_the_announcement_tells_of_keys():
    addresses = ServiceAddresses("http://h:1", "tcp://h:2")
    with_keys = "\n".join(announcement(["m"], addresses, 1.0, has_keys=True))
    assert '-H "Authorization: Bearer $KEY" \\\n' in with_keys
    assert "Authorization" not in "\n".join(announcement(["m"], addresses, 1.0))


class SlowService:
    """A client of a service that is ready at the `num`th question."""

    def __init__(self, num) -> None:
        self.num_left = num

    async def health(self, *, probe, timeout_s):
        self.num_left -= 1
        if self.num_left % 2:
            raise BrokenError("no router answers")
        return self

    async def models(self, *, timeout_s):
        return (ModelInfo("m", 100, task="embed"),)

    @property
    def ready(self) -> bool:
        return self.num_left <= 0


def test_waiting_for_a_service_is_quiet_and_ends_with_its_readiness(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launcher_module, "_PROBE_S", 0.1)
    monkeypatch.setattr(launcher_module, "_MAX_PROBE_AGAIN_S", 0.02)
    service = Launch(tmp_path).service
    client = SlowService(20)
    began = time.monotonic()
    assert asyncio.run(service._wait_healthy(client)) == "embed"
    assert client.num_left == 0
    complaints = capfd.readouterr().err.splitlines()
    assert 1 <= len(complaints) <= (time.monotonic() - began) / 0.1
    assert all("is not ready" in line for line in complaints)
