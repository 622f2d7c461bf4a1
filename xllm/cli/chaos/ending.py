"""How a run ends that somebody ends: SIGTERM as Ctrl-C, after its cluster and its directories."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import TypeVar

import click

EXIT_TERMINATED = 128 + signal.SIGTERM

T = TypeVar("T")


def run_to_end(run: Coroutine[None, None, T]) -> T:
    """What the coroutine gives. SIGTERM cancels it, waits until it has tidied up, and is the exit
    code 143; a second one is not waited for."""

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def end() -> None:
            loop.remove_signal_handler(signal.SIGTERM)
            task.cancel()

        loop.add_signal_handler(signal.SIGTERM, end)
        return await run

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise click.exceptions.Exit(EXIT_TERMINATED) from None
