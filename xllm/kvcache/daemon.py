"""The KV cache daemon's shell: sockets, heartbeats, registration. Decisions are in `service`.

Invariant: every change of the stored hashes is in exactly one heartbeat, so that a router that
heard them all, or took a snapshot after a gap, knows what is here.
"""

from __future__ import annotations

import asyncio
import functools
import os
import uuid

import structlog

from xllm.config.settings import Settings
from xllm.errors import (
    BackpressureError,
    BrokenError,
    FencedError,
)
from xllm.kvcache.arena import Arena
from xllm.kvcache.dram import DramTier
from xllm.kvcache.service import CacheService
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.bus import BlockEvents, DaemonHeartbeat, SnapshotOfBlocks
from xllm.protocol.cache import CacheRefused, CacheReply, CacheRequest
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.instance import QuerySnapshot
from xllm.protocol.message import PROTOCOL_VERSION
from xllm.protocol.records import DaemonRecord, daemon_key
from xllm.protocol.registry.holder import own_process
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.keeper import Registration, register
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import own_endpoint
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.protocol.transport.router import RouterSocket

_log = structlog.get_logger("kvcache")
METRICS_PERIOD_S = 1.0
_TOPIC = b"daemon"


def daemon_name(settings: Settings) -> str:
    """The name of this process."""
    return settings.kvcache.name or f"kvcache-{os.getpid()}"


class KvCacheDaemon(Actor):
    """One node's daemon, with one arena. Without `cluster.registry` it registers nowhere."""

    def __init__(self, settings: Settings, transport: Transport | None = None) -> None:
        super().__init__(daemon_name(settings), transport, settings.cluster.keys_dir)
        self.incarnation = uuid.uuid4().hex
        self._settings = settings
        self._arena = Arena(settings.kvcache.dram_bytes)
        self.tier = DramTier(settings.kvcache.dram_bytes)
        self._service = CacheService(self.tier, self._arena.path, settings.kvcache.dram_bytes)
        self._reporter: LaunchReporter | None = None
        self._socket: RouterSocket[CacheRequest | QuerySnapshot] | None = None
        self._bus: PublisherSocket | None = None
        self._registry: Registry | None = None
        self._registration: Registration | None = None
        self._seq = 0
        self._metrics_at = 0.0

    async def start(self) -> None:
        """Bind, register, begin to beat."""
        settings = self._settings
        run_dir = settings.cluster.run_dir
        self._reporter = LaunchReporter(
            self.transport, settings.cluster.launcher, "kvcache", self.name
        )
        self._reporter.started()
        self._socket = RouterSocket(
            self.transport,
            own_endpoint(settings.kvcache.endpoint, run_dir, f"{self.name}-kvcache"),
            Decoder(CacheRequest | QuerySnapshot),
            self._on_message,
            on_gone=self._service.forget,
            bad_reply=lambda text: CacheRefused(-1, "bad_message", text),
            name="kvcache",
        )
        self._bus = PublisherSocket(
            self.transport,
            own_endpoint(settings.kvcache.bus_endpoint, run_dir, f"{self.name}-kvcache-bus"),
        )
        self.every(settings.cluster.heartbeat_s, self._beat)
        if settings.cluster.registry:
            self._registry = open_registry(
                settings.cluster.registry, self.transport, etcd=settings.etcd
            )
            self._registration = Registration(
                self._registry,
                daemon_key(settings.cluster.name, self.name),
                lambda: encode(self.record()),
                settings.cluster.lease_s,
                incarnation=self.incarnation,
                setting="kvcache.name",
                on_replaced=functools.partial(self.request_stop, FencedError.exit_code),
            )
            await register(settings.cluster, self._registration)
        _log.info("kvcache_ready", name=self.name, dram_bytes=settings.kvcache.dram_bytes)
        self._reporter.ready(
            (("kvcache", self._socket.endpoint),),
            f"{settings.kvcache.dram_bytes >> 20} MiB DRAM",
        )

    async def stop(self) -> None:
        """Withdraw, then close: peers see every block as a miss."""
        if self._registration is not None:
            await self._registration.withdraw()
        if self._registry is not None:
            await self._registry.close()
        for socket in (self._socket, self._bus, self._reporter):
            if socket is not None:
                socket.close()
        self._arena.close()

    def record(self) -> DaemonRecord:
        """What the registry says of this process."""
        assert self._socket is not None
        assert self._bus is not None
        return DaemonRecord(
            name=self.name,
            incarnation=self.incarnation,
            endpoint=self._socket.endpoint,
            bus_endpoint=self._bus.endpoint,
            node=os.uname().nodename,
            dram_bytes=self._settings.kvcache.dram_bytes,
            public_key=self.transport.public_key,
            protocol=PROTOCOL_VERSION,
            process=own_process(),
        )

    def _on_message(
        self, identity: bytes, message: CacheRequest | QuerySnapshot, frames: list[bytes]
    ) -> None:
        reply: CacheReply | SnapshotOfBlocks
        if isinstance(message, QuerySnapshot):
            # What changed since the last beat goes out first, so that the snapshot has a number.
            self._beat()
            reply = SnapshotOfBlocks(
                self.name, self.incarnation, self._seq, self.tier.stored_hashes(), "dram"
            )
        else:
            reply = self._service.handle(identity, message)
        assert self._socket is not None
        try:
            self._socket.send(identity, reply)
        except (BrokenError, BackpressureError):
            self._service.forget(identity)  # it left, or reads nothing: its deadline tells it

    def _beat(self) -> None:
        assert self._bus is not None
        now = asyncio.get_running_loop().time()
        metrics = b""
        if now - self._metrics_at >= METRICS_PERIOD_S:
            self._metrics_at = now
            metrics = self._service.metrics() + self.transport.metrics()
        stored, removed = self.tier.take_events()
        events = (BlockEvents(stored, removed, "dram"),) if stored or removed else ()
        counts = self.tier.statistics()
        self._seq += 1
        beat = DaemonHeartbeat(
            self.name,
            self.incarnation,
            self._seq,
            dram_blocks=counts.num_blocks,
            dram_bytes=counts.used_bytes,
            dram_capacity_bytes=counts.capacity_bytes,
            events=events,
            metrics=metrics,
            num_cached=self.tier.num_hashes,
            digest=self.tier.digest,
        )
        self._bus.publish(_TOPIC, beat)
