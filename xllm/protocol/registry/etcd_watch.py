"""One watch on etcd that outlives streams, members and compactions.

It follows a stream from the revision after the last one that it told; where that was compacted, or
etcd lost its history, it lists and tells the difference. A new link may be to an etcd that lost
its data and has written as much again: what it had at that revision is compared first. After an
outage leases may have lapsed while their owners lived: a patient watch holds deletions back then,
and what is still missing when the doubt is over is told by a listing. Invariant: what was told
adds up to a state that etcd once had, such deletions aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from xllm.errors import BrokenError, InvalidRequestError, XllmError
from xllm.protocol.registry.etcd_connection import EtcdConnection
from xllm.protocol.registry.etcd_link import EtcdLink, EtcdStream
from xllm.protocol.registry.etcd_wire import (
    as_changes,
    as_entry,
    as_listing,
    list_request,
    watch_request,
    witness_request,
)
from xllm.protocol.registry.interface import OnChanges
from xllm.protocol.registry.known import KnownEntries
from xllm.protocol.registry_wire import Change, Listing
from xllm.protocol.transport.context import describe_error

_log = structlog.get_logger("registry")

SILENCE_S = 10.0
"""A stream that says nothing for so long is opened anew, from where it was."""
AGAIN_S = 0.2


class EtcdWatch:
    """A watch of an EtcdRegistry; `on_closed(self)` is called once when it ends."""

    def __init__(
        self,
        connection: EtcdConnection,
        prefix: str,
        on_changes: OnChanges,
        after: Listing | None,
        on_closed: Callable[[EtcdWatch], None],
        *,
        patient: bool = False,
    ) -> None:
        self.prefix = prefix
        self.num_streams = 0
        self.num_listings = 0
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._on_changes = on_changes
        self._on_closed = on_closed
        self._patient = patient
        self._known = KnownEntries(after)
        self._cluster_id = 0
        self._must_list = after is None
        self._stream: EtcdStream | None = None
        self._followed: EtcdLink | None = None
        self._doubt: asyncio.TimerHandle | None = None
        self._closed = False

    async def start(self) -> None:
        """Tell what is there, if nothing is known yet, and follow. BrokenError: etcd is silent."""
        if self._must_list:
            await self._list()
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"watch {self.prefix}")

    def close(self) -> None:
        """No more calls."""
        if self._closed:
            return
        self._closed = True
        self._on_closed(self)
        if self._doubt is not None:
            self._doubt.cancel()
        if self.task is not None:
            self.task.cancel()

    async def _run(self) -> None:
        while not self._closed:
            try:
                link = await self._connection.wait_link()
                if not self._must_list and self._followed not in (None, link):
                    self._must_list = not await self._is_as_told()
                if self._must_list:
                    await self._list()
                await self._follow(link)
            except BrokenError:
                self._connection.doubt()
                await asyncio.sleep(AGAIN_S)
            except XllmError as error:
                _log.warning("watch_refused", prefix=self.prefix, error=error.message)
                await asyncio.sleep(AGAIN_S)
            except Exception as error:  # whatever it is: without a watch nobody is found
                _log.error("watch_failed", prefix=self.prefix, error=describe_error(error))
                await asyncio.sleep(AGAIN_S)

    async def _list(self) -> None:
        """Tell how etcd's listing differs from what was told."""
        request = list_request(self.prefix)
        answer = await self._connection.read(
            lambda link, limit_s: link.call(link.kv.Range, request, limit_s)
        )
        self.num_listings += 1
        listing = as_listing(answer)
        other = self._cluster_id not in (0, answer.header.cluster_id)
        if other or listing.revision < self._known.revision:
            _log.warning("registry_began_anew", prefix=self.prefix, revision=listing.revision)
            self._connection.disturb()
        self._cluster_id = answer.header.cluster_id
        self._must_list = False
        doubtful = self._doubtful
        if doubtful:
            self._doubt_for_a_while()
        self._tell(self._known.replace(listing, keep_missing=doubtful))

    async def _is_as_told(self) -> bool:
        """Whether etcd had what was told, at the revision up to which it was. The key that was
        written last and the count of keys stand for the rest."""
        request = witness_request(self.prefix, self._known.revision)
        try:
            answer = await self._connection.read(
                lambda link, limit_s: link.call(link.kv.Range, request, limit_s)
            )
        except InvalidRequestError:  # it has not come as far, or has compacted it
            return False
        last = as_entry(answer.kvs[0]) if answer.kvs else None
        return self._known.is_like(last, answer.count)

    @property
    def _doubtful(self) -> bool:
        """Whether a deletion is not to be believed yet."""
        return self._patient and self._connection.disturbed_s > 0

    async def _follow(self, link: EtcdLink) -> None:
        """Tell what a stream says, until it ends, is silent, or a listing is needed."""
        request = watch_request(self.prefix, self._known.revision)
        self._followed = link
        stream = self._stream = link.open_watch(request)
        self.num_streams += 1
        try:
            while not self._must_list:
                async with asyncio.timeout(SILENCE_S):
                    response = await stream.read()
                await self._take(response, link)
        except TimeoutError:
            pass  # nothing happened, or it is dead: a new one tells
        finally:
            self._stream = None
            stream.close()

    async def _take(self, response: Any, link: EtcdLink) -> None:
        header = response.header
        if response.compact_revision:
            self._must_list = True
            return
        if response.canceled:
            await link.authenticate_again()
            raise BrokenError(f"etcd ended a watch: {response.cancel_reason}")
        if response.created:
            other = self._cluster_id not in (0, header.cluster_id)
            self._cluster_id = self._cluster_id or header.cluster_id
            # A member that is behind looks like one that lost something: a listing tells.
            self._must_list = other or header.revision < self._known.revision
        elif response.events:
            self._take_changes(as_changes(response.events))
        else:
            self._known.advance(header.revision)

    def _take_changes(self, changes: Sequence[Change]) -> None:
        if self._doubtful and any(one.entry is None for one in changes):
            self._doubt_for_a_while()
            changes = [one for one in changes if one.entry is not None]
        self._tell(self._known.apply(changes))

    def _doubt_for_a_while(self) -> None:
        """List again when deletions are to be believed."""
        if self._doubt is None:
            loop = asyncio.get_running_loop()
            self._doubt = loop.call_later(self._connection.disturbed_s + 0.01, self._doubt_over)

    def _doubt_over(self) -> None:
        self._doubt = None
        if self._connection.disturbed_s:
            self._doubt_for_a_while()
            return
        self._must_list = True
        if self._stream is not None:
            self._stream.close()

    def _tell(self, news: Sequence[Change]) -> None:
        if not news or self._closed:
            return
        try:
            self._on_changes(news)
        except Exception as error:
            _log.error("handler_failed", where="registry watch", error=describe_error(error))
