"""A disk without room: what cannot be logged changes nothing."""

from __future__ import annotations

import os
import signal

from xllm.cli.chaos.processes import is_alive
from xllm.cli.chaos.stage import Stage
from xllm.errors import DeadlineError

AGAIN_S = 20.0


async def fill_logs(stage: Stage) -> None:
    """No byte more fits where the logs go, and an instance dies: the others say so to nobody, and
    its successor starts without a log. With room again they write again."""
    await stage.wait_load()
    disk = stage.around.log_disk
    assert disk is not None
    victim = stage.pick("master")
    pid = victim.pid
    pids = [one.pid for one in stage.cluster.processes.values()]
    disk.fill(pids)
    sizes = _sizes(stage)
    injection = stage.strike("F23-logs", victim.name, lambda: os.kill(pid, signal.SIGKILL))
    try:
        await stage.prove(
            injection,
            f"{disk.means}, pid {pid} is gone",
            lambda: disk.is_full() and not is_alive(pid),
        )
        others = [one for one in pids if one != pid and is_alive(one)]
        await stage.settle(injection)
        grown = [name for name, size in _sizes(stage).items() if size > sizes.get(name, 0)]
        if disk.is_mounted and grown:
            injection.broken.append(f"the disk was not full for {', '.join(grown)}")
        dead = [one for one in others if not is_alive(one)]
        # The worker of the one that was killed ends with it.
        if len(dead) > 1:
            injection.broken.append(f"pids {dead} ended")
    finally:
        disk.empty()
    await _write_again(stage, injection.broken)


async def _write_again(stage: Stage, broken: list[str]) -> None:
    """Until a log grows again: the next one to say something is a router whose instance leaves."""
    num_before = len(stage.cluster.events.events)
    victim = stage.pick("master")
    os.kill(victim.pid, signal.SIGTERM)
    try:
        await stage.cluster.until(
            lambda: len(stage.cluster.events.events) > num_before, AGAIN_S, "a word in a log"
        )
    except DeadlineError as error:
        broken.append(error.message)
    await stage.wait_whole()


def _sizes(stage: Stage) -> dict[str, int]:
    """Bytes of each log."""
    return {path.name: path.stat().st_size for path in stage.cluster.log_dir.glob("*.log")}
