"""An actor: one process's loop with its timers and tasks, ended in order.

It owns no policy. A subclass opens its sockets in `start`, closes them in `stop`, and asks for
the end with `request_stop`. A task or timer that raises is logged; an InvariantError ends the
process, since state that cannot be must not serve anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from xllm.errors import InvariantError, XllmError, error_from_exit_code
from xllm.protocol.transport.context import KEYS_PERIOD_S, Transport, describe_error

_log = structlog.get_logger("actor")


class Timer:
    """A periodic call. The next one is counted from the last one's start; late ones are not made
    up for."""

    def __init__(
        self, period_s: float, call: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._period_s = period_s
        self._call = call
        self._failed = failed
        self._handle: asyncio.TimerHandle | None = self._loop.call_later(period_s, self._run)

    def _run(self) -> None:
        self._handle = self._loop.call_later(self._period_s, self._run)
        try:
            self._call()
        except Exception as error:
            self._failed(error)

    def cancel(self) -> None:
        """No further calls."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Actor:
    """Base of every process's shell. `keys_dir`: its node's keys, where it has any."""

    def __init__(self, name: str, transport: Transport | None = None, keys_dir: str = "") -> None:
        self.name = name
        self._given_transport = transport
        self._keys_dir = keys_dir
        self.transport: Transport = transport  # type: ignore[assignment]  # made in `open`
        self._timers: list[Timer] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop_requested = asyncio.Event()
        self._exit_code = 0
        self.stop_reason = self.stop_code = ""

    # -- for subclasses ----------------------------------------------------------------------

    async def start(self) -> None:
        """Open sockets, start timers. An error here ends the process with its exit code."""

    async def stop(self) -> None:
        """Drain, then close what `start` opened. Called once, also after a failed start."""

    def every(self, period_s: float, call: Callable[[], None]) -> Timer:
        """Call `call` each `period_s` seconds until the actor stops."""
        timer = Timer(period_s, call, self._failed)
        self._timers.append(timer)
        return timer

    def later(self, delay_s: float, call: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """Call once after `delay_s` seconds."""

        def guarded() -> None:
            try:
                call(*args)
            except Exception as error:
                self._failed(error)

        return asyncio.get_running_loop().call_later(delay_s, guarded)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that the actor owns: cancelled at the end, its failure logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def request_stop(self, exit_code: int = 0, reason: str = "", code: str = "") -> None:
        """End the process: `stop` runs, then it exits. The first exit code that is not 0 wins,
        and its reason is what the process says at its end. `code`: an error's wire code; empty:
        the one that goes with the exit code."""
        if exit_code and not self._exit_code:
            self._exit_code = exit_code
            self.stop_reason = reason
            self.stop_code = code or error_from_exit_code(exit_code, reason).code
        self._stop_requested.set()

    @property
    def stopping(self) -> bool:
        """Whether the end was requested."""
        return self._stop_requested.is_set()

    # -- running -----------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the transport and start; for tests and `run`."""
        if self._given_transport is None:
            self.transport = Transport.with_keys(self._keys_dir)
        self.transport.on_fatal = self._fatal
        if self.transport.security is not None:
            self.every(KEYS_PERIOD_S, self.transport.refresh_keys)
        await self.start()

    async def close(self) -> None:
        """Stop, cancel what is left, close the transport if it is ours; for tests and `run`."""
        self._stop_requested.set()
        try:
            await self.stop()
        finally:
            for timer in self._timers:
                timer.cancel()
            tasks = [t for t in self._tasks if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._given_transport is None and self.transport is not None:
                self.transport.close()

    async def run(self) -> int:
        """Start, serve until the end is requested, stop. Returns the exit code."""
        try:
            await self._open_unless_stopped()
            await self._stop_requested.wait()
        finally:
            await self.close()
        return self._exit_code

    async def _open_unless_stopped(self) -> None:
        """A start that waits for others (the registry, say) ends with the wish to stop."""
        opening = asyncio.ensure_future(self.open())
        stop = asyncio.ensure_future(self._stop_requested.wait())
        try:
            await asyncio.wait((opening, stop), return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
        finally:
            opening.cancel()
            stop.cancel()
            await asyncio.gather(opening, stop, return_exceptions=True)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        _log.error("actor_call_failed", actor=self.name, error=describe_error(error))
        if isinstance(error, InvariantError):
            self._fatal(error)

    def _fatal(self, error: BaseException) -> None:
        cls = type(error) if isinstance(error, XllmError) else XllmError
        _log.critical("actor_fatal", actor=self.name, error=str(error)[:500])
        self.request_stop(cls.exit_code, str(error)[:500] or type(error).__name__, cls.code)
