"""The simulated future against futures walked step by step."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.master.strategies.zero_evict import (
    Timetable,
    blocks_at_end,
    count_released,
    will_fit,
)


def peak(timetables: list[Timetable], size: int) -> int:
    """The most blocks over those held now, everybody growing by a token a step."""
    worst = 0
    for step in range(max((one.steps_left for one in timetables), default=0) + 1):
        need = 0
        for one in timetables:
            if one.steps_left < step:
                need -= one.released
            else:
                tokens = min(one.tokens + step, one.end - 1)
                need += max(0, -(-tokens // size) - one.blocks)
        worst = max(worst, need)
    return worst


def random_timetables(rng: random.Random, size: int) -> list[Timetable]:
    found = []
    for _ in range(rng.randrange(0, 9)):
        tokens = rng.randrange(2, 60)
        blocks = -(-tokens // size)
        end = tokens + rng.randrange(1, 60)
        found.append(Timetable(tokens, end, blocks, rng.randrange(blocks + 1)))
    return found


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([1, 2, 4, 16]))
def test_a_yes_is_never_wrong_and_a_no_is_not_far_off(seed, size):
    rng = random.Random(seed)
    timetables = random_timetables(rng, size)
    reserved = rng.randrange(0, 10)
    needed = peak(timetables, size) + reserved
    free = needed + rng.randrange(-6, 7)
    if will_fit(free, reserved, timetables, size):
        assert free >= needed
    # Drift costs each sequence a few tokens, and delays what is released.
    generous = reserved + sum(max(0, blocks_at_end(o.end, size) - o.blocks) for o in timetables)
    assert will_fit(generous + len(timetables) * (1 + 3 // size + 3), reserved, timetables, size)


def test_releases_make_room_that_a_sum_of_ends_would_not_see():
    short = Timetable(tokens=60, end=64, blocks=4, released=4)
    long = Timetable(tokens=16, end=129, blocks=1, released=1)
    assert blocks_at_end(129, 16) == 8
    assert will_fit(4, 0, [short, long], 16)
    assert not will_fit(2, 0, [short, long], 16)
    assert not will_fit(4, 0, [Timetable(60, 64, 4, 0), long], 16)
    assert not will_fit(4, 5, [short, long], 16)


def test_who_is_alone_always_fits_where_its_end_does():
    for size in (1, 4, 16):
        for end in range(2, 80):
            need = blocks_at_end(end, size)
            assert will_fit(need, need, [], size)
            assert not will_fit(need - 1, need, [], size)


def test_shared_blocks_go_with_their_last_holder():
    tables = [[0, 1, 2], [0, 1, 3, 4], [0, 5]]
    refs = {0: 3, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}
    assert count_released(tables, refs.__getitem__) == [1, 3, 2]
    # One more holder, elsewhere, keeps them.
    assert count_released(tables, lambda block: refs[block] + (block < 2)) == [1, 2, 1]
