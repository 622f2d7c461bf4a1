"""The oracle itself: golden streams, and that everything it should depend on matters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.protocol.sampling import SamplingParams
from xllm.worker.toy.stream import DEFAULT_IDS, predict, predict_cheap

PROMPT = tuple(range(100, 140))
SEEDED = SamplingParams(seed=7)


def test_golden_streams() -> None:
    assert predict(PROMPT, SEEDED, 0, 6) == [415, 764, 19, 346, 68, 323]
    assert predict_cheap(PROMPT, SEEDED, 0, 6) == [830, 312, 150, 503, 707, 930]


@pytest.mark.parametrize("oracle", [predict, predict_cheap])
def test_everything_matters(oracle) -> None:
    base = oracle(PROMPT, SEEDED, 0, 20)
    swapped = (PROMPT[1], PROMPT[0], *PROMPT[2:])
    others = [
        oracle(PROMPT, SamplingParams(seed=8), 0, 20),
        oracle(PROMPT, SEEDED, 1, 20),
        oracle(swapped, SEEDED, 0, 20),
        oracle(PROMPT[:-1], SEEDED, 0, 20),
        oracle((1, *PROMPT), SEEDED, 0, 20),
        oracle((*PROMPT, 1), SEEDED, 0, 20),
    ]
    streams = [tuple(base), *map(tuple, others)]
    assert len(set(streams)) == len(streams)


@pytest.mark.parametrize("oracle", [predict, predict_cheap])
def test_greedy_ignores_the_seed(oracle) -> None:
    one = oracle(PROMPT, SamplingParams(temperature=0, seed=1), 0, 20)
    assert one == oracle(PROMPT, SamplingParams(temperature=0, seed=2), 0, 20)
    assert one == oracle(PROMPT, SamplingParams(temperature=0), 0, 20)


@given(
    prompt=st.lists(st.integers(0, 999), min_size=1, max_size=70),
    cut=st.integers(0, 40),
    block_size=st.sampled_from([1, 4, 16, 64]),
)
@settings(max_examples=60, deadline=None)
def test_a_stream_goes_on_from_its_outputs(prompt, cut, block_size) -> None:
    whole = predict(prompt, SEEDED, 0, 40, block_size=block_size)
    rest = predict(prompt, SEEDED, 0, 40 - cut, outputs=whole[:cut], block_size=block_size)
    assert rest == whole[cut:]
    cheap = predict_cheap(prompt, SEEDED, 0, 40)
    assert predict_cheap(prompt, SEEDED, 0, 40 - cut, num_outputs=cut) == cheap[cut:]


def test_streams_look_even() -> None:
    counts = [0] * 10
    for seed in range(100):
        for token in predict(PROMPT, SamplingParams(seed=seed), 0, 50, range(10)):
            counts[token] += 1
    chi_square = sum((count - 500) ** 2 / 500 for count in counts)
    assert chi_square < 28  # 9 degrees of freedom: 0.1% of honest generators exceed 27.9


def test_only_ids_of_the_range() -> None:
    ids = range(50, 60)
    assert set(predict(PROMPT, SEEDED, 0, 300, ids)) == set(ids)
    assert set(predict_cheap(PROMPT, SEEDED, 0, 300, ids)) == set(ids)
    assert min(predict(PROMPT, SEEDED, 0, 300)) >= DEFAULT_IDS.start
