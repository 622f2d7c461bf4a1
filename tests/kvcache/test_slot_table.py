"""Which slot a sequence gets, what is mapped for it, and what happens when mappings run short."""

import pytest

from xllm.errors import InvariantError
from xllm.kvcache.owners import SharedMemory
from xllm.kvcache.pages import PageState
from xllm.kvcache.slots import SlotTable
from xllm.protocol.step import MapPages


def nothing_is_free(page: int) -> bool:
    return False


def all_is_free(page: int) -> bool:
    return True


def put(table: SlotTable, pages: list[int], prefix: list[int] | None = None) -> int:
    """Assign a slot as a scheduler does."""
    choice = table.choose(prefix or [], len(pages), all_is_free)
    assert table.assign(choice.slot, pages)
    table.check()
    return choice.slot


def test_a_prefix_comes_back_to_the_slot_that_has_it() -> None:
    table = SlotTable(4, 8, 100)
    slots = [put(table, pages) for pages in ([1, 2, 3], [1, 2, 9, 8], [5, 6])]
    assert len(set(slots)) == 3
    assert table.drain() == (
        MapPages(slots[0], 0, (1, 2, 3)),
        MapPages(slots[1], 0, (1, 2, 9, 8)),
        MapPages(slots[2], 0, (5, 6)),
    )
    for slot in slots:
        table.release(slot)
    assert put(table, [1, 2, 9, 8, 7], prefix=[1, 2, 9, 8]) == slots[1]
    assert table.drain() == (MapPages(slots[1], 4, (7,)),)
    assert put(table, [1, 2, 3], prefix=[1, 2, 3]) == slots[0]
    assert table.drain() == ()
    assert table.statistics().num_pages_found == 7


def test_a_set_of_pages_that_became_free_is_used_as_it_lies() -> None:
    table = SlotTable(3, 8, 100)
    first, second = put(table, [1, 2, 3]), put(table, [10, 11])
    table.drain()
    table.release(second)
    table.release(first)
    choice = table.choose([], 3, {1, 2, 3, 10}.__contains__)
    assert (choice.slot, choice.wanted) == (first, [1, 2, 3])
    assert table.assign(first, [1, 2, 3])
    assert table.drain() == ()
    # Nothing is free: a slot without pages, so that nobody's set is torn.
    assert table.choose([], 3, nothing_is_free).slot not in (first, second)


def test_growing_finds_what_was_mapped_behind() -> None:
    table = SlotTable(1, 8, 100)
    slot = put(table, [1, 2, 3, 4])
    table.release(slot)
    put(table, [1], prefix=[1])
    assert table.wanted_next(slot) == 2
    assert table.extend(slot, [2])
    assert table.extend(slot, [7])
    assert table.drain()[1:] == (MapPages(slot, 2, (7,)),)
    assert list(table.pages(slot)) == [1, 2, 7]
    assert table.wanted_next(slot) == 4
    table.check([(slot, [1, 2, 7])])


def test_short_mappings_are_taken_from_the_own_rest_then_from_idle_slots() -> None:
    table = SlotTable(3, 8, 10)
    slot = put(table, [1, 3, 5, 7, 9])  # 5 runs and the rest
    other = put(table, [20, 22])
    assert table.statistics().num_mappings == 9
    table.release(slot)
    table.release(other)
    table.drain()
    # 40, 42, 5, 7, 9 would be as many as before; what is mapped behind 42 is not cut.
    assert table.assign(slot, [40, 42])
    assert table.drain() == (MapPages(slot, 0, (40, 42)),)
    # 3 runs in place of 3: fits; another one does not, before the end is given up.
    assert table.extend(slot, [44, 46])
    assert table.statistics().num_mappings == 9
    assert table.extend(slot, [48])
    assert table.extend(slot, [50])
    assert table.statistics().num_mappings == 10
    table.drain()
    assert table.extend(slot, [52])
    assert table.drain() == (MapPages(other, 1), MapPages(slot, 6, (52,)))
    assert table.extend(slot, [60])
    table.check()
    assert table.statistics().num_reclaimed == 3
    table.release(slot)


