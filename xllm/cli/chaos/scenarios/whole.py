"""The end of everything: the launcher is killed, and what it leaves behind is nothing."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import descendants, is_alive
from xllm.cli.chaos.stage import Stage
from xllm.errors import DeadlineError

ORPHAN_S = 2.0
ALL_ENDED_S = 30.0


async def kill_launcher(stage: Stage) -> None:
    """SIGKILL of `xllm serve`: every process below it is gone within two seconds."""
    await stage.wait_load()
    cluster = stage.cluster
    pid = cluster.launcher_pid
    family = [one for one in descendants(pid) if one != pid]
    shared = _shared_names()
    injection = stage.strike("F26", "the launcher", lambda: os.kill(pid, signal.SIGKILL))
    await stage.prove(injection, f"pid {pid} is gone", lambda: not is_alive(pid))
    try:
        took_s = await cluster.until(
            lambda: not any(map(is_alive, family)), ORPHAN_S, "the end of all processes"
        )
        injection.notes["orphans_gone_s"] = round(took_s, 2)
    except DeadlineError as error:
        injection.broken.append(error.message)
    new = _shared_names() - shared
    if new:
        injection.broken.append(f"left in /dev/shm: {', '.join(sorted(new))}")
    stage.load.stop_asking()
    try:
        await cluster.until(lambda: not stage.ledger.open, ALL_ENDED_S, "the end of all requests")
    except DeadlineError as error:
        injection.broken.append(error.message)
    await stage.settle(injection, whole=False)


def _shared_names() -> set[str]:
    """Names in /dev/shm; what others make there meanwhile does not begin as ours do."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("xllm", "psm_", "sem."))}
