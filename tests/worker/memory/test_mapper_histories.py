"""Random histories of plans that come early or late, over real memory: a step reads what its plan
and those before it say, from its beginning to its end, whatever comes meanwhile."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.worker.memory.back_ends import KINDS, PAGE, BackEnd, CpuBackEnd, read
from xllm.protocol.step import MapPages
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.memory.slots import SlotSpace

NUM_PAGES, NUM_SLOTS, PAGES_PER_SLOT = 12, 3, 5
MAX_IN_FLIGHT = 3


class PlanHistories(RuleBasedStateMachine):
    """`told`: what is mapped once all plans so far are carried out."""

    kind: type[BackEnd] = CpuBackEnd

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
        self.reads: dict[int, list[int]] | None = None
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

    @precondition(lambda self: self.waiting and self.reads is None)
    @rule()
    def begin_step(self) -> None:
        step, maps, self.reads = self.waiting.popleft()
        self.mapper.begin_step(step, maps, {slot: len(own) for slot, own in self.reads.items()})

    @precondition(lambda self: self.reads is not None)
    @rule(is_settled=st.booleans())
    def end_step(self, is_settled: bool) -> None:
        if is_settled:
            self._settle()
            self.the_step_reads_its_pages()
        self.reads = None
        self.mapper.end_step()

    @invariant()
    def the_step_reads_its_pages(self) -> None:
        for slot, want in (getattr(self, "reads", None) or {}).items():
            assert self.mapper.failure(slot, len(want)) == ""
            base = self.space.address(slot)
            found = [int(read(base + i * PAGE, 2)) for i in range(len(want))]
            assert found == want

    def teardown(self) -> None:
        if not hasattr(self, "mapper"):
            return
        if self.reads is not None:
            self.end_step(is_settled=True)
        while self.waiting:
            self.begin_step()
            self.end_step(is_settled=True)
        self._settle()
        assert [list(self.space.pages(slot)) for slot in range(NUM_SLOTS)] == self.told
        self.mapper.close()
        self.back_end.close()

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


@pytest.mark.parametrize("kind", KINDS)
def test_any_history_of_plans(kind: type[BackEnd]) -> None:
    class Histories(PlanHistories):
        pass

    Histories.kind = kind
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=60 if kind is CpuBackEnd else 30, stateful_step_count=40, deadline=None
        ),
    )
