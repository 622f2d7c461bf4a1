"""An instance's entry in the registry: written when its worker is ready, kept, withdrawn; and who
leads, where that is asked.

A registry that does not answer, or takes no writes, costs nothing but being found: the first write
is tried again until it succeeds. The lease is the Registration's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from xllm.config.settings import Settings
from xllm.errors import (
    FencedError,
    NameTakenError,
    OverloadedError,
    TransportError,
    XllmError,
)
from xllm.protocol.codec import Decoder, encode
from xllm.protocol.epochs import leader_epoch
from xllm.protocol.message import PROTOCOL_VERSION
from xllm.protocol.records import InstanceRecord, LeaderRecord, instance_key, leader_key
from xllm.protocol.registry.holder import own_process
from xllm.protocol.registry.interface import Registry
from xllm.protocol.registry.keeper import HELD_PAUSE_S, Registration
from xllm.protocol.registry.open import open_registry
from xllm.protocol.step import WorkerReady
from xllm.protocol.transport.context import Transport

_log = structlog.get_logger("registration")
_AGAIN_S = 1.0


class InstanceRegistration:
    """Registers one instance; nowhere if the cluster has no registry. `on_replaced`: see
    Registration."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        incarnation: str,
        transport: Transport,
        on_replaced: Callable[[str], None],
    ) -> None:
        cluster = settings.cluster
        self._leader_key = leader_key(cluster.name)
        self._registry: Registry | None = None
        self._record: InstanceRecord | None = None
        self._registration: Registration | None = None
        self._is_registered = False
        self._withdrawn = False
        self._writing = asyncio.Lock()
        if cluster.registry:
            self._registry = open_registry(cluster.registry, transport, etcd=settings.etcd)
            self._registration = Registration(
                self._registry,
                instance_key(cluster.name, name),
                self._encoded,
                cluster.lease_s,
                incarnation=incarnation,
                setting="master.name",
                drain_s=cluster.shutdown_s,
                on_replaced=on_replaced,
            )

    async def wait_for_name(self) -> None:
        """Return once no other living process has the name, or may have it; NameTakenError where
        one has."""
        if self._registration is not None:
            await self._until(self._registration.is_free)

    async def publish(self, record: InstanceRecord) -> None:
        """Write the record, or write it anew; returns when it is there. NameTakenError where
        another living process has the name."""
        if self._registration is None:
            return
        self._record = record
        async with self._writing:
            if self._is_registered:
                await self._registration.refresh()
                return
            self._is_registered = await self._until(self._registration.attempt)

    async def leader_epoch(self) -> int:
        """The epoch of the leader that the registry names; 0: nobody, or there is no registry.
        XllmError: it does not answer, or what it says cannot be read."""
        if self._registry is None:
            return 0
        entry = await self._registry.get(self._leader_key)
        if entry is None:
            return 0
        record = Decoder[LeaderRecord](LeaderRecord).decode(entry.value)
        return leader_epoch(record, entry.create_revision)

    async def _until(self, attempt: Callable[[], Awaitable[bool]]) -> bool:
        """Try again until it succeeds; False where it is over before that."""
        while not self._withdrawn:
            pause_s = _AGAIN_S
            try:
                if await attempt():
                    return True
                pause_s = HELD_PAUSE_S
            except NameTakenError:
                raise
            except (TransportError, FencedError, OverloadedError) as error:
                _log.warning("registry_unreachable", error=error.message)
            except XllmError as error:  # it refuses us, until somebody changes its mind
                _log.error("registration_refused", error=error.message)
            await asyncio.sleep(pause_s)
        return False

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
        process=own_process(),
    )
