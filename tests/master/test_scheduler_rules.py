"""The scheduler's rules, one by one, on the toy engine."""

import pytest

from tests.master.toy_instance import ToyInstance
from xllm.errors import BadMessageError, InvariantError
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.protocol.step import ItemKind, StepResult
from xllm.protocol.token_bytes import pack_tokens
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.stream import predict

PROMPT = list(range(20, 30))


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    one = ToyInstance(num_blocks=4, block_size=4, max_model_len=100)
    refusal = one.admit("a", range(20, 37))
    assert refusal.code == "context_length_exceeded"
    assert "17 tokens" in refusal.message
    assert "holds 16 (4 blocks of 4)" in refusal.message
    refusal = one.admit("b", PROMPT, max_tokens=8)
    assert refusal.param == "max_tokens"
    assert "17 tokens" in refusal.message
    assert one.admit("c", PROMPT, max_tokens=7) is None
    one.run()
    one.verify("c")
    long = ToyInstance(max_model_len=10)
    assert "context is 10 tokens" in long.admit("d", PROMPT).message


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ((), {}, "prompt"),
        ((1000,), {}, "prompt"),
        ((-1,), {}, "prompt"),
        (PROMPT, {"outputs": [[1], [2]]}, "n"),
        (PROMPT, {"outputs": [[1000]]}, "outputs"),
        (PROMPT, {"model": "other"}, "model"),
        (PROMPT, {"block_hashes": b"x" * 31}, "block_hashes"),
        (PROMPT, {"block_hashes": b"x" * 96}, "block_hashes"),
        (PROMPT, {"salt": b"short"}, "salt"),
        (PROMPT, {"packed_prompt": pack_tokens(PROMPT)}, "prompt"),
        ((), {"packed_prompt": b"123"}, "prompt"),
        ((), {"packed_prompt": pack_tokens([1, 1000])}, "prompt"),
    ],
)
def test_bad_requests_are_refused_by_field(prompt, options, param):
    one = ToyInstance()
    refusal = one.admit("a", prompt, **options)
    assert refusal is not None
    assert refusal.param == param
    assert not one.step()


def test_a_packed_prompt_is_the_same_prompt():
    one = ToyInstance(block_size=4)
    hashes = chain_hashes(root_hash(""), PROMPT, 4)
    for fields in ({}, {"block_hashes": hashes, "salt": root_hash("")}):
        plain, packed = ToyInstance(block_size=4), ToyInstance(block_size=4)
        assert plain.admit("a", PROMPT, **fields) is None
        assert packed.admit("a", (), packed_prompt=pack_tokens(PROMPT), **fields) is None
        plain.run()
        packed.run()
        plain.verify("a")
        assert packed.streams == plain.streams
        assert packed.scheduler.snapshot_blocks() == plain.scheduler.snapshot_blocks()
    refusal = one.admit("b", (), packed_prompt=pack_tokens(range(20, 620)))
    assert "600 tokens" in refusal.message


def test_the_waiting_queue_is_bounded():
    one = ToyInstance(max_waiting=2)
    assert one.admit("a", PROMPT) is None
    assert one.admit("b", PROMPT) is None
    assert one.admit("c", PROMPT).code == "overloaded"
    one.step()
    assert one.admit("c", PROMPT) is None
    one.run()


def test_a_draining_instance_finishes_and_admits_nothing():
    one = ToyInstance()
    one.admit("a", PROMPT)
    one.scheduler.drain()
    assert one.admit("b", PROMPT).code == "unavailable"
    one.run()
    one.verify("a")


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


def test_a_whole_prompt_hit_gives_back_the_last_block():
    one = ToyInstance(block_size=4)
    prompt = list(range(20, 32))
    one.admit("a", prompt, max_tokens=1)
    one.run()
    one.admit("b", prompt, max_tokens=4)
    one.run()
    one.verify("b")
    assert one.ended["a", 1].cached_tokens == 0
    assert one.ended["b", 1].cached_tokens == 8
    item = next(i for p in one.plans for n in p.new for i in p.items if i.seq == n.seq == 2)
    assert (item.start, item.num_tokens) == (8, 4)


