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

from xllm.errors import InvalidRequestError, XllmError
from xllm.protocol.epochs import read_base
from xllm.protocol.registry.interface import Registry, Watch
from xllm.protocol.registry_wire import CasResult, Change, Entry
from xllm.protocol.transport.context import describe_error
from xllm.router.leadership.election import Call, Election, Step

_log = structlog.get_logger("leadership")

T = TypeVar("T")


def boot_clock() -> float:
    """Seconds since the machine started, those that it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Candidate:
    """One router's candidacy for the key `key`; epochs are counted from what `base_key` says, and
    `value(base)` is its entry. `on_change()` is called when this process begins or ceases to lead
    and when the leader key changed; `spawn` runs a coroutine."""

    def __init__(
        self,
        registry: Registry,
        key: str,
        base_key: str,
        value: Callable[[int], bytes],
        ttl_s: float,
        on_change: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], Any],
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._registry = registry
        self._key = key
        self._base_key = base_key
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
    def revision(self) -> int:
        """That created the own leader key: what guards a leader's writes. Meaningless without an
        epoch."""
        return self._election.revision

    @property
    def entry(self) -> Entry | None:
        """The leader key as last heard of."""
        return self._election.entry

    async def start(self) -> None:
        """Watch the key and run for it. TransportError: the registry does not answer."""
        self._watch = await self._registry.watch(self._key, self._changed)
        self._pump()

    def outbid(self, epoch: int) -> None:
        """That epoch was heard of somewhere: a leader of a lower one steps down, and none of this
        process will have a lower one."""
        self._outbid(epoch, self._election.outbid)

    def led(self, epoch: int) -> None:
        """Another router says that it leads under that epoch: none of this process will have the
        same one."""
        self._outbid(epoch, self._election.led)

    def _outbid(self, epoch: int, told: Callable[[int], None]) -> None:
        led = self._election.epoch
        told(epoch)
        if led and not self._election.epoch:
            _log.warning("leader_outbid", epoch=led, by=epoch)
            self._pump()

    def disproved(self, epoch: int) -> None:
        """The registry refused a write under that epoch: another leads, or nobody."""
        if self._election.epoch == epoch:
            _log.warning("leader_disproved", epoch=epoch)
            self._election.disproved()
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
            result, base = await self._claim(call)
            election.claimed(call, result, self._clock(), base=base)
        elif call.step is Step.RENEW:
            left_s = await self._within(call, registry.keep_alive(call.lease_id))
            election.renewed(call, left_s, self._clock())
        else:
            done = await self._within(call, self._end(call.lease_id))
            election.revoked(call, done is not None, self._clock())
        self._pump()

    async def _claim(self, call: Call) -> tuple[CasResult | None, int]:
        """Claim the key; then find what its epoch is counted from, which others may have raised
        since it was read for the entry. (None, 0): not answered."""
        said = await self._within(call, self._read_base())
        if said is None:
            return None, 0
        claim = self._registry.compare_and_set(self._key, 0, self._value(said[0]), call.lease_id)
        result = await self._within(call, claim)
        if result is None or not result.ok or result.entry is None:
            return result, 0
        own = result.entry
        base = await self._within(call, self._settle_base(own.create_revision))
        if base is None:
            return None, 0
        if base == said[0]:
            return result, base
        value = self._value(base)
        again = self._registry.compare_and_set(self._key, own.mod_revision, value, call.lease_id)
        return await self._within(call, again), base

    async def _settle_base(self, revision: int) -> int:
        """The epoch base, raised where an epoch counted from it would be none for a claim at that
        revision."""
        while True:
            base, mod_revision = await self._read_base()
            needed = self._election.needed_base(base, revision)
            if needed == base:
                return base
            value = b"%d" % needed
            if (await self._registry.compare_and_set(self._base_key, mod_revision, value)).ok:
                _log.warning("epoch_base_raised", base=needed, revision=revision)
                return needed

    async def _read_base(self) -> tuple[int, int]:
        """The epoch base, and the revision of the write that it is of (0: of none)."""
        entry = await self._registry.get(self._base_key)
        if entry is None:
            return 0, 0
        try:
            return read_base(entry.value), entry.mod_revision
        except InvalidRequestError as error:
            _log.error("bad_epoch_base", key=self._base_key, error=error.message)
            return 0, entry.mod_revision

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
