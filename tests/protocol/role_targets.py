"""Roles that fail, as processes of their own: `python -m tests.protocol.role_targets HOW ...`."""

from __future__ import annotations

import resource
import sys

from xllm.config.cluster import ClusterSettings
from xllm.errors import ConfigError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.run import run_role


class FailingActor(Actor):
    """Fails in its start, in one of several ways."""

    def __init__(self, how: str) -> None:
        if how == "made":
            raise ConfigError("as asked")
        super().__init__("failing")
        self._how = how

    async def start(self) -> None:
        if self._how == "config":
            raise ConfigError("as asked")
        if self._how == "system":
            open("/nowhere/at/all")
        if self._how == "bug":
            raise KeyError("SECRET-PROMPT")
        if self._how == "stop":
            self.request_stop(69, "as asked")
        if self._how == "limits":
            core, _ = resource.getrlimit(resource.RLIMIT_CORE)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            print(core, soft == hard, flush=True)
            self.request_stop()


def fail(how: str, launcher: str, log_dir: str) -> None:
    cluster = ClusterSettings(launcher=launcher, log_dir=log_dir)
    run_role("router", "r", cluster, lambda: FailingActor(how))


if __name__ == "__main__":
    fail(*sys.argv[1:])
