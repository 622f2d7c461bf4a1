"""Carries out a step's map operations: what it needs now at once, the rest in the background.

A plan that comes while the step before it runs is mapped by a thread meanwhile; so is the page of
the next token, which a plan brings one step ahead. A step waits only for pages that its own rows
need and that are not there yet. Invariants: operations on one slot are carried out in the plans'
order; nothing changes under the leading pages that the running step was said to need; `_ready` of
a slot is at most the number of its leading pages that are mapped and have nothing queued.

A device is not asked: mapping is not ordered with its streams, and a step that was launched may
run long after. Where steps are launched behind one another, the engine (1) waits for those that
touch what a plan changes before it begins that plan's step, (2) counts to the needs of a step
those of all that may still run, and (3) ends a step, if at all, when the device is past it. So
nothing is unmapped or replaced under a page that anything under way reads or writes.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from xllm.errors import EngineError
from xllm.protocol.step import MapPages
from xllm.worker.memory.slots import NO_PAGE, SlotSpace, SlotStatistics


@dataclasses.dataclass(frozen=True, slots=True)
class MapperStatistics:
    """Steps with slots, how many of them had to map or to wait, and for how long in all; pages
    that were mapped ahead."""

    num_steps: int
    num_steps_waited: int
    wait_ns: int
    num_ahead: int
    slots: SlotStatistics


class PageMapper:
    """Maps pages for the engine's thread, with a thread of its own from the first page that may
    wait on. Plans may `arrive` on another thread; each is then begun, in the order of arrival, or
    skipped by a later one that is begun."""

    def __init__(self, space: SlotSpace) -> None:
        self._space = space
        self._lock = threading.Condition()
        self._ready = [0] * space.num_slots
        self._queued = [0] * space.num_slots
        self._failed: dict[int, str] = {}
        self._queue: queue.SimpleQueue[MapPages | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._arrived: deque[tuple[int, Sequence[MapPages]]] = (
            deque()
        )  # plans not begun: step, maps
        self._left: list[MapPages] | None = None  # of the oldest of them, if the rest is under way
        self._touched: Mapping[int, int] | None = None  # needs of the running step, if one runs
        self._num_steps = 0
        self._num_steps_waited = 0
        self._wait_ns = 0
        self._num_ahead = 0

    def arrive(self, step: int, maps: Sequence[MapPages]) -> None:
        """The plan of a step came that runs behind those that came before it. Where the one just
        before it runs, its operations begin now, but for those on pages which that one touches."""
        with self._lock:
            self._arrived.append((step, maps))
            self._begin_next()

    def begin_step(self, step: int, maps: Sequence[MapPages], needs: Mapping[int, int]) -> None:
        """Carry out what is left of a plan's operations. `needs`: how many leading pages of which
        slots the step reads or writes until `end_step`; these are there when it returns, except
        where `failure` says why not."""
        self._num_steps += bool(needs)
        began = time.perf_counter_ns()
        waited = False
        for one in self._take(step, maps):
            if not self._is_known(one):
                continue  # Its sequence's items fail for want of pages.
            if one.page_ids and one.first_page >= needs.get(one.slot, 0):
                self.premap(one)
                continue
            self._finish(one.slot)
            self._carry_out(one)
            self._count_ready(one.slot)
            waited = waited or one.slot in needs
        for slot, num_pages in needs.items():
            waited = self.wait(slot, num_pages) or waited
        if waited:
            self._num_steps_waited += 1
            self._wait_ns += time.perf_counter_ns() - began
        with self._lock:
            self._touched = needs
            self._begin_next()

    def end_step(self) -> None:
        """The step that was begun touches its pages no more."""
        with self._lock:
            self._touched = None

    def premap(self, one: MapPages) -> None:
        """Map pages of a slot in the background."""
        with self._lock:
            self._queue_up(one)

    def address(self, slot: int) -> int:
        """Where a slot begins."""
        return self._space.address(slot)

    def wait(self, slot: int, num_pages: int) -> bool:
        """Whether it had to wait until the first `num_pages` pages of a slot are mapped, or it is
        clear that they will not be."""
        if not 0 <= slot < self._space.num_slots or self._ready[slot] >= num_pages:
            return False
        return self._finish(slot)

    def failure(self, slot: int, num_pages: int) -> str:
        """Why the first `num_pages` pages of a slot are not all there; empty if they are."""
        if 0 <= slot < self._space.num_slots and self._ready[slot] >= num_pages:
            return ""
        reason = self._failed.get(slot)
        return reason or f"slot {slot}: {num_pages} pages are needed and not mapped"

    def forget(self) -> None:
        """Unmap everything: no sequence is left."""
        with self._lock:
            self._lock.wait_for(lambda: not any(self._queued))
            self._arrived.clear()
            self._left = None
        self._space.forget()
        self._ready = [0] * self._space.num_slots
        self._failed.clear()

    def close(self) -> None:
        """End the thread, after what is queued, and give the slots up."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self._space.close()

    def statistics(self) -> MapperStatistics:
        """A snapshot."""
        return MapperStatistics(
            self._num_steps,
            self._num_steps_waited,
            self._wait_ns,
            self._num_ahead,
            self._space.statistics(),
        )

    def check(self) -> None:
        """Raise InvariantError where the books of the slots cannot be."""
        self._space.check()

    def _is_known(self, one: MapPages) -> bool:
        return 0 <= one.slot < self._space.num_slots

    def _take(self, step: int, maps: Sequence[MapPages]) -> Sequence[MapPages]:
        """What of a plan's operations is not under way. Plans that came before it are not begun
        any more."""
        with self._lock:
            self._touched = None
            while self._arrived:
                number, _ = self._arrived.popleft()
                left, self._left = self._left, None
                if number == step:
                    return maps if left is None else left
        return maps

    def _begin_next(self) -> None:
        """With the lock: begin the operations of the plan behind the running step, unless they
        are. Where one has to wait, those behind it on its slot do too."""
        if self._touched is None or self._left is not None or not self._arrived:
            return
        self._left = []
        held = set()
        for one in self._arrived[0][1]:
            if one.slot in held or one.first_page < self._touched.get(one.slot, 0):
                held.add(one.slot)
                self._left.append(one)
            elif self._is_known(one):
                self._queue_up(one)

    def _queue_up(self, one: MapPages) -> None:
        """With the lock: hand an operation to the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="page-mapper", daemon=True)
            self._thread.start()
        self._ready[one.slot] = min(self._ready[one.slot], one.first_page)
        self._queued[one.slot] += 1
        self._num_ahead += len(one.page_ids)
        self._queue.put(one)

    def _finish(self, slot: int) -> bool:
        """Wait for what is queued for a slot; whether there was anything."""
        if not self._queued[slot]:
            return False
        with self._lock:
            self._lock.wait_for(lambda: not self._queued[slot])
        return True

    def _carry_out(self, one: MapPages) -> None:
        """Map or unmap. A failure is the slot's, not the step's."""
        try:
            if one.page_ids:
                self._space.map(one.slot, one.first_page, one.page_ids)
            else:
                self._space.unmap(one.slot, one.first_page)
        except EngineError as error:
            self._failed[one.slot] = error.message
        else:
            self._failed.pop(one.slot, None)

    def _count_ready(self, slot: int) -> None:
        pages = self._space.pages(slot)
        self._ready[slot] = pages.index(NO_PAGE) if NO_PAGE in pages else len(pages)

    def _run(self) -> None:
        # The engine's thread may have cores of its own, which who starts here would inherit.
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        while (one := self._queue.get()) is not None:
            try:
                self._carry_out(one)
            except Exception as error:  # a defect: the slot fails, and nobody waits for ever
                self._failed[one.slot] = f"slot {one.slot}: {type(error).__name__}: {error}"
            with self._lock:
                self._queued[one.slot] -= 1
                if not self._queued[one.slot]:
                    self._count_ready(one.slot)
                    self._lock.notify_all()
