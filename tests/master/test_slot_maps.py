"""Slots through the scheduler and the toy engine, which holds every map against its block table."""

import pytest

from tests.master.toy_instance import ToyInstance
from xllm.errors import InvariantError
from xllm.kvcache.slots import SlotTableStatistics
from xllm.master.metrics import MasterMetrics
from xllm.protocol.step import MapPages
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.slots import ToySlots

PROMPT = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]


def slots_of(one: ToyInstance) -> SlotTableStatistics:
    found = one.scheduler.statistics().slots
    assert found is not None
    return found


def test_a_returning_prompt_finds_its_pages_mapped() -> None:
    one = ToyInstance(block_size=4)
    one.admit("a", PROMPT, max_tokens=1)
    one.run()
    one.admit("b", [*PROMPT[:8], 99], max_tokens=1)
    one.run()
    first, second = (plan for plan in one.plans if plan.new)
    assert first.new[0].slot == second.new[0].slot
    # Its third block was not full and is free again: it is taken as it lies.
    assert second.maps == ()
    assert slots_of(one).num_pages_found == 3
    one.verify("b")


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_next_tokens_page_comes_a_step_ahead(max_in_flight) -> None:
    one = ToyInstance(block_size=4, max_in_flight=max_in_flight, prefix_cache=False)
    one.admit("a", PROMPT[:6], max_tokens=20)
    one.run()
    one.verify("a")
    # Positions 0 to 24 are computed, in 7 blocks; the first two come with the prompt.
    maps = {plan.items[0].start: plan.maps[0] for plan in one.plans if plan.maps}
    assert list(maps) == [0, 7, 11, 15, 19, 23]
    assert [m.first_page for m in maps.values()] == [0, 2, 3, 4, 5, 6]
    assert all(len(m.page_ids) == 1 for start, m in maps.items() if start)


def test_pages_are_not_taken_ahead_where_they_are_few() -> None:
    one = ToyInstance(block_size=4, num_blocks=3, prefix_cache=False)
    one.admit("a", PROMPT[:6], max_tokens=6)
    one.run()
    one.verify("a")
    assert [plan.items[0].start for plan in one.plans if plan.maps] == [0, 7]
    one = ToyInstance(block_size=4, num_blocks=9, prefix_cache=False)
    for name in "abcd":
        one.admit(name, PROMPT[:6], max_tokens=6)
    one.run()
    # Eight blocks of nine are taken: the third of each comes when it is needed.
    decodes = [plan for plan in one.plans if plan.maps and not plan.new]
    assert decodes[0].items[0].start == 8


def test_no_more_sequences_run_than_there_are_slots() -> None:
    one = ToyInstance(num_slots=2)
    for name in "abcde":
        one.admit(name, PROMPT, max_tokens=5)
    one.run()
    assert max(len(plan.items) for plan in one.plans) == 2
    for name in "abcde":
        one.verify(name)


def test_forks_have_slots_of_their_own() -> None:
    one = ToyInstance()
    one.admit("a", PROMPT, n=3, max_tokens=9)
    one.run()
    one.verify("a")
    slots = [new.slot for plan in one.plans for new in plan.new]
    assert len(set(slots)) == 3
    shared = [m.page_ids[:2] for plan in one.plans for m in plan.maps if m.first_page == 0]
    assert len(shared) == 3
    assert len(set(shared)) == 1


