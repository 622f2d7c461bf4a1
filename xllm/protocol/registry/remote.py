"""The registry interface over a socket to an embedded registry's server.

Every call has a deadline; a connection that is lost fails the calls that wait on it and makes
every watch list anew and tell the difference. A server that began anew (another incarnation) has
forgotten entries whose owners still live and will register again: patient watches hold their
deletion back for `RESTART_GRACE_S`. It decides nothing else, and knows no meaning of keys.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Sequence
from typing import TypeVar

from xllm.errors import (
    BackpressureError,
    BrokenError,
    ClosedError,
    XllmError,
    error_from_code,
)
from xllm.protocol.codec import Decoder
from xllm.protocol.registry.interface import OnChanges
from xllm.protocol.registry.remote_watch import RemoteWatch
from xllm.protocol.registry_wire import (
    CasResult,
    CloseWatch,
    CompareAndSet,
    DeleteEntry,
    EntriesChanged,
    Entry,
    EntryAnswer,
    GetEntry,
    GrantLease,
    GuardedWrite,
    KeepLease,
    Lease,
    LeaseAnswer,
    ListEntries,
    Listing,
    ListingAnswer,
    OpenWatch,
    PingRegistry,
    PutEntry,
    RegistryRefused,
    RegistryReply,
    RegistryRequest,
    RevokeLease,
    WatchAnswer,
    WatchLost,
    WriteAnswer,
)
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.dealer import DealerSocket

_LAST_LOOK_S = 0.05

R = TypeVar("R", LeaseAnswer, EntryAnswer, ListingAnswer, WriteAnswer, WatchAnswer)


class RemoteRegistry:
    """A Registry at `endpoint`. Make it inside the running loop.

    Until the registry has answered once, calls wait `first_timeout_s`: both sides may be starting
    on a busy machine."""

    def __init__(
        self,
        transport: Transport,
        endpoint: str,
        *,
        server_key: str = "",
        timeout_s: float = 3.0,
        first_timeout_s: float | None = None,
        probe_s: float = 1.0,
    ) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s if first_timeout_s is None else first_timeout_s
        self._later_timeout_s = timeout_s
        self._probe_s = probe_s
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[RegistryReply]] = {}
        self._watches: dict[int, RemoteWatch] = {}
        self._open_watches: set[RemoteWatch] = set()
        self._probing: asyncio.Task[None] | None = None
        self._degraded = False
        self._closed = False
        self._socket: DealerSocket[RegistryReply] = DealerSocket(
            transport,
            endpoint,
            Decoder(RegistryReply),
            self._on_message,
            on_gone=self._on_gone,
            server_key=server_key,
            name="registry client",
        )

    @property
    def degraded(self) -> bool:
        """Whether the last call or probe went unanswered."""
        return self._degraded

    async def grant(self, ttl_s: float) -> Lease:
        """See Registry."""
        return (await self._call(GrantLease(next(self._ids), ttl_s), LeaseAnswer)).lease

    async def keep_alive(self, lease_id: int) -> float:
        """See Registry."""
        answer = await self._call(KeepLease(next(self._ids), lease_id), LeaseAnswer)
        return answer.lease.ttl_s

    async def revoke(self, lease_id: int) -> None:
        """See Registry."""
        await self._call(RevokeLease(next(self._ids), lease_id), WriteAnswer)

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """See Registry."""
        request = PutEntry(next(self._ids), key, value, lease_id)
        return (await self._call(request, WriteAnswer)).result.revision

    async def get(self, key: str) -> Entry | None:
        """See Registry."""
        return (await self._call(GetEntry(next(self._ids), key), EntryAnswer)).entry

    async def list(self, prefix: str) -> Listing:
        """See Registry."""
        return (await self.list_with_incarnation(prefix)).listing

    async def list_with_incarnation(self, prefix: str) -> ListingAnswer:
        """The listing, and which life of the server it is from."""
        return await self._call(ListEntries(next(self._ids), prefix), ListingAnswer)

    async def delete(self, key: str) -> bool:
        """See Registry."""
        return (await self._call(DeleteEntry(next(self._ids), key), WriteAnswer)).result.ok

    async def compare_and_set(
        self, key: str, expected_mod_revision: int, value: bytes, lease_id: int = 0
    ) -> CasResult:
        """See Registry."""
        request = CompareAndSet(next(self._ids), key, expected_mod_revision, value, lease_id)
        return (await self._call(request, WriteAnswer)).result

    async def write_guarded(
        self,
        guard: str,
        create_revision: int,
        puts: Sequence[tuple[str, bytes]] = (),
        deletes: Sequence[str] = (),
    ) -> bool:
        """See Registry."""
        request = GuardedWrite(next(self._ids), guard, create_revision, tuple(puts), tuple(deletes))
        return (await self._call(request, WriteAnswer)).result.ok

    async def watch(
        self,
        prefix: str,
        on_changes: OnChanges,
        *,
        after: Listing | None = None,
        patient: bool = False,
    ) -> RemoteWatch:
        """See Registry. Later losses of the connection are repaired behind the scenes."""
        failed = functools.partial(self._transport.handler_failed, "registry watch")
        watch = RemoteWatch(self, prefix, on_changes, after, failed, patient)
        self._open_watches.add(watch)
        try:
            await watch.synchronize()
        except BaseException:
            watch.close()
            raise
        if self._probing is None:
            self._probing = self._loop.create_task(self._probe(), name="registry probe")
        return watch

    async def open_watch(self, watch: RemoteWatch, revision: int, incarnation: str) -> bool:
        """Have the server tell `watch` what follows; False: list again."""
        number = next(self._ids)
        self._watches[number] = watch
        watch.number = number
        request = OpenWatch(next(self._ids), number, watch.prefix, revision, incarnation)
        return (await self._call(request, WatchAnswer)).ok

    def forget_watch(self, number: int) -> None:
        """No news of that number reaches anybody from now on."""
        if self._watches.pop(number, None) is None or self._closed:
            return
        try:
            self._socket.send(CloseWatch(next(self._ids), number))
        except (BackpressureError, BrokenError):
            pass  # the server drops the watches of a connection with the connection

    def watch_closed(self, watch: RemoteWatch) -> None:
        """That watch is over."""
        self._open_watches.discard(watch)
        self.forget_watch(watch.number)

    async def close(self) -> None:
        """See Registry."""
        if self._closed:
            return
        self._closed = True
        tasks = [watch.task for watch in self._open_watches]
        for watch in list(self._open_watches):
            watch.close()
        if self._probing is not None:
            self._probing.cancel()
            tasks.append(self._probing)
        self._fail_waiting(ClosedError("the registry is closed"))
        self._socket.close()
        await asyncio.gather(*(task for task in tasks if task), return_exceptions=True)

    async def _call(self, request: RegistryRequest, kind: type[R]) -> R:
        if self._closed:
            raise ClosedError("the registry is closed")
        future: asyncio.Future[RegistryReply] = self._loop.create_future()
        self._waiting[request.id] = future
        try:
            self._socket.send(request)
            await asyncio.wait((future,), timeout=self._timeout_s)
            if not future.done():
                # This loop may have stood still so long: the answer may be in the socket.
                await asyncio.wait((future,), timeout=_LAST_LOOK_S)
            if not future.done():
                raise self._unanswered()
            reply = future.result()
        finally:
            self._waiting.pop(request.id, None)
        if isinstance(reply, RegistryRefused):
            raise error_from_code(reply.code, reply.message)
        if not isinstance(reply, kind):
            raise BrokenError(f"the registry answered {type(reply).__name__}")
        return reply

    def _unanswered(self) -> BrokenError:
        self._degraded = True
        how = "has not answered"
        if not self._socket.connected:
            self._socket.discard_queued()
            how = "cannot be reached"
        endpoint = self._socket.endpoint
        return BrokenError(f"the registry at {endpoint} {how} in {self._timeout_s:g} s")

    def _on_message(self, message: RegistryReply, frames: Sequence[bytes]) -> None:
        self._timeout_s = self._later_timeout_s
        self._degraded = False
        if isinstance(message, EntriesChanged | WatchLost):
            watch = self._watches.get(message.watch)
            if watch is not None and isinstance(message, EntriesChanged):
                watch.deliver(message.changes)
            elif watch is not None:
                watch.resynchronize()
            return
        future = self._waiting.get(message.id)
        if future is not None and not future.done():
            future.set_result(message)

    def _on_gone(self) -> None:
        self._degraded = True
        self._fail_waiting(BrokenError(f"lost the registry at {self._socket.endpoint}"))
        for watch in list(self._watches.values()):
            watch.resynchronize()

    def _fail_waiting(self, error: Exception) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def _probe(self) -> None:
        """Ask now and then: a frozen server leaves an open watch silent."""
        while True:
            await asyncio.sleep(self._probe_s)
            try:
                await self._call(PingRegistry(next(self._ids)), WatchAnswer)
            except ClosedError:
                return
            except XllmError:
                self._degraded = True
