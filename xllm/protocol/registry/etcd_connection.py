"""The way to an etcd cluster: one link at a time, to whichever member answers.

It decides when a link is given up: a call or a probe that was not answered is enough, for a
frozen member leaves everything open and silent. The next member is tried then, and the same one
again where there is no other. Writes are sent once, over a link that has answered before; what
became of one that was not answered nobody knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from xllm.config.etcd import EtcdSettings
from xllm.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    OverloadedError,
    XllmError,
)
from xllm.protocol.registry.etcd_address import EtcdAddress
from xllm.protocol.registry.etcd_files import check_etcd_settings, read_etcd_secrets
from xllm.protocol.registry.etcd_link import EtcdLink
from xllm.protocol.transport.context import describe_error

_log = structlog.get_logger("registry")

PROBE_S = 1.0
PROBE_TIMEOUT_S = 1.5
"""A silent etcd is noticed within the sum of both."""
AGAIN_S = 0.25
"""Pause between attempts while etcd does not answer."""
OUTAGE_GRACE_S = 10.0
"""Owners of entries get this long after an outage to register again."""

T = TypeVar("T")
Ask = Callable[[EtcdLink, float], Awaitable[T]]
"""A call over a link, with its time in seconds."""


class EtcdConnection:
    """Calls to the cluster at `address`. Make it inside the running loop.

    Until etcd has answered once, calls get `first_timeout_s`."""

    def __init__(
        self,
        address: EtcdAddress,
        settings: EtcdSettings,
        *,
        timeout_s: float,
        first_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_etcd_settings(address, settings)
        self.address = address
        self.num_links = 0
        self._settings = settings
        self._later_timeout_s = timeout_s
        self._timeout_s = first_timeout_s
        self._clock = clock
        self._turn = 0
        self._link: EtcdLink | None = None
        self._tried: EtcdLink | None = None
        self._linked = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._doubtful = asyncio.Event()
        self._silent_since = 0.0
        self._disturbed_until = 0.0
        self._refuses_writes = False
        self._closing: set[asyncio.Task[None]] = set()
        self._probing: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def degraded(self) -> bool:
        """Whether etcd did not answer of late, or takes no writes."""
        return bool(self._silent_since) or self._refuses_writes

    @property
    def silent_s(self) -> float:
        """Seconds since etcd stopped answering; 0 while it does."""
        return self._clock() - self._silent_since if self._silent_since else 0.0

    @property
    def disturbed_s(self) -> float:
        """For how long deletions are to be doubted: leases may have lapsed in an outage while
        their owners lived. 0: they are to be believed."""
        return max(self._disturbed_until - self._clock(), 0.0)

    def disturb(self) -> None:
        """This etcd may have lost what owners wrote: doubt deletions for a while."""
        self._disturbed_until = self._clock() + OUTAGE_GRACE_S

    def doubt(self) -> None:
        """Something broke: probe now."""
        self._doubtful.set()

    async def read(self, ask: Ask[T]) -> T:
        """An answer from whichever member gives one in time. BrokenError: none did."""
        deadline = self._clock() + self._timeout_s
        for _ in self.address.endpoints:
            with contextlib.suppress(BrokenError):
                return await self._ask(ask, deadline, self._share_s())
        return await self._ask(ask, deadline, self._timeout_s)

    async def write(self, ask: Ask[T]) -> T:
        """The answer of the member that we are linked with. BrokenError: there was none, and it
        may or may not have been done."""
        try:
            answer = await self._ask(ask, self._clock() + self._timeout_s, self._timeout_s)
        except OverloadedError:
            self._refuses_writes = True
            raise
        self._refuses_writes = False
        return answer

    async def wait_link(self) -> EtcdLink:
        """The link, once there is one. It is for the calls and the probe to make it."""
        while self._link is None:
            await self._linked.wait()
        return self._link

    def start_probing(self) -> None:
        """See now and then that etcd answers: a frozen one leaves an open watch silent."""
        if self._probing is None and not self._closed:
            self._probing = asyncio.get_running_loop().create_task(
                self._probe(), name="registry probe"
            )

    async def close(self) -> None:
        """End all calls with ClosedError, and the link."""
        self._closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        self._drop(self._link)
        if self._tried is not None:
            await self._tried.close()
        await asyncio.gather(*self._closing)

    async def _ask(self, ask: Ask[T], deadline: float, limit_s: float) -> T:
        """One attempt."""
        link: EtcdLink | None = None
        try:
            link = await self._linked_by(deadline)
            limit_s = max(min(limit_s, deadline - self._clock()), 0.01)
            answer = await ask(link, limit_s)
        except ClosedError:
            raise
        except XllmError as error:
            if self._closed:
                raise ClosedError("the registry is closed") from None
            if link is None or isinstance(error, BrokenError | ConfigError):
                # Who refuses us altogether is left, too: the files may say something else by now.
                self._failed(link, error)
            else:
                self._answered()
            raise
        self._answered()
        return answer

    async def _linked_by(self, deadline: float) -> EtcdLink:
        if self._closed:
            raise ClosedError("the registry is closed")
        if self._link is not None:
            return self._link
        try:
            async with asyncio.timeout(deadline - self._clock()), self._connecting:
                if self._link is None:
                    self._link = await self._connect()
                    self._linked.set()
                return self._link
        except TimeoutError:
            raise BrokenError(
                f"the registry at {self.address} has not answered in {self._timeout_s:g} s"
            ) from None

    async def _connect(self) -> EtcdLink:
        """A link that has answered; every member is tried once."""
        reasons = []
        for _ in self.address.endpoints:
            target = self.address.endpoints[self._turn % len(self.address.endpoints)]
            if self._closed:
                break
            link = EtcdLink(target, self.address.tls, read_etcd_secrets(self._settings))
            self._tried = link
            try:
                await link.open(self._share_s())
            except BrokenError as error:
                reasons.append(error.message)
                self._turn += 1
                await link.close()
            except BaseException:
                await link.close()
                raise
            else:
                self.num_links += 1
                return link
        raise BrokenError(f"the registry cannot be reached: {'; '.join(reasons)}")

    def _share_s(self) -> float:
        """What one member gets of a call's time, so that others come to their turn."""
        return self._timeout_s / min(len(self.address.endpoints), 3)

    def _answered(self) -> None:
        self._timeout_s = self._later_timeout_s
        if self._silent_since:
            _log.info("registry_back", silent_s=round(self.silent_s, 1))
            if self.disturbed_s:
                self.disturb()
        self._silent_since = 0.0

    def _failed(self, link: EtcdLink | None, error: XllmError) -> None:
        self._silent_since = self._silent_since or self._clock()
        if isinstance(error, BrokenError):
            self.disturb()
        if link is not None and link is self._link:
            self._turn += 1
            self._drop(link)

    def _drop(self, link: EtcdLink | None) -> None:
        if link is None:
            return
        self._link = None
        self._linked.clear()
        closing = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _probe(self) -> None:
        while True:
            pause_s = AGAIN_S if self._silent_since else PROBE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._doubtful.wait()
            self._doubtful.clear()
            was_silent = bool(self._silent_since)
            try:
                deadline = self._clock() + self._later_timeout_s
                await self._ask(EtcdLink.hello, deadline, PROBE_TIMEOUT_S)
            except ClosedError:
                return
            except XllmError as error:
                if not was_silent:
                    _log.warning("registry_unreachable", error=error.message)
            except Exception as error:  # whatever it is, probing goes on
                _log.error("registry_probe_failed", error=describe_error(error))
