"""An online prompt does not wait for the prompt of an offline request, nor for its prefix."""

import pytest

from tests.master.toy_instance import ToyInstance
from xllm.config.scheduling import STRATEGIES

LONG = [20 + number % 900 for number in range(150)]


def make(strategy: str, depth: int, **limits) -> ToyInstance:
    return ToyInstance(
        strategy=strategy, max_in_flight=depth, max_num_batched_tokens=16, num_blocks=200, **limits
    )


def steps_until_first_token(one: ToyInstance, name: str) -> int:
    for number in range(1, 40):
        assert one.step()
        if (name, 1, 0) in one.streams:
            return number
    raise AssertionError(f"{name} had no token in 40 steps")


CUTTING = [name for name in STRATEGIES if name != "continuous"]


@pytest.mark.parametrize("strategy", CUTTING)
@pytest.mark.parametrize("depth", [1, 2])
def test_an_online_prompt_is_computed_before_the_rest_of_an_offline_one(strategy, depth):
    one = make(strategy, depth)
    one.admit("offline", LONG, offline=True)
    one.step()
    one.admit("online", range(900, 909))
    assert steps_until_first_token(one, "online") <= depth
    one.run()
    for name in ("offline", "online"):
        one.verify(name)


@pytest.mark.parametrize("strategy", CUTTING)
@pytest.mark.parametrize("depth", [1, 2])
def test_an_online_prompt_that_runs_goes_first_too(strategy, depth):
    one = make(strategy, depth)
    one.admit("offline", LONG, offline=True)
    one.step()
    one.admit("online", LONG[::-1][:60])
    # Four steps of 16 tokens, behind what is under way.
    assert steps_until_first_token(one, "online") <= 3 + depth
    one.run()
    for name in ("offline", "online"):
        one.verify(name)


@pytest.mark.parametrize("strategy", CUTTING)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("leads", [True, False])
def test_nobody_online_waits_for_what_an_offline_request_computes(strategy, depth, leads):
    one = make(strategy, depth, share_prefixes=True)
    one.admit("leader", LONG, offline=leads)
    one.step()
    one.admit("follower", [*LONG[:140], 7, 8], offline=not leads)
    steps = steps_until_first_token(one, "follower" if leads else "leader")
    assert steps <= 9 + depth
    one.run()
    for name in ("leader", "follower"):
        one.verify(name)
    # An offline one waits for what an online one computes.
    cached = one.ended["follower", 1].cached_tokens
    assert cached <= 16 * depth if leads else cached == 140
