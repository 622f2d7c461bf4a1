"""One watch over a connection that may break: list, tell the difference, watch, again and again.

Invariant: what was told adds up to a listing that the server once had, deletions of a server
that began anew aside (those wait for `RESTART_GRACE_S`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from xllm.errors import BackpressureError, BrokenError, ClosedError, XllmError
from xllm.protocol.registry.interface import OnChanges
from xllm.protocol.registry.known import KnownEntries
from xllm.protocol.registry_wire import Change, Listing
from xllm.protocol.transport.context import describe_error

if TYPE_CHECKING:
    from xllm.protocol.registry.remote import RemoteRegistry

_log = structlog.get_logger("registry")
RESTART_GRACE_S = 10.0
"""Owners of entries get this long to register with a server that began anew."""
_RETRY_S = 0.2


class RemoteWatch:
    """A watch of a RemoteRegistry. `number` names its current life at the server; `failed` is
    told what `on_changes` raised."""

    def __init__(
        self,
        registry: RemoteRegistry,
        prefix: str,
        on_changes: OnChanges,
        after: Listing | None,
        failed: Callable[[Exception], None],
        patient: bool,
    ) -> None:
        self.prefix = prefix
        self.number = 0
        self._registry = registry
        self._on_changes = on_changes
        self._failed = failed
        self._patient = patient
        self._known = KnownEntries(after)
        self._incarnation = ""
        self._task: asyncio.Task[None] | None = None
        self._grace: asyncio.TimerHandle | None = None
        self._stale = False
        self._closed = False

    def deliver(self, changes: Sequence[Change]) -> None:
        """Changes from the server: tell those that are news."""
        news = self._known.apply(changes)
        self._tell(news)

    async def synchronize(self) -> None:
        """List, tell the difference, watch from there. BrokenError: try again later."""
        while not self._closed:
            self._registry.forget_watch(self.number)
            answer = await self._registry.list_with_incarnation(self.prefix)
            anew = self._patient and self._incarnation not in ("", answer.incarnation)
            self._incarnation = answer.incarnation
            news = self._known.replace(answer.listing, keep_missing=anew)
            if anew and self._grace is None:
                loop = asyncio.get_running_loop()
                self._grace = loop.call_later(RESTART_GRACE_S, self._grace_over)
            self._tell(news)
            revision = answer.listing.revision
            if await self._registry.open_watch(self, revision, answer.incarnation):
                return

    def resynchronize(self) -> None:
        """Do that in the background until it succeeds."""
        self._stale = True
        if self._closed or (self._task is not None and not self._task.done()):
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._keep_trying(), name=f"watch {self.prefix}")

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The background task, if there is or was one."""
        return self._task

    def close(self) -> None:
        """No more calls."""
        self._closed = True
        self._registry.watch_closed(self)
        if self._grace is not None:
            self._grace.cancel()
        if self._task is not None:
            self._task.cancel()

    async def _keep_trying(self) -> None:
        while self._stale and not self._closed:
            self._stale = False
            try:
                await self.synchronize()
                continue
            except ClosedError:
                return
            except (BrokenError, BackpressureError):
                pass  # the connection says so itself; it is tried again below
            except XllmError as error:
                _log.warning("watch_refused", prefix=self.prefix, error=error.message)
            except Exception as error:  # whatever it is: without a watch nobody is found
                _log.error("watch_failed", prefix=self.prefix, error=describe_error(error))
            self._stale = True
            await asyncio.sleep(_RETRY_S)

    def _tell(self, news: Sequence[Change]) -> None:
        if not news or self._closed:
            return
        try:
            self._on_changes(news)
        except Exception as error:
            self._failed(error)

    def _grace_over(self) -> None:
        self._grace = None
        self.resynchronize()
