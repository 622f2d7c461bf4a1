"""The election's shell: makes the calls that `election` asks for, and tells it what came of them.

It decides nothing. The clock is the machine's, time asleep included (CLOCK_BOOTTIME): a lease
runs on while a machine sleeps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import structlog

from xllm.errors import XllmError
from xllm.protocol.registry.interface import Registry, Watch
from xllm.protocol.registry_wire import Change, Entry
from xllm.protocol.transport.context import describe_error
from xllm.router.leadership.election import Call, Election, Step

_log = structlog.get_logger("leadership")

T = TypeVar("T")


def boot_clock() -> float:
    """Seconds since the machine started, those that it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Candidate:
    """One router's candidacy for the key `key`, with `value` as its entry. `on_change()` is called
    when this process begins or ceases to lead and when the leader key changed; `spawn` runs a
    coroutine."""

    def __init__(
        self,
        registry: Registry,
        key: str,
        value: bytes,
        ttl_s: float,
        on_change: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._registry = registry
        self._key = key
        self._value = value
        self._on_change = on_change
        self._spawn = spawn
        self._clock = clock
        self._ttl_s = ttl_s
        self._election = Election(ttl_s)
        self._watch: Watch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._released = asyncio.Event()
        self._told: tuple[int, Entry | None] = (0, None)
        self._is_failing = False
        self._closed = False

    @property
    def epoch(self) -> int:
        """The epoch while this process leads for certain, else 0. Ask before each act."""
        return self._election.epoch if self._election.leads(self._clock()) else 0

    @property
    def entry(self) -> Entry | None:
        """The leader key as last heard of."""
        return self._election.entry

    async def start(self) -> None:
        """Watch the key and run for it. TransportError: the registry does not answer."""
        self._watch = await self._registry.watch(self._key, self._changed)
        self._pump()

    def outbid(self, epoch: int) -> None:
        """That epoch was heard of somewhere: a leader of a lower one steps down."""
        if 0 < self._election.epoch < epoch:
            _log.warning("leader_outbid", epoch=self._election.epoch, by=epoch)
            self._election.outbid(epoch)
            self._pump()

    def disproved(self, epoch: int) -> None:
        """The registry refused a write under that epoch: another leads, or nobody."""
        if self._election.epoch == epoch:
            _log.warning("leader_disproved", epoch=epoch)
            self._election.outbid(epoch + 1)
            self._pump()

    def tick(self) -> None:
        """Now and then: after a pause of the process, what has ended ends here first."""
        self._pump()

    async def resign(self) -> None:
        """Lead no more, and let another at once. Returns when the registry knows; the caller
        bounds the time."""
        self._election.resign()
        self._pump()
        await self._released.wait()

    def close(self) -> None:
        """End the candidacy; a lease that stands is left to lapse."""
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        if self._timer is not None:
            self._timer.cancel()

    # -- what happens ------------------------------------------------------------------------

    def _changed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.key == self._key:
                self._election.seen(change.entry, change.revision)
        self._pump()

    def _pump(self) -> None:
        """Make the calls that are due, say what changed, come back in time."""
        if self._closed:
            return
        now = self._clock()
        call = self._election.next_call(now)
        if call is not None:
            self._spawn(self._make(call))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wake_at = self._election.wake_at(now)
        if wake_at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(wake_at - now, 0.0), self._pump)
        if self._election.has_released:
            self._released.set()
        else:
            self._released.clear()
        state = (self._election.epoch, self._election.entry)
        if state != self._told:
            self._told = state
            self._on_change()

    async def _make(self, call: Call) -> None:
        """Make one call of the registry and tell the election its answer."""
        election, registry = self._election, self._registry
        if call.step is Step.GRANT:
            lease = await self._within(call, registry.grant(self._ttl_s))
            election.granted(call, lease, self._clock())
        elif call.step is Step.CLAIM:
            claim = registry.compare_and_set(self._key, 0, self._value, call.lease_id)
            election.claimed(call, await self._within(call, claim), self._clock())
        elif call.step is Step.RENEW:
            left_s = await self._within(call, registry.keep_alive(call.lease_id))
            election.renewed(call, left_s, self._clock())
        else:
            done = await self._within(call, self._end(call.lease_id))
            election.revoked(call, done is not None, self._clock())
        self._pump()

    async def _end(self, lease_id: int) -> bool:
        await self._registry.revoke(lease_id)
        return True

    async def _within(self, call: Call, asked: Awaitable[T]) -> T | None:
        """The answer; None where it did not come in time, or was an error."""
        try:
            async with asyncio.timeout(call.timeout_s):
                answer = await asked
        except Exception as error:  # whatever it is: unanswered, and tried again
            if not self._is_failing:
                text = error.message if isinstance(error, XllmError) else describe_error(error)
                _log.warning("election_call_failed", step=call.step.value, error=text)
            self._is_failing = True
            return None
        self._is_failing = False
        return answer
