"""Random histories of plans that come early or late, over real memory: a step reads what its plan
and those before it say, from its beginning to its end, whatever comes meanwhile.

On a device steps are launched behind one another: here up to three are under way, and the
engine keeps the rules that `mapper` asks of it.
"""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.worker.memory.back_ends import PAGE, BackEnd, CpuBackEnd, DeviceBackEnd, read
from xllm.protocol.step import MapPages
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.memory.slots import SlotSpace

NUM_PAGES, NUM_SLOTS, PAGES_PER_SLOT = 12, 3, 5
MAX_IN_FLIGHT = 3


class PlanHistories(RuleBasedStateMachine):
    """`told`: what is mapped once all plans so far are carried out. `running`: what each step
    reads that was begun and has not ended, oldest first; on a device several at once."""

    kind: type[BackEnd] = CpuBackEnd
    max_running = 1

    @initialize(is_early=st.booleans())
    def begin(self, is_early: bool) -> None:
        self.is_early = is_early
        self.back_end = self.kind(NUM_PAGES)
        for page in range(NUM_PAGES):
            self.back_end.fill(page, b"%02d" % page)
        self.space = SlotSpace(
            self.back_end.open(),
            num_slots=NUM_SLOTS,
            pages_per_slot=PAGES_PER_SLOT,
            page_bytes=PAGE,
            num_pages=NUM_PAGES,
        )
        self.mapper = PageMapper(self.space)
        self.told: list[list[int]] = [[] for _ in range(NUM_SLOTS)]
        self.waiting: deque[tuple[int, list[MapPages], dict[int, list[int]]]] = deque()
        self.running: deque[dict[int, list[int]]] = deque()
        self.num_plans = 0

    @precondition(lambda self: len(self.waiting) < MAX_IN_FLIGHT)
    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        maps = [self._change(data) for _ in range(data.draw(st.integers(0, 4)))]
        reads = {
            slot: pages[: data.draw(st.integers(1, len(pages)))]
            for slot, pages in enumerate(self.told)
            if pages and data.draw(st.booleans())
        }
        self.num_plans += 1
        self.waiting.append((self.num_plans, maps, reads))
        if self.is_early:
            self.mapper.arrive(self.num_plans, maps)

    @precondition(lambda self: self.waiting and len(self.running) < self.max_running)
    @rule()
    def begin_step(self) -> None:
        step, maps, reads = self.waiting.popleft()
        touched = self._touched()
        if any(one.first_page < touched.get(one.slot, 0) for one in maps):
            event("a step waits for those before it")
            self.running.clear()
        self.running.append(reads)
        self.mapper.begin_step(step, maps, self._touched())

    @precondition(lambda self: self.running)
    @rule(is_settled=st.booleans())
    def end_step(self, is_settled: bool) -> None:
        if is_settled:
            self._settle()
            self.the_steps_read_their_pages()
        self.running.popleft()
        if self.max_running == 1:
            self.mapper.end_step()

    @invariant()
    def the_steps_read_their_pages(self) -> None:
        for reads in getattr(self, "running", ()):
            for slot, want in reads.items():
                assert self.mapper.failure(slot, len(want)) == ""
                base = self.space.address(slot)
                found = [int(read(base + i * PAGE, 2)) for i in range(len(want))]
                assert found == want

    def teardown(self) -> None:
        if not hasattr(self, "mapper"):
            return
        while self.waiting or self.running:
            if self.running:
                self.end_step(is_settled=True)
            if self.waiting:
                self.begin_step()
        self._settle()
        assert [list(self.space.pages(slot)) for slot in range(NUM_SLOTS)] == self.told
        self.mapper.close()
        self.back_end.close()

    def _touched(self) -> dict[int, int]:
        """How many leading pages of each slot the running steps read."""
        found: dict[int, int] = {}
        for reads in self.running:
            for slot, pages in reads.items():
                found[slot] = max(found.get(slot, 0), len(pages))
        return found

    def _settle(self) -> None:
        for slot in range(NUM_SLOTS):
            self.mapper.wait(slot, PAGES_PER_SLOT + 1)

    def _change(self, data: st.DataObject) -> MapPages:
        slot = data.draw(st.integers(0, NUM_SLOTS - 1))
        pages = self.told[slot]
        first = data.draw(st.integers(0, min(len(pages), PAGES_PER_SLOT - 1)))
        count = data.draw(st.integers(0, PAGES_PER_SLOT - first))
        ids = tuple(data.draw(st.integers(0, NUM_PAGES - 1)) for _ in range(count))
        if ids:
            pages[first : first + count] = ids
        else:
            del pages[first:]
        return MapPages(slot, first, ids)


@pytest.mark.parametrize(
    ("kind", "max_running"), [(CpuBackEnd, 1), (DeviceBackEnd, 1), (DeviceBackEnd, 3)]
)
def test_any_history_of_plans(kind: type[BackEnd], max_running: int) -> None:
    class Histories(PlanHistories):
        pass

    Histories.kind, Histories.max_running = kind, max_running
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=60 if kind is CpuBackEnd else 30, stateful_step_count=40, deadline=None
        ),
    )