def test_no_mappings_at_all_is_no_room() -> None:
    table = SlotTable(2, 8, 10)
    slot, other = put(table, [1, 3, 5]), put(table, [10, 12, 14, 16, 18])
    assert not table.extend(slot, [7])
    assert list(table.pages(slot)) == [1, 3, 5]
    assert not table.has_room(1)
    assert table.extend(slot, [6])  # follows the page before it
    table.check([(slot, [1, 3, 5, 6]), (other, [10, 12, 14, 16, 18])])
    table.release(other)
    assert table.has_room(3)
    assert table.extend(slot, [8])


def test_mappings_behind_other_sequences_are_the_last_to_be_taken() -> None:
    table = SlotTable(2, 8, 10)
    slot = put(table, [1, 3, 5, 7])
    table.release(slot)
    put(table, [1], prefix=[1])
    other = put(table, [20, 22, 24])
    table.drain()
    assert table.statistics().num_mappings == 9
    assert table.extend(other, [26])
    assert table.drain() == (MapPages(other, 3, (26,)),)
    assert table.extend(other, [28])
    assert table.drain() == (MapPages(slot, 1), MapPages(other, 4, (28,)))
    table.check([(slot, [1]), (other, [20, 22, 24, 26, 28])])


def test_room_counts_who_is_about_to_leave() -> None:
    table = SlotTable(1, 8, 10)
    slot = put(table, [1, 3, 5])
    assert not table.has_room(1)
    assert table.has_room(8, [slot])
    assert not table.has_room(9, [slot])


def test_what_a_failed_step_left_is_not_used_again() -> None:
    table = SlotTable(2, 8, 100)
    slot = put(table, [1, 2])
    table.distrust(slot)
    table.release(slot)
    table.drain()
    again = put(table, [1, 2], prefix=[1, 2])
    assert table.drain() == (MapPages(again, 0, (1, 2)),)


def test_states() -> None:
    memory = SharedMemory(8, 1)
    owned = memory.add("m", num_slots=2, pages_per_slot=4, max_mappings=20)
    blocks = memory.models["m"].cache.allocate(4)
    assert blocks is not None
    slot = owned.slots.choose([], 3, owned.cache.pool.is_free).slot
    assert owned.slots.assign(slot, blocks[:3])

    def states() -> list[PageState]:
        found = owned.slots.states(8, owned.cache.pool.is_free)
        return [found[block] for block in blocks]

    mapped, allocated, reusable = PageState.MAPPED, PageState.ALLOCATED, PageState.REUSABLE
    assert states() == [mapped, mapped, mapped, allocated]
    owned.slots.release(slot)
    assert states() == [reusable] * 3 + [allocated]
    owned.cache.release(blocks)
    assert states() == [reusable] * 3 + [PageState.FREE]
    memory.sleep("m")
    assert states() == [PageState.FREE] * 4


def test_one_model_takes_what_another_has_cached_but_not_what_it_holds() -> None:
    memory = SharedMemory(6, 3)
    for name in ("a", "b", "c"):
        memory.add(name, num_slots=2, pages_per_slot=4, max_mappings=20)
    first, second = memory.models["a"].cache.allocate(2), memory.models["b"].cache.allocate(2)
    assert first is not None
    assert second is not None
    cache = memory.models["a"].cache
    cache.seal(first[0], b"x", b"")
    cache.release(first)
    assert memory.models["c"].cache.num_available == 4
    assert memory.models["c"].cache.allocate(5) is None
    taken = memory.models["c"].cache.allocate(4)
    assert taken is not None
    assert set(taken).isdisjoint(second)
    assert cache.match([b"x"]).block_ids == []
    memory.check()
    with pytest.raises(InvariantError, match="c cannot sleep: 4 of its pages are held"):
        memory.sleep("c")
    memory.models["c"].cache.release(taken)
    memory.sleep("c")
    with pytest.raises(InvariantError, match="c sleeps and takes no pages"):
        memory.models["c"].cache.allocate(1)
    memory.wake("c")
    assert memory.models["c"].cache.allocate(1) is not None
    memory.check()
