"""Children for tests of the launcher: they report like roles and do nothing."""

from __future__ import annotations

import os
import sys

from tests.fixtures.child_process import run_child
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter


class IdleRole(Actor):
    """Reports its start, progress and readiness, and waits for its end."""

    def __init__(self, endpoint: str, kind: str, name: str) -> None:
        super().__init__(name)
        self._endpoint = endpoint
        self._kind = kind

    async def start(self) -> None:
        self._reporter = LaunchReporter(self.transport, self._endpoint, self._kind, self.name)
        self._reporter.started()
        self._reporter.progress(1, 2)
        self._reporter.ready((("http", "http://h:1"),), detail="idle")

    async def stop(self) -> None:
        self._reporter.close()


class FailingRole(IdleRole):
    """Reports a failure and ends with a code."""

    def __init__(self, endpoint: str, kind: str, name: str, code: int) -> None:
        super().__init__(endpoint, kind, name)
        self._code = code

    async def start(self) -> None:
        self._reporter = LaunchReporter(self.transport, self._endpoint, self._kind, self.name)
        self._reporter.failed("config_error", "as asked")
        self.later(0.2, self.request_stop, self._code)


def idle(endpoint: str, kind: str, name: str) -> None:
    run_child(lambda: IdleRole(endpoint, kind, name))


def fail(endpoint: str, kind: str, name: str, code: str) -> None:
    run_child(lambda: FailingRole(endpoint, kind, name, int(code)))


def fail_once(endpoint: str, kind: str, name: str, flag: str) -> None:
    """Dies the first time, before anything else."""
    if not os.path.exists(flag):
        open(flag, "w").close()
        sys.exit(75)
    idle(endpoint, kind, name)


def fail_again(endpoint: str, kind: str, name: str, flag: str) -> None:
    """Serves in its first life, and cannot start in any other."""
    if os.path.exists(flag):
        fail(endpoint, kind, name, "64")
    open(flag, "w").close()
    idle(endpoint, kind, name)
