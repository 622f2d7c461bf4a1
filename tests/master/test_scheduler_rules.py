"""The scheduler's rules, one by one, on the toy engine: who runs when, and what a step holds."""

import pytest

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.protocol.step import ItemKind


def test_a_higher_attempt_replaces_and_others_are_not_taken():
    one = ToyInstance()
    one.admit("a", PROMPT, attempt=2)
    one.step()
    assert one.scheduler.admit(one.requests["a", 2], one.now) is None
    assert one.scheduler.num_requests == 1
    assert one.admit("a", PROMPT, attempt=1).code == "conflict"
    so_far = one.streams["a", 2, 0].tokens
    one.admit("a", PROMPT, attempt=3, outputs=[so_far])
    one.run()
    assert ("a", 2) not in one.ended
    one.verify("a", 3)


def test_a_cancel_of_an_older_attempt_does_nothing():
    one = ToyInstance()
    one.admit("a", PROMPT, attempt=2)
    one.scheduler.cancel("a", 1)
    one.scheduler.cancel("unknown", 1)
    one.run()
    one.verify("a", 2)


def test_online_goes_before_offline_and_high_before_low():
    one = ToyInstance(max_num_seqs=1)
    one.admit("offline", PROMPT, offline=True, priority=9)
    one.admit("low", PROMPT)
    one.admit("high", PROMPT, priority=1)
    one.admit("low again", PROMPT)
    one.run()
    assert [key[0] for key in one.ended] == ["high", "low", "low again", "offline"]


@pytest.mark.parametrize("preemption", ["recompute", "pause", "auto"])
def test_offline_gives_way_to_online_and_comes_back(preemption):
    one = ToyInstance(max_num_seqs=2, preemption=preemption)
    one.admit("x", PROMPT, offline=True, max_tokens=20)
    one.admit("y", PROMPT, offline=True, max_tokens=20)
    one.step()
    one.step()
    one.admit("online", PROMPT, max_tokens=3)
    one.step()
    assert len(one.streams["online", 1, 0].tokens) == 1
    stats = one.scheduler.statistics()
    keeps = preemption != "recompute"
    assert (stats.num_preemptions, stats.num_pauses) == (not keeps, keeps)
    assert (stats.num_waiting, stats.num_paused) == (not keeps, keeps)
    assert stats.num_offline == 2
    one.run()
    for name in ("x", "y", "online"):
        one.verify(name)
    assert next(iter(one.ended)) == ("online", 1)


def test_the_victim_is_the_latest_and_it_returns_under_a_new_number():
    one = ToyInstance(num_blocks=8, block_size=4, prefix_cache=False)
    for name in ("a", "b"):
        one.admit(name, PROMPT, max_tokens=14)
    one.run()
    assert one.scheduler.statistics().num_preemptions == 1
    one.verify("a")
    one.verify("b")
    assert next(iter(one.ended)) == ("a", 1)
    news = [new for plan in one.plans for new in plan.new]
    assert [new.seq for new in news] == [1, 2, 3]
    assert news[2].prompt_ids == tuple(PROMPT)
    assert 0 < len(news[2].output_ids) < 14
    assert any(2 in plan.ended for plan in one.plans)


def test_one_step_at_a_time_without_the_pipeline():
    one = ToyInstance()
    one.admit("a", PROMPT)
    assert one.plan()
    one.admit("b", PROMPT)
    assert one.scheduler.schedule(one.now) is None
    one.settle()
    one.run()
    one.verify("a")
    one.verify("b")


def test_stop_ids_eos_and_min_tokens():
    probe = ToyInstance()
    probe.admit("a", PROMPT, max_tokens=8)
    probe.run()
    tokens = probe.streams["a", 1, 0].tokens
    one = ToyInstance(eos_ids=(tokens[2],))
    one.admit("eos", PROMPT)
    one.admit("ignored", PROMPT, ignore_eos=True)
    one.admit("stop", PROMPT, ignore_eos=True, stop_token_ids=(tokens[4],))
    one.admit("min", PROMPT, min_tokens=4, stop_token_ids=(tokens[4],))
    one.run()
    lengths = {"eos": 3, "ignored": 8, "stop": 5, "min": 5}
    for name, length in lengths.items():
        assert one.streams[name, 1, 0].tokens == tokens[:length]
        one.verify(name)
    assert one.streams["eos", 1, 0].stop_id == tokens[2]


