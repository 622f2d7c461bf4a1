"""Slots and the mapper over real memory: contents, merging, failures, what a step waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.worker.memory.back_ends import BACK_ENDS, PAGE, BackEnd, read
from xllm.errors import EngineError
from xllm.protocol.step import MapPages
from xllm.worker.memory.mapper import PageMapper
from xllm.worker.memory.slots import NO_PAGE, SlotSpace
from xllm.worker.memory.virtual import VirtualMemory

NUM_PAGES = 16


class WatchedMemory:
    """A back-end's memory that counts calls and can be made to fail or to wait."""

    def __init__(self, inner: VirtualMemory) -> None:
        self._inner = inner
        self.granularity = inner.granularity
        self.reserve = inner.reserve
        self.unmap = inner.unmap
        self.close = inner.close
        self.calls: list[tuple[int, int]] = []
        self.fails: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()

    def map(self, address: int, offset: int, num_bytes: int) -> None:
        assert self.go_on.wait(10)
        if self.fails is not None:
            raise self.fails
        self.calls.append((offset // PAGE, num_bytes // PAGE))
        self._inner.map(address, offset, num_bytes)


class Setup:
    def __init__(self, back_end: BackEnd) -> None:
        self.back_end = back_end
        for page in range(NUM_PAGES):
            back_end.fill(page, b"%02d" % page)
        self.memory = WatchedMemory(back_end.open())
        self.space = SlotSpace(
            self.memory, num_slots=3, pages_per_slot=6, page_bytes=PAGE, num_pages=NUM_PAGES
        )
        self.mapper = PageMapper(self.space)

    def seen(self, slot: int, count: int) -> list[int]:
        base = self.space.address(slot)
        return [int(read(base + i * PAGE, 2)) for i in range(count)]


@pytest.fixture(params=BACK_ENDS)
def one(request: pytest.FixtureRequest) -> Iterator[Setup]:
    setup = Setup(request.param(NUM_PAGES))
    yield setup
    setup.memory.go_on.set()
    setup.mapper.close()
    setup.space.check()
    setup.space.close()
    setup.back_end.close()


def test_runs_are_one_call_and_what_is_there_stays(one: Setup) -> None:
    one.space.map(1, 0, (4, 5, 6, 2, 3))
    assert one.memory.calls == [(4, 3), (2, 2)]
    assert one.seen(1, 5) == [4, 5, 6, 2, 3]
    one.memory.calls.clear()
    one.space.map(1, 0, (4, 5, 7, 8, 3))
    assert one.memory.calls == [(7, 2)]
    assert one.seen(1, 5) == [4, 5, 7, 8, 3]
    one.space.map(1, 0, (4, 5, 7, 8, 3))
    assert len(one.memory.calls) == 1
    one.space.unmap(1, 2)
    assert list(one.space.pages(1)) == [4, 5]
    statistics = one.space.statistics()
    assert (statistics.num_mapped_pages, statistics.num_pages_mapped) == (2, 7)
    assert (statistics.num_map_calls, statistics.num_unmap_calls) == (3, 1)
    one.space.forget()
    assert one.space.statistics().num_mapped_pages == 0


def test_what_cannot_be_mapped_is_named(one: Setup) -> None:
    with pytest.raises(EngineError, match="slot 3 of 3"):
        one.space.map(3, 0, (1,))
    with pytest.raises(EngineError, match="slot 0: 2 pages from 5, it has 6"):
        one.space.map(0, 5, (1, 2))
    with pytest.raises(EngineError, match="of 16"):
        one.space.map(0, 0, (16,))
    one.space.map(0, 0, (1, 2))
    one.memory.fails = EngineError("no mapping is left")
    with pytest.raises(EngineError, match="no mapping is left"):
        one.space.map(0, 1, (3,))
    assert list(one.space.pages(0)) == [1, NO_PAGE]
    one.memory.fails = None
    one.space.map(0, 1, (3,))
    assert one.seen(0, 2) == [1, 3]


def test_a_step_maps_what_it_needs_and_later_pages_come_by_themselves(one: Setup) -> None:
    one.mapper.begin_step(1, [MapPages(0, 0, (1, 2)), MapPages(0, 2, (3,))], {0: 2})
    assert one.seen(0, 2) == [1, 2]
    one.mapper.wait(0, 3)
    one.mapper.begin_step(2, [], {0: 3})
    assert one.seen(0, 3) == [1, 2, 3]
    statistics = one.mapper.statistics()
    assert (statistics.num_steps, statistics.num_steps_waited) == (2, 1)
    assert statistics.num_ahead == 1
    assert one.mapper.failure(0, 3) == ""


def test_a_step_waits_for_a_page_that_is_on_its_way(one: Setup) -> None:
    one.mapper.begin_step(1, [MapPages(2, 0, (1,))], {2: 1})
    one.memory.go_on.clear()
    one.mapper.begin_step(2, [MapPages(2, 1, (9,)), MapPages(2, 2, (11,))], {2: 1})
    assert one.mapper.failure(2, 1) == ""
    assert one.mapper.failure(2, 2) != ""
    timer = threading.Timer(0.01, one.memory.go_on.set)
    timer.start()
    one.mapper.begin_step(3, [], {2: 2})
    timer.join()
    assert one.seen(2, 3) == [1, 9, 11]
    assert one.mapper.statistics().num_steps_waited == 2
    assert one.mapper.statistics().wait_ns > 0


def test_operations_on_a_slot_keep_their_order(one: Setup) -> None:
    one.memory.go_on.clear()
    timer = threading.Timer(0.01, one.memory.go_on.set)
    timer.start()
    # Nobody needs the first one yet; the second comes behind it although it is needed now.
    one.mapper.begin_step(1, [MapPages(1, 0, (5, 6)), MapPages(1, 0, (7,))], {0: 0})
    one.mapper.begin_step(2, [MapPages(1, 1, ()), MapPages(1, 1, (8,))], {1: 2})
    timer.join()
    assert one.seen(1, 2) == [7, 8]
    assert list(one.space.pages(1)) == [7, 8]


def test_a_failure_is_its_slots_and_the_others_run(one: Setup) -> None:
    one.mapper.begin_step(1, [MapPages(0, 0, (1,))], {0: 1})
    one.memory.fails = EngineError("no mapping is left")
    one.mapper.begin_step(2, [MapPages(1, 0, (2,))], {0: 1, 1: 1})
    assert one.mapper.failure(0, 1) == ""
    assert one.mapper.failure(1, 1) == "no mapping is left"
    one.memory.fails = None
    one.mapper.begin_step(3, [MapPages(1, 0, (2,)), MapPages(7, 0, (2,))], {1: 1})
    assert one.mapper.failure(1, 1) == ""
    assert one.mapper.failure(1, 2) == "slot 1: 2 pages are needed and not mapped"
    assert one.mapper.failure(7, 1) != ""


def test_a_plan_that_comes_early_is_mapped_while_the_step_before_it_runs(one: Setup) -> None:
    one.mapper.arrive(1, [MapPages(0, 0, (1, 2))])
    assert one.mapper.statistics().num_ahead == 0  # nothing runs: it is as well mapped by its step
    one.mapper.begin_step(1, [MapPages(0, 0, (1, 2))], {0: 2})
    maps = [MapPages(1, 0, (3, 4)), MapPages(0, 2, (5,)), MapPages(9, 0, (5,))]
    one.mapper.arrive(2, maps)
    one.mapper.wait(1, 2)
    assert one.seen(1, 2) == [3, 4]
    one.mapper.end_step()
    one.memory.calls.clear()
    one.mapper.wait(0, 3)
    one.mapper.begin_step(2, maps, {0: 3, 1: 2})
    assert one.memory.calls == []
    assert one.seen(0, 3) == [1, 2, 5]
    statistics = one.mapper.statistics()
    assert (statistics.num_steps, statistics.num_steps_waited, statistics.num_ahead) == (2, 1, 3)


def test_a_plan_that_came_before_its_forerunner_began_is_mapped_behind_it(one: Setup) -> None:
    first, second = [MapPages(2, 0, (1,))], [MapPages(2, 0, (7,)), MapPages(1, 0, (8,))]
    one.mapper.arrive(1, first)
    one.mapper.arrive(2, second)
    one.mapper.begin_step(1, first, {2: 1})
    one.mapper.wait(1, 1)
    assert (one.seen(2, 1), one.seen(1, 1)) == ([1], [8])
    one.mapper.end_step()
    one.mapper.begin_step(2, second, {2: 1})
    assert one.seen(2, 1) == [7]


def test_nothing_changes_under_pages_that_the_running_step_touches(one: Setup) -> None:
    one.mapper.begin_step(1, [MapPages(0, 0, (1, 2, 3))], {0: 2})
    maps = [MapPages(0, 2, (4,)), MapPages(0, 1, (5,)), MapPages(0, 2, (6,)), MapPages(1, 0, (7,))]
    one.mapper.arrive(2, maps)
    one.mapper.wait(0, 6)
    one.mapper.wait(1, 1)
    assert one.seen(0, 3) == [1, 2, 4]
    assert one.mapper.failure(0, 2) == ""
    assert one.seen(1, 1) == [7]
    one.mapper.end_step()
    one.mapper.begin_step(2, maps, {0: 3})
    assert one.seen(0, 3) == [1, 5, 6]


def test_a_plan_whose_step_never_began_is_skipped(one: Setup) -> None:
    one.mapper.begin_step(1, [], {})
    one.mapper.arrive(2, [MapPages(0, 0, (1,))])
    one.mapper.arrive(3, [MapPages(1, 0, (2,))])
    one.mapper.end_step()
    one.mapper.begin_step(3, [MapPages(1, 0, (2,))], {1: 1})
    assert one.seen(1, 1) == [2]
    one.mapper.arrive(4, [MapPages(2, 0, (3,))])
    one.mapper.wait(2, 1)
    assert one.seen(2, 1) == [3]
    one.mapper.forget()
    assert one.mapper.failure(2, 1) != ""


def test_a_defect_behind_the_mapping_thread_fails_its_slot_and_holds_nobody_up(one: Setup) -> None:
    one.memory.fails = ZeroDivisionError("a defect")
    one.mapper.premap(MapPages(1, 0, (4, 5)))
    one.mapper.wait(1, 2)
    assert "ZeroDivisionError: a defect" in one.mapper.failure(1, 2)
    one.memory.fails = None
    one.mapper.premap(MapPages(2, 0, (6,)))
    one.mapper.wait(2, 1)
    assert one.seen(2, 1) == [6]
    one.mapper.forget()