@pytest.mark.parametrize("strategy", ["chunked", "zero-evict"])
@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_short_mappings_preempt_and_nothing_is_lost(max_in_flight, strategy) -> None:
    one = ToyInstance(
        strategy=strategy,
        block_size=1,
        num_blocks=400,
        max_model_len=40,
        num_slots=16,
        max_mappings=42,
        max_in_flight=max_in_flight,
        prefix_cache=False,
    )
    # Each has a group of pages for itself and goes on in another one: three mappings a sequence.
    for k in range(16):
        one.admit(f"r{k}", PROMPT[: 2 + k % 6], max_tokens=30)
    one.run()
    for k in range(16):
        one.verify(f"r{k}")
    # Who starts only when mappings suffice to the end, however pages lie, runs alone here.
    assert (one.scheduler.statistics().num_preemptions > 0) == (strategy == "chunked")
    assert (max(len(plan.items) for plan in one.plans) == 1) == (strategy == "zero-evict")
    assert slots_of(one).num_mappings <= 42


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_an_online_request_takes_the_slot_of_an_offline_one(max_in_flight) -> None:
    one = ToyInstance(num_slots=1, preemption="pause", max_in_flight=max_in_flight)
    one.admit("a", PROMPT, max_tokens=40, offline=True)
    one.step()
    one.admit("b", PROMPT[::-1], max_tokens=3)
    one.run()
    one.verify("a")
    one.verify("b")
    # Pausing would have kept the slot.
    assert one.scheduler.statistics().num_pauses == 0
    assert one.scheduler.statistics().num_preemptions == 1


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_paused_sequence_gives_its_mappings_up(max_in_flight) -> None:
    one = ToyInstance(
        block_size=1,
        max_model_len=20,
        max_mappings=22,
        max_num_seqs=1,
        preemption="pause",
        max_in_flight=max_in_flight,
    )
    one.admit("a", PROMPT, max_tokens=9, offline=True)
    one.step()
    one.admit("b", PROMPT[:5], max_tokens=3)
    while one.scheduler.statistics().num_pauses == 0:
        assert one.step()
    # Fits beside nobody, and "a" does not come back before it.
    one.admit("c", [*range(100, 119)], max_tokens=1)
    one.run()
    for name in "abc":
        one.verify(name)
    assert one.scheduler.statistics().num_preemptions == 1


def test_after_a_failed_item_nothing_of_its_slot_is_trusted() -> None:
    one = ToyInstance(faults=ToyFaults(fail_item=666), num_slots=1)
    one.admit("a", PROMPT, max_tokens=2)
    one.run()
    one.admit("b", [*PROMPT[:8], 666], max_tokens=2)
    one.run()
    assert one.ended["b", 1].code
    one.admit("c", PROMPT, max_tokens=2)
    one.run()
    one.verify("c")
    assert one.plans[-2].maps[-1].first_page == 0
    assert len(one.plans[-2].maps[-1].page_ids) == 3


def test_nor_is_it_where_the_request_was_cancelled_meanwhile() -> None:
    one = ToyInstance(faults=ToyFaults(fail_item=666), num_slots=1)
    one.admit("b", [*PROMPT[:8], 666], max_tokens=2)
    assert one.plan()
    one.scheduler.cancel("b", 1)
    one.settle()
    assert slots_of(one).num_mappings == 0
    one.admit("c", PROMPT, max_tokens=2)
    one.run()
    one.verify("c")


def test_a_failed_step_ends_its_requests_and_slots_are_mapped_anew() -> None:
    one = ToyInstance(faults=ToyFaults(fail_step=666), num_slots=2)
    one.admit("a", [*PROMPT, 666], max_tokens=2)
    one.run()
    one.admit("c", PROMPT, max_tokens=2)
    one.run()
    one.verify("c")


def test_metrics_tell_of_slots_where_there_are_any() -> None:
    one = ToyInstance()
    one.admit("a", PROMPT, max_tokens=2)
    one.run()
    text = MasterMetrics().text(one.scheduler.statistics()).decode()
    assert "xllm_master_mappings 2.0" in text
    assert "xllm_master_slot_pages 3.0" in text
    text = MasterMetrics().text(ToyInstance(num_slots=0).scheduler.statistics()).decode()
    assert "xllm_master_running_sequences" in text
    assert "mappings" not in text


def test_the_toy_sees_a_map_that_is_lost() -> None:
    slots = ToySlots(4)
    slots.carry_out([MapPages(1, 0, (5, 6, 7)), MapPages(1, 1, (9,))])
    slots.verify(1, [5, 9])
    slots.verify(1, [5, 9, 7])
    with pytest.raises(InvariantError, match=r"has \[5, 9, 7\] mapped, the block table is"):
        slots.verify(1, [5, 9, 8])
    slots.carry_out([MapPages(1, 1)])
    with pytest.raises(InvariantError, match=r"has \[5\] mapped"):
        slots.verify(1, [5, 9])
    with pytest.raises(InvariantError, match="page 4 behind 1 mapped"):
        slots.carry_out([MapPages(1, 4, (1,))])


def test_a_lost_map_fails_the_item() -> None:
    one = ToyInstance()
    one.admit("a", PROMPT, max_tokens=3)
    plan = one.scheduler.schedule(one.now)
    assert plan is not None
    assert plan.maps
    output = one.toy.execute(type(plan)(plan.step, plan.items, plan.new))
    assert "mapped, the block table is" in output.result.failed[0][1]