def test_outputs_stay_cached_for_the_next_turn():
    one = ToyInstance(block_size=4)
    one.admit("a", PROMPT, max_tokens=7)
    one.run()
    turn = PROMPT + one.streams["a", 1, 0].tokens
    one.admit("b", [*turn, 50, 51], max_tokens=2)
    one.run()
    one.verify("b")
    # 16 of the 17 tokens of the first turn were computed, the last one was only drawn.
    assert one.ended["b", 1].cached_tokens == 16


def test_router_hashes_and_own_hashes_are_the_same_and_salts_separate():
    one = ToyInstance(block_size=4)
    root = root_hash("", "", b"", ())
    hashes = chain_hashes(root, PROMPT, 4)
    one.admit("a", PROMPT, max_tokens=1, block_hashes=hashes, salt=root)
    one.run()
    one.admit("b", PROMPT, max_tokens=1)
    one.run()
    assert one.ended["b", 1].cached_tokens == 8
    one.admit("c", PROMPT, max_tokens=1, salt=root_hash("", "", b"other"))
    one.run()
    assert one.ended["c", 1].cached_tokens == 0


def test_nothing_of_a_failed_step_is_cached():
    one = ToyInstance(faults=ToyFaults(fail_step=777))
    one.admit("a", [*PROMPT, 777], max_tokens=4)
    one.admit("b", PROMPT, max_tokens=4)
    one.step()
    assert {key[0] for key in one.ended} == {"a", "b"}
    assert one.ended["b", 1].code == "engine_error"
    assert one.scheduler.snapshot_blocks() == b""
    one.admit("c", PROMPT, max_tokens=4)
    one.run()
    one.verify("c")


def test_a_failed_item_ends_its_request_alone():
    one = ToyInstance(faults=ToyFaults(fail_item=777))
    one.admit("a", [*PROMPT, 777], n=2)
    one.admit("b", PROMPT)
    one.run()
    assert one.ended["a", 1].code == "engine_error"
    one.verify("b")


def test_what_a_step_gives_a_cancelled_sequence_is_dropped():
    one = ToyInstance()
    one.admit("a", PROMPT)
    one.admit("b", PROMPT)
    plan = one.scheduler.schedule(one.now)
    one.scheduler.cancel("a", 1)
    one.scheduler.check()
    held = one.scheduler.statistics()
    assert held.num_available_blocks == held.num_blocks - 6
    output = one.toy.execute(plan)
    one.take(one.scheduler.update(output.result, output.frames, one.now))
    one.scheduler.check()
    one.run()
    one.verify("b")
    assert ("a", 1, 0) not in one.streams
    assert ("a", 1) not in one.ended


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


def test_choices_are_drawn_from_one_row_and_copy_the_partial_block():
    one = ToyInstance(block_size=4)
    one.admit("a", PROMPT, n=3, max_tokens=6)
    one.run()
    one.verify("a")
    assert one.plans[0].items[0].num_samples == 3
    assert len(one.plans[1].copies) == 2
    source = one.plans[0].new[0].block_ids[2]
    assert {copy[0] for copy in one.plans[1].copies} == {source}
    forks = one.plans[1].new
    assert [new.parent for new in forks] == [1, 1]
    assert {new.block_ids[:2] for new in forks} == {one.plans[0].new[0].block_ids[:2]}
    assert all(not new.prompt_ids and len(new.output_ids) == 1 for new in forks)
    assert len({tuple(s.tokens) for s in one.streams.values()}) == 3


def test_choices_without_a_seat_are_computed_on_their_own():
    one = ToyInstance(max_num_seqs=2)
    one.admit("a", PROMPT, n=5, max_tokens=6)
    one.run()
    one.verify("a")


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_aborting_one_choice_leaves_the_others(choice, steps):
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    for _ in range(steps):
        one.step()
    one.scheduler.cancel("a", 1, choice)
    one.scheduler.cancel("a", 1, choice)
    one.scheduler.check()
    one.run()
    one.verify("a", choices=[1 - choice])
    got = one.streams.get(("a", 1, choice))
    assert (len(got.tokens) if got else 0) == steps


def test_the_request_ends_with_its_last_choice_aborted():
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    one.step()
    one.scheduler.cancel("a", 1, 0)
    one.scheduler.cancel("a", 1, 1)
    one.run()
    assert one.ended["a", 1].code == ""


