"""Running an actor as a process: limits, uvloop, signals, the parent's watch, the end.

Invariant: a process that fails says why, in one line on standard error that begins with `xllm:`,
and to its launcher, before it exits.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import structlog
import uvloop

from xllm.config.cluster import ClusterSettings
from xllm.errors import XllmError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.fault_hooks import install_fault_hooks
from xllm.protocol.actor.logs import LogStream, configure_logs
from xllm.protocol.actor.process_limits import set_process_limits
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.transport.context import Transport, describe_error

_log = structlog.get_logger("process")
_ORPHAN_GRACE_S = 1.0
YOUNG_OBJECTS = 5000
"""New containers after which Python looks for cycles among them, of which there are few here: a
third of a millisecond then, instead of twenty looks at what all of a busy turn's requests hold."""
EXIT_SYSTEM = 71


class Outcome(NamedTuple):
    """How a process ended: its exit code, and where it failed an error's wire code and why."""

    exit_code: int
    code: str = ""
    reason: str = ""


def run_role(
    kind: str,
    name: str,
    cluster: ClusterSettings,
    make: Callable[[], Actor],
    *,
    fault_hooks: bool = False,
) -> NoReturn:
    """Run a role as the whole of this process: its logs, the actor that `make` gives, its exit.

    `kind` and `name` as in LaunchMessages; `cluster.launcher` hears of a failure. `fault_hooks`:
    see there."""

    def make_hooked() -> Actor:
        install_fault_hooks(asyncio.get_running_loop(), name, cluster.log_dir)
        return make()

    def run() -> Outcome:
        configure_logs(
            process=name,
            level=cluster.log_level,
            log_format=cluster.log_format,
            log_dir=cluster.log_dir,
        )
        return run_actor(make_hooked if fault_hooks else make)

    outcome = _outcome_of(run)
    if outcome.reason:
        _say_failure(kind, name, cluster, outcome)
    _leave(outcome.exit_code)


def run_actor(make: Callable[[], Actor]) -> Outcome:
    """Make the actor inside a uvloop loop and run it to its end.

    SIGTERM and SIGINT request a stop, a second one ends the process at once. A process whose
    parent dies gets a second to clean up (the kernel's PDEATHSIG takes those that hang)."""
    set_process_limits()
    if sys.stderr is not None:
        faulthandler.enable()

    def run() -> Outcome:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_main(make))

    return _outcome_of(run)


def _outcome_of(run: Callable[[], Outcome]) -> Outcome:
    try:
        return run()
    except XllmError as error:
        return Outcome(error.exit_code, error.code, error.message)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return Outcome(EXIT_SYSTEM, "os_error", place + (error.strerror or type(error).__name__))
    except Exception as error:
        reason = f"internal error: {describe_error(error)}"
        return Outcome(XllmError.exit_code, XllmError.code, reason)


def _say_failure(kind: str, name: str, cluster: ClusterSettings, outcome: Outcome) -> None:
    """Tell the launcher, the log, and standard error unless the launcher shows it there. A log for
    people on standard error would say the same twice, and does not."""
    told = _outcome_of(lambda: asyncio.run(_tell_launcher(kind, name, cluster.launcher, outcome)))
    is_child = multiprocessing.parent_process() is not None
    if cluster.log_dir or cluster.log_format == "json":
        _log.error("process_failed", code=outcome.code, message=outcome.reason)
    if not (is_child and told.exit_code == 0):
        who = f"{name}: " if is_child else ""
        stream = LogStream(sys.stderr)
        stream.write(f"xllm: {who}{' '.join(outcome.reason.split())}\n")
        stream.flush()


async def _tell_launcher(kind: str, name: str, launcher: str, outcome: Outcome) -> Outcome:
    """Over a connection of its own, since the actor's may be what failed. Exit code 0: told."""
    if not launcher:
        return Outcome(1)
    transport = Transport()
    try:
        reporter = LaunchReporter(transport, launcher, kind, name)
        try:
            reporter.failed(outcome.code, outcome.reason)
            return Outcome(0 if await reporter.wait_sent() else 1)
        finally:
            reporter.close()
    finally:
        transport.close()


def _leave(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        LogStream(stream).flush()
    # Skip interpreter teardown: nothing is left to save, and torch's takes a while.
    os._exit(exit_code)


async def _main(make: Callable[[], Actor]) -> Outcome:
    actor = make()
    loop = asyncio.get_running_loop()
    num_signals = 0

    def on_signal(number: int) -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1:
            os._exit(128 + number)
        actor.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    _watch_parent(loop, actor)
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    exit_code = await actor.run()
    return Outcome(exit_code, actor.stop_code, actor.stop_reason if exit_code else "")


def _watch_parent(loop: asyncio.AbstractEventLoop, actor: Actor) -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def orphaned() -> None:
        loop.remove_reader(parent.sentinel)
        _log.warning("parent_gone", actor=actor.name)
        loop.call_later(_ORPHAN_GRACE_S, os._exit, 70)
        actor.request_stop(70)

    loop.add_reader(parent.sentinel, orphaned)
