"""The registry interface over etcd.

It translates and nothing else: the way to the cluster is the connection's, what a watch tells is
the watch's. Reads are linearizable and tried at other members; writes are sent once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any

from xllm.config.etcd import EtcdSettings
from xllm.errors import ClosedError, FencedError
from xllm.protocol.registry.bounds import check_guarded, check_ttl, check_write
from xllm.protocol.registry.etcd_address import EtcdAddress
from xllm.protocol.registry.etcd_connection import EtcdConnection
from xllm.protocol.registry.etcd_link import EtcdLink
from xllm.protocol.registry.etcd_stubs import rpc_pb2
from xllm.protocol.registry.etcd_watch import EtcdWatch
from xllm.protocol.registry.etcd_wire import (
    as_entry,
    as_listing,
    cas_request,
    cas_result,
    guarded_request,
    list_request,
)
from xllm.protocol.registry.interface import MIN_TTL_S, OnChanges
from xllm.protocol.registry_wire import CasResult, Entry, Lease, Listing


class EtcdRegistry:
    """A Registry in the etcd cluster at `address`. Make it inside the running loop."""

    def __init__(
        self,
        address: EtcdAddress,
        settings: EtcdSettings | None = None,
        *,
        timeout_s: float = 3.0,
        first_timeout_s: float | None = None,
    ) -> None:
        self.connection = EtcdConnection(
            address,
            settings if settings is not None else EtcdSettings(),
            timeout_s=timeout_s,
            first_timeout_s=timeout_s if first_timeout_s is None else first_timeout_s,
        )
        self._watches: set[EtcdWatch] = set()
        self._closed = False

    @property
    def degraded(self) -> bool:
        """Whether etcd did not answer of late, or has no space for writes."""
        return self.connection.degraded

    async def grant(self, ttl_s: float) -> Lease:
        """See Registry. etcd counts whole seconds: the time is rounded up."""
        check_ttl(ttl_s)
        request = rpc_pb2.LeaseGrantRequest(TTL=math.ceil(max(ttl_s, MIN_TTL_S)))
        answer = await self.connection.write(
            lambda link, limit_s: link.call(link.lease.LeaseGrant, request, limit_s)
        )
        return Lease(answer.ID, float(answer.TTL))

    async def keep_alive(self, lease_id: int) -> float:
        """See Registry."""
        return await self.connection.read(lambda link, limit_s: link.keep_alive(lease_id, limit_s))

    async def revoke(self, lease_id: int) -> None:
        """See Registry."""
        request = rpc_pb2.LeaseRevokeRequest(ID=lease_id)
        try:
            await self.connection.write(
                lambda link, limit_s: link.call(link.lease.LeaseRevoke, request, limit_s)
            )
        except FencedError:
            pass  # there is no such lease, as was asked

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """See Registry."""
        check_write(key, value)
        request = rpc_pb2.PutRequest(key=key.encode(), value=value, lease=lease_id)
        answer = await self._write_key(lambda link: link.kv.Put, request)
        revision: int = answer.header.revision
        return revision

    async def get(self, key: str) -> Entry | None:
        """See Registry."""
        answer = await self._range(rpc_pb2.RangeRequest(key=key.encode()))
        return as_entry(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str) -> Listing:
        """See Registry."""
        return as_listing(await self._range(list_request(prefix)))

    async def delete(self, key: str) -> bool:
        """See Registry."""
        answer = await self._write_key(
            lambda link: link.kv.DeleteRange, rpc_pb2.DeleteRangeRequest(key=key.encode())
        )
        return bool(answer.deleted)

    async def compare_and_set(
        self, key: str, expected_mod_revision: int, value: bytes, lease_id: int = 0
    ) -> CasResult:
        """See Registry."""
        check_write(key, value)
        request = cas_request(key, expected_mod_revision, value, lease_id)
        return cas_result(await self._write_key(lambda link: link.kv.Txn, request))

    async def write_guarded(
        self,
        guard: str,
        create_revision: int,
        puts: Sequence[tuple[str, bytes]] = (),
        deletes: Sequence[str] = (),
    ) -> bool:
        """See Registry."""
        check_guarded(puts, deletes)
        request = guarded_request(guard, create_revision, puts, deletes)
        return bool((await self._write_key(lambda link: link.kv.Txn, request)).succeeded)

    async def watch(
        self,
        prefix: str,
        on_changes: OnChanges,
        *,
        after: Listing | None = None,
        patient: bool = False,
    ) -> EtcdWatch:
        """See Registry. Patience ends `OUTAGE_GRACE_S` after an outage."""
        if self._closed:
            raise ClosedError("the registry is closed")
        watch = EtcdWatch(
            self.connection, prefix, on_changes, after, self._watches.discard, patient=patient
        )
        self._watches.add(watch)
        try:
            await watch.start()
        except BaseException:
            watch.close()
            raise
        self.connection.start_probing()
        return watch

    async def close(self) -> None:
        """See Registry."""
        if self._closed:
            return
        self._closed = True
        watches = list(self._watches)
        for watch in watches:
            watch.close()
        await asyncio.gather(*(one.task for one in watches if one.task), return_exceptions=True)
        await self.connection.close()

    async def _range(self, request: Any) -> Any:
        return await self.connection.read(
            lambda link, limit_s: link.call(link.kv.Range, request, limit_s)
        )

    async def _write_key(self, method: Callable[[EtcdLink], Any], request: Any) -> Any:
        return await self.connection.write(
            lambda link, limit_s: link.call(method(link), request, limit_s)
        )