def test_a_stop_id_among_the_first_min_tokens_is_none():
    probe = ToyInstance()
    probe.admit("a", PROMPT, max_tokens=8)
    probe.run()
    tokens = probe.streams["a", 1, 0].tokens
    one = ToyInstance()
    one.admit("a", PROMPT, min_tokens=5, stop_token_ids=(tokens[4],))
    one.run()
    assert one.streams["a", 1, 0].tokens == tokens
    assert one.streams["a", 1, 0].reason == "length"


def test_outputs_that_are_complete_end_at_once():
    one = ToyInstance(eos_ids=(99,))
    one.admit("length", PROMPT, max_tokens=2, outputs=[[50, 51]])
    one.admit("stop", PROMPT, max_tokens=9, outputs=[[50, 99]])
    one.admit("none", PROMPT, max_tokens=0, n=2)
    one.take(one.scheduler.expire(one.now))
    assert one.scheduler.is_idle
    for name in ("length", "stop", "none"):
        one.verify(name)
    assert one.streams["stop", 1, 0].stop_id == 99


def test_deadlines_end_waiting_and_running_requests():
    one = ToyInstance(max_num_seqs=1)
    one.admit("runs", PROMPT, max_tokens=100, timeout_ms=45)
    one.admit("waits", PROMPT, timeout_ms=30)
    one.admit("patient", PROMPT, timeout_ms=100000)
    assert one.scheduler.next_deadline == pytest.approx(one.now + 0.03)
    one.run()
    assert one.ended["runs", 1].code == one.ended["waits", 1].code == "deadline_exceeded"
    assert len(one.streams["runs", 1, 0].tokens) == 4
    one.verify("patient")


def test_decodes_come_before_prefills_within_the_budget():
    one = ToyInstance(max_num_batched_tokens=8)
    one.admit("a", PROMPT[:4], max_tokens=10)
    one.step()
    one.admit("b", list(range(100, 120)), max_tokens=2)
    one.step()
    kinds = [(item.kind, item.num_tokens) for item in one.plans[-1].items]
    assert kinds == [(ItemKind.DECODE, 1), (ItemKind.PREFILL, 7)]
    assert one.plans[-1].items[1].num_samples == 0
    one.run()
    assert all(sum(i.num_tokens for i in plan.items) <= 8 for plan in one.plans)


def test_without_chunks_a_prompt_is_one_item_however_long():
    one = ToyInstance(max_num_batched_tokens=8, strategy="continuous")
    one.admit("a", list(range(100, 120)), max_tokens=2)
    one.admit("b", list(range(200, 220)), max_tokens=2)
    one.admit("c", PROMPT[:3], max_tokens=2)
    one.run()
    prefills = [[i.num_tokens for i in p.items if i.kind == ItemKind.PREFILL] for p in one.plans]
    assert [sizes for sizes in prefills if sizes] == [[20], [20], [3]]
    for name in "abc":
        one.verify(name)


def test_quiet_steps_are_quiet():
    one = ToyInstance(num_blocks=64, block_size=4)
    assert one.scheduler.quiet_steps() == 0
    one.admit("a", PROMPT, max_tokens=9)
    one.admit("b", PROMPT[:3], max_tokens=20)
    assert one.scheduler.quiet_steps() == 0
    one.step()
    one.step()
    quiet = one.scheduler.quiet_steps()
    assert quiet == 6
    for _ in range(quiet):
        one.step()
        assert [item.kind for item in one.plans[-1].items] == [ItemKind.DECODE] * 2
        assert not one.plans[-1].new
        assert not one.plans[-1].ended
    assert not one.ended
    one.step()
    assert ("a", 1) in one.ended
