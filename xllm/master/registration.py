"""An instance's entry in the registry: written when its worker is ready, kept, withdrawn.

A registry that does not answer, or takes no writes, costs nothing but being found: the first write
is tried again until it succeeds. The lease is the Registration's business.
"""

from __future__ import annotations

import asyncio

import structlog

from xllm.config.settings import Settings
from xllm.errors import FencedError, OverloadedError, TransportError, XllmError
from xllm.protocol.codec import encode
from xllm.protocol.message import PROTOCOL_VERSION
from xllm.protocol.records import InstanceRecord, instance_key
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.keeper import Registration
from xllm.protocol.registry.open import open_registry
from xllm.protocol.step import WorkerReady
from xllm.protocol.transport.context import Transport

_log = structlog.get_logger("registration")
_AGAIN_S = 1.0


class InstanceRegistration:
    """Registers one instance; nowhere if the cluster has no registry."""

    def __init__(self, settings: Settings, name: str, transport: Transport) -> None:
        cluster = settings.cluster
        self._registry: Registry | None = None
        self._record: InstanceRecord | None = None
        self._cluster = cluster
        self._name = name
        self._registration: Registration | None = None
        self._withdrawn = False
        self._writing = asyncio.Lock()
        if cluster.registry:
            self._registry = open_registry(cluster.registry, transport, etcd=settings.etcd)

    async def publish(self, record: InstanceRecord) -> None:
        """Write the record, or write it anew; returns when it is there."""
        if self._registry is None:
            return
        self._record = record
        async with self._writing:
            if self._registration is None:
                await self._register(self._registry)
                return
            await self._registration.refresh()

    async def _register(self, registry: Registry) -> None:
        registration = Registration(
            registry,
            instance_key(self._cluster.name, self._name),
            self._encoded,
            self._cluster.lease_s,
        )
        while not self._withdrawn:
            try:
                await registration.start()
            except (TransportError, FencedError, OverloadedError) as error:
                _log.warning("registry_unreachable", error=error.message)
            except XllmError as error:  # it refuses us, until somebody changes its mind
                _log.error("registration_refused", error=error.message)
            else:
                self._registration = registration
                return
            await asyncio.sleep(_AGAIN_S)

    async def withdraw(self) -> None:
        """End the registration and the connection; a write under way is waited for a little, so
        that it does not come after the withdrawal."""
        self._withdrawn = True
        try:
            async with asyncio.timeout(_AGAIN_S):
                await self._writing.acquire()
        except TimeoutError:
            _log.warning("registry_unreachable", error="a write is still unanswered")
        if self._registration is not None:
            await self._registration.withdraw()
        if self._registry is not None:
            await self._registry.close()

    def _encoded(self) -> bytes:
        assert self._record is not None
        return encode(self._record)


def make_record(
    ready: WorkerReady,
    settings: Settings,
    *,
    name: str,
    incarnation: str,
    endpoint: str,
    bus_endpoint: str,
    public_key: str,
) -> InstanceRecord:
    """What the registry says of an instance whose worker is ready."""
    return InstanceRecord(
        name=name,
        incarnation=incarnation,
        endpoint=endpoint,
        bus_endpoint=bus_endpoint,
        model=ready.model,
        model_path=settings.model.path,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        block_size=ready.block_size,
        num_blocks=ready.num_blocks,
        eos_ids=ready.eos_ids,
        revision=ready.revision,
        fingerprint=ready.fingerprint,
        engine=settings.worker.engine,
        device=ready.device,
        public_key=public_key,
        task=ready.task,
        embedding_size=ready.embedding_size,
        max_num_seqs=settings.scheduler.max_num_seqs,
        protocol=PROTOCOL_VERSION,
    )
