"""The router's shell: it puts the parts of a router together, starts and ends them in order.

It decides nothing and carries nothing: `membership` knows the cluster, `service` the requests, the
fronts the clients. A further part is made in `start`, hears of the cluster as a listener of
`membership`, and leaves its end in `_closers`.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import structlog
from prometheus_client import generate_latest

from xllm.config.exposure import check_exposure
from xllm.config.models import each_model, model_name
from xllm.config.settings import Settings
from xllm.errors import ConfigError, FencedError
from xllm.protocol.actor.base import Actor
from xllm.protocol.actor.reporter import LaunchReporter
from xllm.protocol.bus import RouterPresence
from xllm.protocol.codec import encode
from xllm.protocol.instance import InstanceRequest
from xllm.protocol.message import PROTOCOL_VERSION
from xllm.protocol.records import LeaderRecord, RouterRecord, router_key
from xllm.protocol.registry.holder import own_process
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.keeper import Registration, register, wait_for_name
from xllm.protocol.registry.open import open_registry
from xllm.protocol.transport.context import Transport
from xllm.protocol.transport.endpoint import own_endpoint
from xllm.protocol.transport.pubsub import PublisherSocket
from xllm.router.http.server import HttpFront
from xllm.router.kv_listener import KvListener
from xllm.router.leadership.part import Leadership
from xllm.router.link_pulse import LinkPulse
from xllm.router.membership import Membership
from xllm.router.peers import Peers
from xllm.router.service import RouterService
from xllm.router.shared_key import SharedKeys
from xllm.router.text.model import load_text_model
from xllm.router.wire_figures import WireFigures
from xllm.router.zmq_front import ZmqFront

_log = structlog.get_logger("router")
TICK_S = 0.1
METRICS_PERIOD_S = 1.0
"""How often the other routers, where there are any, are told what /metrics says of this one."""
LAST_WORD_S = 0.1
"""What last messages get to leave the sockets, which close without lingering."""
_TOPIC = b"router"


def router_name(settings: Settings) -> str:
    """The name of this process."""
    return settings.router.name or f"router-{os.getpid()}"


class RouterActor(Actor):
    """One router process. The models' paths are directories."""

    def __init__(self, settings: Settings, transport: Transport | None = None) -> None:
        check_exposure(settings)
        super().__init__(router_name(settings), transport, settings.cluster.keys_dir)
        self.incarnation = uuid.uuid4().hex
        self._settings = settings
        self._closers: list[Callable[[], None]] = []
        self._reporter: LaunchReporter | None = None
        self._registry: Registry | None = None
        self._registration: Registration | None = None
        self._http: HttpFront | None = None
        self.leadership: Leadership | None = None
        self._seq = 0
        self._metrics_at = 0.0
        self.http_address = ""

    # -- starting ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the text side, watch the cluster, open the fronts, register."""
        settings = self._settings
        self._reporter = LaunchReporter(
            self.transport, settings.cluster.launcher, "router", self.name
        )
        self._closers.append(self._reporter.close)
        self._reporter.started()
        models = [one.model for one in each_model(settings)]
        kept = settings.router.text_cache_bytes
        texts = {model_name(one.name, one.path): load_text_model(one.path, kept) for one in models}
        first = next(iter(texts))
        self.service = RouterService(
            settings,
            first,
            texts.pop(first),
            self,
            name=self.name,
            incarnation=self.incarnation,
            more=texts,
        )
        self._closers.append(self.service.close)
        self.service.registry.register(WireFigures(self.transport))
        self.membership = Membership(self.name, self.transport, self.service)
        self._closers.append(self.membership.close)
        self._pulse = LinkPulse(
            self.membership, self.service.view, settings.cluster.heartbeat_s, time.monotonic
        )
        peers = Peers()
        self.membership.listeners.append(peers)
        self._kv = KvListener(self.transport, self.membership, self.service.kv)
        self._closers.append(self._kv.close)
        bus = settings.router.bus_endpoint
        bus = own_endpoint(bus, settings.cluster.run_dir, f"{self.name}-bus")
        self._bus = PublisherSocket(self.transport, bus)
        self._closers.append(self._bus.close)
        self.every(TICK_S, self._tick)
        self.every(settings.cluster.heartbeat_s, self._beat)
        await self._join_cluster()
        # Not before: who asks a router that knows no instance is refused.
        zmq_endpoint = f"tcp://{_bracketed(settings.router.zmq_host)}:{settings.router.zmq_port}"
        self.zmq = ZmqFront(
            self.transport,
            zmq_endpoint,
            self.service,
            self.spawn,
            max_bytes=settings.router.max_body_bytes,
            peers=lambda: peers.addresses,
        )
        self._closers.append(self.zmq.close)
        self._http = HttpFront(self.service, settings)
        self.http_address = await self._http.start()
        assert self._registration is not None
        await register(settings.cluster, self._registration)
        await self._run_for_leader()
        addresses = (("http", self.http_address), ("zmq", self.zmq.endpoint))
        _log.info("router_ready", http=self.http_address, zmq=self.zmq.endpoint)
        names = ", ".join(one.name for one in self.service.served)
        self._reporter.ready(addresses, f"serves {names} while an instance of the model is ready")

    async def _join_cluster(self) -> None:
        cluster = self._settings.cluster
        if not cluster.registry:
            raise ConfigError("cluster.registry is not set", param="cluster.registry")
        registry = self._registry = open_registry(
            cluster.registry, self.transport, etcd=self._settings.etcd
        )
        self._registration = Registration(
            registry,
            router_key(cluster.name, self.name),
            lambda: encode(self.record()),
            cluster.lease_s,
            incarnation=self.incarnation,
            setting="router.name",
            on_replaced=functools.partial(self.request_stop, FencedError.exit_code),
        )
        await wait_for_name(cluster, self._registration)
        await self.membership.join(registry, cluster)
        keys = SharedKeys(registry, cluster, self._sign_with, self.spawn)
        self._closers.append(keys.close)
        await keys.join()
        self.service.complaints.append(keys.complaints)

    def _sign_with(self, keys: tuple[bytes, ...]) -> None:
        self.service.event_keys = keys

    def record(self) -> RouterRecord:
        """What the registry says of this process."""
        return RouterRecord(
            name=self.name,
            incarnation=self.incarnation,
            zmq_endpoint=self.zmq.endpoint,
            http_address=self.http_address,
            bus_endpoint=self._bus.endpoint,
            public_key=self.transport.public_key,
            protocol=PROTOCOL_VERSION,
            process=own_process(),
        )

    async def _run_for_leader(self) -> None:
        assert self._registry is not None
        self.leadership = Leadership(
            LeaderRecord(
                name=self.name, incarnation=self.incarnation, zmq_endpoint=self.zmq.endpoint
            ),
            self._settings.cluster,
            self._registry,
            self.membership,
            self.service,
            self.spawn,
        )
        self._closers.append(self.leadership.close)
        await self.leadership.start()

    # -- stopping ----------------------------------------------------------------------------

    async def stop(self) -> None:
        """Refuse new requests, let open ones end, fail the rest, close."""
        grace_s = self._settings.cluster.shutdown_s
        if self._http is not None:
            self.service.submission.draining = True
            self._http.drain()
            self.zmq.say_stopping()
            num_open = self.service.num_open
            if self._reporter is not None:
                self._reporter.stopping(num_open)
            withdrawal = self.spawn(self._withdraw(grace_s))
            num_failed = await self.service.drain(grace_s)
            _log.info("router_drained", num_open=num_open, num_failed=num_failed)
            await asyncio.gather(withdrawal, self._http.stop())
            if num_open:
                await asyncio.sleep(LAST_WORD_S)
        else:
            await self._withdraw(grace_s)
        if self._registry is not None:
            await self._registry.close()
        for close in reversed(self._closers):
            close()

    async def _withdraw(self, timeout_s: float) -> None:
        """End leadership and registration; where the registry does not answer in time, their
        leases will."""
        ends: list[Coroutine[Any, Any, None]] = []
        if self.leadership is not None:
            ends.append(self.leadership.resign())
        if self._registration is not None:
            ends.append(self._registration.withdraw())
        try:
            await asyncio.wait_for(asyncio.gather(*ends), max(timeout_s, LAST_WORD_S))
        except TimeoutError:
            _log.warning("withdrawal_unanswered")

    # -- what happens ------------------------------------------------------------------------

    def send(self, instance: str, message: InstanceRequest) -> bool:
        """InstanceLinks for the service."""
        return self.membership.send(instance, message)

    def _tick(self) -> None:
        if self._registry is not None:
            silent = self._registration is not None and self._registration.degraded
            self.service.registry_degraded = silent or self._registry.degraded
        self.membership.tick()
        self.membership.changed(self.service.tick())
        self._pulse.tick()
        self._kv.tick()

    def _beat(self) -> None:
        self._seq += 1
        inflight = tuple((one.name, one.num_inflight) for one in self.service.view)
        word = RouterPresence(
            self.name,
            self.incarnation,
            self._seq,
            inflight,
            tenants=self.service.admission.word(),
        )
        now = time.monotonic()
        if self.service.view.routers and now - self._metrics_at >= METRICS_PERIOD_S:
            self._metrics_at = now
            word = msgspec.structs.replace(word, metrics=generate_latest(self.service.registry))
        if self.leadership is not None:
            self.leadership.tick()
            word = self.leadership.say(word)
        self._bus.publish(_TOPIC, word)
        self._pulse.beat()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
