"""What stays cached of prompts and outputs, and what does not, on the toy engine."""

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.worker.toy.faults import ToyFaults


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
