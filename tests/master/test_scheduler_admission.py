"""What the scheduler admits and what it refuses, on the toy engine."""

import pytest

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.protocol.token_bytes import pack_tokens


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
