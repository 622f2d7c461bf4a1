"""What a leader commands of an instance: its role, and that it drains.

A shell around the gate of epochs: an epoch out of range is looked up in the registry, once a second
at most, and a command under it waits for that; of a connection's only the last one of each kind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from xllm.errors import XllmError
from xllm.master.fencing import EpochGate
from xllm.protocol.epochs import MAX_BASE
from xllm.protocol.instance import ROLES, AssignRole, Drained, DrainInstance

if TYPE_CHECKING:
    from xllm.master.served_model import ServedModel

_log = structlog.get_logger("leader")

LOOK_UP_S = 1.0
"""Between two questions to the registry who leads."""

Command = AssignRole | DrainInstance


class LeaderCommands:
    """`master`: the model that is commanded; `send(router, message)` answers a connection, and
    `name_of(router)` is whose it is, where that is known."""

    def __init__(
        self,
        master: ServedModel,
        send: Callable[[bytes, msgspec.Struct], None],
        name_of: Callable[[bytes], str],
    ) -> None:
        self.role = "both"
        self._master = master
        self._send = send
        self._name_of = name_of
        self._epochs = EpochGate()
        self._unproven: dict[tuple[bytes, type[Command]], Command] = {}
        """By connection, the last commands under epochs that the registry must confirm."""
        self._is_looking_up = False
        self._looked_up_at = -LOOK_UP_S
        self._ignored: set[bytes] = set()
        """Connections whose epochs were ignored, and named in the log."""

    def command(self, router: bytes, message: Command) -> None:
        """A connection commands."""
        if not self._epochs.is_out_of_range(message.epoch):
            self._carry_out(router, message)
            return
        key = router, type(message)
        self._unproven.pop(key, None)  # to the end: they are carried out as they came
        self._unproven[key] = message
        if not self._is_looking_up:
            self._is_looking_up = True
            self._master.spawn(self._prove())

    def gone(self, router: bytes) -> None:
        """Nothing is kept of that connection."""
        for kind in (AssignRole, DrainInstance):
            self._unproven.pop((router, kind), None)
        self._ignored.discard(router)

    def _carry_out(self, router: bytes, message: Command) -> None:
        refusal = self._epochs.refusal(message.epoch)
        if refusal is not None:
            self._master.metrics.num_stale_commands += 1
            _log.warning("epoch_refused", epoch=refusal.epoch, highest=refusal.highest)
            self._send(router, refusal)
        elif isinstance(message, DrainInstance):
            self._master.begin_drain()
            self._master.spawn(self._drain(router, message.timeout_ms / 1000))
        elif message.role not in ROLES:
            _log.error("unknown_role", role=message.role[:40], epoch=message.epoch)
        elif message.role != self.role:
            _log.info("role_assigned", role=message.role, epoch=message.epoch)
            self.role = message.role
            self._master.beat()

    async def _drain(self, router: bytes, timeout_s: float) -> None:
        num_aborted = await self._master.drain(timeout_s)
        self._send(router, Drained(num_aborted))

    async def _prove(self) -> None:
        """Carry out, or ignore, what waits for the registry's word."""
        try:
            while self._unproven:
                await asyncio.sleep(self._looked_up_at + LOOK_UP_S - time.monotonic())
                waiting = dict(self._unproven)
                await self._look_up()
                self._looked_up_at = time.monotonic()
                for key, message in waiting.items():
                    if self._unproven.get(key) is not message:
                        continue  # the connection is gone, or has said another word since
                    del self._unproven[key]
                    router, _ = key
                    if self._epochs.is_out_of_range(message.epoch):
                        self._ignore(router, message)
                    else:
                        self._carry_out(router, message)
        finally:
            self._is_looking_up = False

    async def _look_up(self) -> None:
        try:
            self._epochs.named(await self._master.registration.leader_epoch())
        except XllmError as error:
            _log.warning("leader_unknown", error=error.message)

    def _ignore(self, router: bytes, message: Command) -> None:
        self._master.metrics.num_epochs_out_of_range += 1
        if router not in self._ignored:
            self._ignored.add(router)
            _log.error(
                "epoch_out_of_range",
                of=self._name_of(router),
                message=type(message).__name__,
                epoch=message.epoch,
                most=MAX_BASE,
            )
