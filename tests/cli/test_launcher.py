"""The launcher with children that only report: readiness, restarts, giving up, the end."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import time

import pytest

from tests.cli.launch_targets import fail, fail_once, idle
from xllm.cli.launch_plan import PlannedChild
from xllm.cli.launcher import LaunchedService
from xllm.cli.screen import LaunchScreen
from xllm.config.load import load
from xllm.protocol.actor.children import ChildSpec

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
            PlannedChild(name, ChildSpec(name, target, (endpoint, name, name, *args)))
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
    for name in ("router", "master", "kvcache"):
        assert f"{name}: started" in launch.text
        assert f"{name}: ready" in launch.text
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
    assert "ended with signal 9; it starts again in 0.5 s" in launch.text


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
