"""Running an actor as a process: uvloop, signals, the parent's watch, the exit code."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

import structlog
import uvloop

from xllm.errors import XllmError
from xllm.protocol.actor.base import Actor
from xllm.protocol.transport.context import describe_error

_log = structlog.get_logger("process")
_ORPHAN_GRACE_S = 1.0


def run_actor(make: Callable[[], Actor]) -> int:
    """Make the actor inside a uvloop loop and run it to its end; returns the exit code.

    SIGTERM and SIGINT request a stop, a second one ends the process at once. A process whose
    parent dies gets a second to clean up (the kernel's PDEATHSIG takes those that hang)."""
    faulthandler.enable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_main(make))
    except XllmError as error:
        _log.error("process_failed", code=error.code, message=error.message)
        return error.exit_code
    except OSError as error:
        _log.error(
            "process_failed", code="os_error", message=error.strerror or type(error).__name__
        )
        return 71
    except Exception as error:
        _log.error("process_failed", code="internal_error", message=describe_error(error))
        return 70


def run_child(make: Callable[[], Actor]) -> None:
    """`run_actor` as the last act of a process: exits with its code."""
    code = run_actor(make)
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip interpreter teardown: nothing is left to save, and torch's takes a while.
    os._exit(code)


async def _main(make: Callable[[], Actor]) -> int:
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
    return await actor.run()


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
