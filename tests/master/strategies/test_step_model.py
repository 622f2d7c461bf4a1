"""The step-time model and the budget that follows from it: numbers in, numbers out."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.master.strategies.keeping import GivingWay, keeps_pages
from xllm.master.strategies.step_budget import MIN_CHUNK, StepBudget
from xllm.master.strategies.step_model import MIN_STEPS, StepShape, StepTimeModel
from xllm.protocol.step import ItemKind, StepItem, StepPlan


def true_time(shape: StepShape, speed: float = 1.0) -> float:
    """A machine: 5 ms a step, 1 ms a token, 2 us a position read, 0.1 ms a sequence, 50 ns a
    pair."""
    seconds = 5e-3 + 1e-3 * shape.tokens + 2e-6 * shape.context
    return speed * (seconds + 1e-4 * shape.sequences + 5e-8 * shape.pairs)


def random_shape(rng: random.Random) -> StepShape:
    shape = StepShape()
    count = rng.randrange(0, 32)
    if count:
        shape.add_decodes(count, count * rng.randrange(1, 2000))
    if not count or rng.random() < 0.4:
        shape.add_prefill(rng.choice([0, 0, 500, 4000]), rng.randrange(1, 1024))
    return shape


def trained(num_steps: int = 400, speed: float = 1.0, noise: float = 0.0) -> StepTimeModel:
    rng = random.Random(1)
    model = StepTimeModel()
    for _ in range(num_steps):
        shape = random_shape(rng)
        model.add(shape, true_time(shape, speed) * (1 + noise * rng.uniform(-1, 1)))
    return model


def test_a_shape_counts_what_a_plan_computes():
    decode, prefill = int(ItemKind.DECODE), int(ItemKind.PREFILL)
    plan = StepPlan(1, (StepItem(1, decode, 9, 1), StepItem(2, prefill, 100, 20)))
    shape = StepShape.of(plan)
    assert (shape.tokens, shape.context, shape.sequences) == (21, 130, 2)
    assert shape.pairs == 20 * 100 + 20 * 20 / 2


def test_without_data_nothing_is_predicted_and_nothing_cut():
    model = StepTimeModel()
    for _ in range(MIN_STEPS + 5):
        model.add(StepShape(4, 400, 4), 0.01)
    assert not model.is_ready
    assert model.predict(StepShape(1, 1, 1)) is None
    assert model.prefill_s(0, 10) is None
    assert model.largest_chunk(0.0, 0, 77) == 77
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.add(StepShape(8, 8, 1, 32.0), seconds)
    assert not model.is_ready


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_learns_the_machine(noise):
    model = trained(noise=noise)
    rng = random.Random(2)
    for _ in range(100):
        shape = random_shape(rng)
        assert model.predict(shape) == pytest.approx(true_time(shape), rel=0.15)


def test_it_follows_a_machine_that_slows_down_and_not_a_single_pause():
    model = trained()
    shape = StepShape()
    shape.add_prefill(0, 512)
    before = model.predict(shape)
    model.add(shape, 600.0)
    assert model.predict(shape) < 2 * before
    rng = random.Random(3)
    for _ in range(400):
        other = random_shape(rng)
        model.add(other, true_time(other, 3.0))
    assert model.predict(shape) == pytest.approx(3 * true_time(shape), rel=0.2)


def test_long_runs_of_decodes_do_not_wash_out_what_prefills_cost():
    model = trained()
    shape = StepShape()
    shape.add_prefill(2000, 512)
    for step in range(3000):
        decodes = StepShape()
        decodes.add_decodes(8, 8 * (100 + step))
        model.add(decodes, true_time(decodes))
    assert model.predict(shape) == pytest.approx(true_time(shape), rel=0.25)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(1e-6, 10.0)), max_size=60))
def test_no_history_gives_a_negative_prediction(steps):
    model = StepTimeModel()
    for seed, seconds in steps:
        model.add(random_shape(random.Random(seed)), seconds)
    if model.is_ready:
        for seed in range(20):
            assert model.predict(random_shape(random.Random(seed))) >= 0.0
        assert model.prefill_s(10, 10) >= 0.0
        assert model.decode_s(10) >= 0.0


@settings(max_examples=200, deadline=None)
@given(st.floats(0.0, 3.0), st.integers(0, 8000), st.integers(1, 4000))
def test_the_largest_chunk_fits_and_one_more_does_not(seconds, start, remaining):
    model = trained(100)
    chunk = model.largest_chunk(seconds, start, remaining)
    assert 0 <= chunk <= remaining
    if chunk:
        assert model.prefill_s(start, chunk) <= seconds + 1e-9
    if chunk < remaining:
        assert model.prefill_s(start, chunk + 1) > seconds - 1e-9


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2048),
    st.none() | st.floats(0.0, 2.0),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), min_size=1, max_size=8),
)
def test_a_budget_is_kept_and_never_nothing(tokens, seconds, prefills):
    model = trained(100)
    budget = StepBudget(tokens, model, seconds)
    given_tokens, spent = 0, 0.0
    for index, (start, remaining) in enumerate(prefills):
        chunk = budget.allowed(start, remaining)
        assert 0 <= chunk <= remaining
        if index == 0:
            assert chunk >= min(MIN_CHUNK, remaining, tokens)
        if not chunk:
            continue
        budget.take(start, chunk)
        given_tokens += chunk
        spent += model.prefill_s(start, chunk)
        if seconds is not None and not (index == 0 and chunk <= MIN_CHUNK):
            first = model.prefill_s(prefills[0][0], min(MIN_CHUNK, prefills[0][1], tokens))
            assert spent <= max(seconds, first) + 1e-9
    assert given_tokens <= tokens


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 2048),
    st.floats(0.0, 2.0),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), min_size=2, max_size=8),
)
def test_a_free_first_prompt_is_whole_and_others_join_within_the_time(tokens, seconds, prefills):
    model = trained(100)
    budget = StepBudget(tokens, model, seconds, is_first_free=True)
    start, remaining = prefills[0]
    first = budget.allowed(start, remaining)
    assert first == min(remaining, tokens)
    budget.take(start, first)
    spent = model.prefill_s(start, first)
    for start, remaining in prefills[1:]:
        chunk = budget.allowed(start, remaining)
        assert 0 <= chunk <= min(remaining, budget.tokens)
        if chunk:
            budget.take(start, chunk)
            spent += model.prefill_s(start, chunk)
            assert spent <= seconds + 1e-9


def test_pages_are_kept_while_nobody_misses_them_or_they_are_dear():
    model = trained()
    free = GivingWay(num_tokens=64, num_blocks=4, num_short=0, mean_tokens=4000)
    assert keeps_pages(free, model, 16)
    missed = GivingWay(num_tokens=64, num_blocks=4, num_short=4, mean_tokens=4000)
    assert not keeps_pages(missed, model, 16)
    dear = GivingWay(num_tokens=4000, num_blocks=250, num_short=10, mean_tokens=200)
    assert keeps_pages(dear, model, 16)
    assert keeps_pages(dear, StepTimeModel(), 16)