def test_a_leader_that_ends_with_its_first_token_leaves_its_forks():
    sampling = {"seed": 7, "n": 3, "max_tokens": 6}
    one = ToyInstance()
    one.admit("probe", PROMPT, **sampling)
    request = one.requests["probe", 1]
    first = predict(PROMPT, request.sampling, 0, 1, block_size=4)[0]
    one.admit("a", PROMPT, stop_token_ids=(first,), **sampling)
    one.run()
    one.verify("a")
    assert one.streams["a", 1, 0].reason == "stop"
    assert one.streams["a", 1, 0].stop_id == first
    for plan in one.plans:
        assert not {new.parent for new in plan.new} & set(plan.ended)


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


def test_resumed_choices_go_on_where_they_were():
    one = ToyInstance()
    one.admit("whole", PROMPT, n=3, max_tokens=9)
    one.run()
    whole = [one.streams["whole", 1, choice].tokens for choice in range(3)]
    one.admit("a", PROMPT, n=3, max_tokens=9, outputs=[whole[0][:4], [], whole[2]])
    one.run()
    one.verify("a")
    assert [one.streams["a", 1, choice].tokens for choice in range(3)] == whole


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


def test_results_that_contradict_the_plan_are_refused():
    one = ToyInstance()
    one.admit("a", PROMPT)
    plan = one.scheduler.schedule(one.now)
    with pytest.raises(BadMessageError, match="1 items and 2 results"):
        one.scheduler.update(StepResult(plan.step, ((1,), (2,))), (), one.now)
    with pytest.raises(BadMessageError, match="logprob rows"):
        short = StepResult(plan.step, ((1,),), num_top=1, logprob_rows=(1,))
        one.scheduler.update(short, (b"", b"", b""), one.now)
    assert not one.scheduler.update(StepResult(99, ((1,),)), (), one.now)
    one.take(one.scheduler.fail_step(plan.step, "engine_error", "nonsense"))
    assert one.ended["a", 1].message == "nonsense"
    one.scheduler.check()
    assert one.scheduler.is_idle


def test_an_item_with_too_few_tokens_ends_its_request():
    one = ToyInstance()
    one.admit("a", PROMPT, n=2)
    plan = one.scheduler.schedule(one.now)
    one.take(one.scheduler.update(StepResult(plan.step, ((5,),)), (), one.now))
    assert one.ended["a", 1].code == "engine_error"
    one.scheduler.check()


def test_a_lost_worker_ends_everything_once():
    one = ToyInstance(max_num_seqs=2)
    for name in "abc":
        one.admit(name, PROMPT, n=2)
    one.step()
    one.scheduler.schedule(one.now)
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone"))
    one.scheduler.check()
    assert {ended.code for ended in one.ended.values()} == {"unavailable"}
    assert len(one.ended) == 3
    assert one.scheduler.is_idle


def test_who_was_in_the_step_that_a_worker_died_of_is_told_apart():
    one = ToyInstance(max_num_seqs=2)
    for name in "abc":
        one.admit(name, PROMPT)
    one.scheduler.schedule(one.now)
    one.take(one.scheduler.fail_all("unavailable", "the worker is gone", "worker_lost"))
    codes = {name: ended.code for (name, _), ended in one.ended.items()}
    assert codes == {"a": "worker_lost", "b": "worker_lost", "c": "unavailable"}
    assert one.scheduler.is_idle


def test_check_finds_a_leaked_block():
    one = ToyInstance()
    one.admit("a", PROMPT)
    one.step()
    one.scheduler.check()
    next(iter(one.scheduler._state.requests.values())).sequences[0].block_ids.pop()
    with pytest.raises(InvariantError):
        one.scheduler.check()


def test_two_that_prefill_the_same_at_once_both_leave_their_outputs_cached():
    one = ToyInstance(block_size=4)
    for name, seed in (("a", 1), ("b", 2)):
        one.admit(name, PROMPT, max_tokens=11, seed=seed)
    one.run()
    for name in ("a", "b"):
        one.verify(name)
        turn = PROMPT + one.streams[name, 1, 0].tokens
        one.admit(f"{name} again", turn, max_tokens=1)
        one.run()
        assert one.ended[f"{name} again", 1].cached_tokens == 20


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


def test_an_item_that_fails_in_the_middle_of_a_prompt_ends_its_request():
    one = ToyInstance(faults=ToyFaults(fail_item=777), max_num_batched_tokens=8)
    one.admit("a", [*PROMPT[:6], 777, *PROMPT])
    one.step()
    assert one.ended["a", 1].message == "toy fault: the item fails"
    assert one.scheduler.is_idle
