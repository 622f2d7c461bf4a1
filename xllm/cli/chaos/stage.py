"""What a scenario acts on: the cluster, the load, the ledger; and how it waits and notes.

A scenario calls `wait_load`, `strike` at the moment of the fault, `prove` that it happened,
`notice` for who saw it, and `settle` at its end. Without load or proof a run is invalid, which is
neither passed nor failed.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Collection

from xllm.cli.bench.http_stream import HttpAddress
from xllm.cli.chaos.cluster import POLL_S, ChaosCluster, KnownProcess
from xllm.cli.chaos.events import Event
from xllm.cli.chaos.ledger import Ledger
from xllm.cli.chaos.load import StreamLoad
from xllm.cli.chaos.surroundings import Surroundings
from xllm.cli.chaos.verdict import Injection, calm_in
from xllm.client.results import Completion
from xllm.errors import DeadlineError, XllmError

LOAD_S = 30.0
SETTLE_S = 60.0
ASK_AGAIN_S = 0.05
MIN_LEFT = 10
"""A stream counts as load while so many tokens of it are to come."""
LOST = ("instance_lost", "instance_silent")
"""What a router says of an instance that it gives up."""


class InvalidRunError(Exception):
    """A fault did not happen, or nobody was there to feel it."""


class Stage:
    """One cluster under load."""

    def __init__(
        self,
        cluster: ChaosCluster,
        load: StreamLoad,
        rng: random.Random,
        around: Surroundings,
    ) -> None:
        self.cluster = cluster
        self.load = load
        self.ledger: Ledger = load.ledger
        self.rng = rng
        self.around = around
        self.proxies = around.proxies
        self.registry = around.registry
        self.poison = around.poison
        """Tokens that do harm in the engines of this cluster, by what they do."""
        self.spared: tuple[str, ...] = ()
        """Names that are never picked, nor those below them."""
        self.injections: list[Injection] = []
        self._wall_offset = time.time() - time.monotonic()

    # -- before and at the fault ---------------------------------------------------------------

    async def wait_load(self) -> None:
        """Until enough streams are in their middle, some of them at each instance, and those that
        felt the fault before have ended; InvalidRunError where that does not come. A request
        that is moved too often is given up on purpose: no fault is to meet the last one's."""
        options = self.cluster.options
        await asyncio.sleep(calm_in(self.injections, time.monotonic()))
        await asyncio.sleep(self.rng.uniform(0.0, options.phase_s))
        at_each = options.streams // (2 * options.instances)
        since = self.injections[-1].settled_at if self.injections else 0.0
        end = time.monotonic() + LOAD_S
        while True:
            self.cluster.read()
            num = len(self.ledger.streaming(MIN_LEFT))
            num_old = sum(one.opened_at < since for one in self.ledger.open.values())
            if num >= options.streams and not num_old:
                fewest = await self._fewest_running()
                # Counted anew: that took a while, and the fault comes at once.
                num = len(self.ledger.streaming(MIN_LEFT))
                if fewest >= at_each and num >= options.streams:
                    return
            if time.monotonic() > end:
                self.load.raise_broken()
                raise InvalidRunError(
                    f"after {LOAD_S:g} s {num} streams are open, not {options.streams}, or not at "
                    f"each instance, or {num_old} are left of the last fault"
                )
            await asyncio.sleep(POLL_S)

    async def _fewest_running(self) -> int:
        """Sequences at the instance that has the fewest; 0 where nobody says."""
        try:
            processes = await self.load.probes[0].status(timeout_s=2.0)
        except XllmError:
            return 0
        found = [one.num_running for one in processes if one.kind == "instance"]
        return min(found, default=0)

    def pick(self, kind: str) -> KnownProcess:
        """A random process of a kind that is ready."""
        found = [one for one in self.cluster.named(kind) if one.is_ready]
        others = [one for one in found if one.name.partition("/")[0] not in self.spared]
        return self.rng.choice(others or found)

    def strike(self, scenario: str, victim: str, act: Callable[[], object]) -> Injection:
        """Do it, and note the moment just before."""
        streaming = len(self.ledger.streaming(MIN_LEFT))
        injection = Injection(scenario, victim, time.monotonic(), streaming)
        self.injections.append(injection)
        act()
        return injection

    async def prove(
        self, injection: Injection, proof: str, condition: Callable[[], object], seconds: float = 5
    ) -> None:
        """The fault is real once this holds; InvalidRunError where it does not come to hold."""
        try:
            await self.cluster.until(condition, seconds, proof)
        except DeadlineError as error:
            raise InvalidRunError(f"{injection.scenario}: {error.message}") from None
        injection.proofs.append(f"{injection.victim}: {proof}")

    def ask_with(self, token_id: int, max_tokens: int) -> asyncio.Task[Completion]:
        """A request beside the load, whose prompt begins with this token."""
        prompt = (token_id, *self.rng.sample(range(100, 200), 8))
        client = self.load.probes[0]
        return asyncio.create_task(client.generate(prompt, max_tokens=max_tokens))

    @property
    def http_port(self) -> int:
        """The HTTP port of all routers."""
        return HttpAddress.parse(self.cluster.http).port

    # -- after it ------------------------------------------------------------------------------

    async def notice(
        self,
        injection: Injection,
        names: Collection[str] = LOST,
        word: str = "",
        seconds: float = 10.0,
    ) -> None:
        """Until a process logs one of these events about `word`; notes how long that took."""
        since = injection.at + self._wall_offset
        events = self.cluster.events
        try:
            await self.cluster.until(
                lambda: events.find(names, since, word), seconds, f"a notice of {injection.victim}"
            )
        except DeadlineError as error:
            injection.broken.append(error.message)
            return
        event = events.find(names, since, word)
        assert event is not None
        injection.detect_s = max(0.0, event.at - since)

    async def pause(self, seconds: float) -> None:
        """Let the load run on."""
        await asyncio.sleep(seconds)
        self.cluster.read()

    async def until(
        self, condition: Callable[[], Awaitable[bool]], seconds: float, what: str
    ) -> float:
        """Ask again and again until it holds; returns how long that took. DeadlineError."""
        began = time.monotonic()
        while not await condition():
            if time.monotonic() - began > seconds:
                raise DeadlineError(f"{what} did not come within {seconds:g} s")
            await self.pause(ASK_AGAIN_S)
        return time.monotonic() - began

    async def leaders(self, asking_not: str = "") -> list[tuple[str, int]]:
        """(Name, epoch) of the leader that each router knows; of those that answer."""
        found = []
        for router, probe in zip(self.cluster.named("router"), self.load.probes, strict=True):
            if router.name == asking_not:
                continue
            try:
                processes = await probe.status(timeout_s=1.0)
            except XllmError:
                continue
            found += [(one.name, one.epoch) for one in processes if one.role == "leader"]
        return found

    async def leader(self, asking_not: str = "") -> tuple[str, int]:
        """The leader with the highest epoch that any router knows; ("", 0): none."""
        known = await self.leaders(asking_not)
        return max(known, key=lambda one: one[1], default=("", 0))

    def find_event(self, injection: Injection, name: str, word: str) -> Event | None:
        """The first event of that name since the fault, that holds `word`."""
        self.cluster.read()
        return self.cluster.events.find((name,), injection.at + self._wall_offset, word)

    def count_events(self, injection: Injection, names: Collection[str]) -> int:
        """How many events of these names there were since the fault."""
        self.cluster.read()
        return self.cluster.events.count(names, injection.at + self._wall_offset)

    async def settle(self, injection: Injection, *, whole: bool = True) -> None:
        """Until every stream that was open at the fault went on or ended and, if `whole`, all
        processes are back and every router may use every instance; then note what it cost."""
        began = injection.at
        try:
            await self.cluster.until(
                lambda: not self._stuck(injection), SETTLE_S, "the streams' going on"
            )
            if whole:
                await self.wait_whole()
                injection.recover_s = time.monotonic() - began
        except DeadlineError as error:
            injection.broken.append(error.message)
        self._note(injection)

    async def wait_whole(self, seconds: float = SETTLE_S) -> None:
        """Until all processes run and every router may use every instance. DeadlineError."""
        await self.cluster.until(self.cluster.is_whole, seconds, "the return of all processes")
        await self.until(self._all_known, seconds, "every router's knowing every instance")

    async def _all_known(self) -> bool:
        wanted = len(self.cluster.named("master"))
        for client in self.load.probes:
            try:
                processes = await client.status(timeout_s=2.0)
            except XllmError:
                return False
            ready = [one for one in processes if one.kind == "instance" and one.state == "ready"]
            if len(ready) < wanted:
                return False
        return True

    def _stuck(self, injection: Injection) -> bool:
        """Whether a stream of before the fault has not been heard of since."""
        return any(
            one.heard_at and one.heard_at <= injection.at and one.opened_at < injection.at
            for one in self.ledger.open.values()
        )

    def _note(self, injection: Injection) -> None:
        now = injection.settled_at = time.monotonic()
        for record in self.ledger.touching(injection.at, now):
            if record.ended_at and record.code:
                injection.failures[record.code] = injection.failures.get(record.code, 0) + 1
            if record.opened_at >= injection.at:
                continue
            longest = record.longest_pause(injection.at, now)
            moved = [p.length for p in record.pauses if p.moved and p.end > injection.at]
            waste = longest.waste if longest is not None else 0.0
            if record.over == "http":
                injection.http_longest_s = max(injection.http_longest_s, waste)
                injection.http_gaps_s += moved[:1]
            else:
                injection.longest_s = max(injection.longest_s, waste)
                injection.gaps_s += moved[:1]

    def describe(self, injection: Injection) -> str:
        """One line about a fault that is over."""
        words = [f"{injection.scenario} {injection.victim}: {injection.num_streaming} streams"]
        if injection.detect_s >= 0:
            words.append(f"noticed in {injection.detect_s * 1000:.0f} ms")
        if injection.gaps_s:
            middle = statistics.median(injection.gaps_s) * 1000
            words.append(f"{len(injection.gaps_s)} moved, median gap {middle:.0f} ms")
        words.append(f"longest pause {injection.longest_s * 1000:.0f} ms")
        if injection.http_gaps_s:
            middle = statistics.median(injection.http_gaps_s) * 1000
            words.append(f"{len(injection.http_gaps_s)} posted again, median gap {middle:.0f} ms")
        words.append(f"HTTP {injection.http_longest_s * 1000:.0f} ms")
        if injection.recover_s >= 0:
            words.append(f"whole in {injection.recover_s:.1f} s")
        if injection.failures:
            words.append(f"failed {injection.failures}")
        return ", ".join([*words, *injection.broken])
