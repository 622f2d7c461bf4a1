"""The toy engine against its oracle: chunks, batches, caches, forks, preemption, wrong pages."""

from __future__ import annotations

import array
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.toy.plan_driver import PlanDriver
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, ItemOptions, NewSequence, StepItem, StepPlan
from xllm.worker.toy.executor import ToyExecutor
from xllm.worker.toy.faults import ToyFaults
from xllm.worker.toy.stream import predict, predict_cheap


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(1000), k=length))


@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 4, 16]),
    memory=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_chunks_in_any_batch_give_the_predicted_stream(
    data, lengths, block_size, memory
) -> None:
    driver = PlanDriver(ToyExecutor(block_size=block_size, memory=memory), block_size)
    goal = 24
    sequences = [
        driver.admit(prompt_of(length, k), SamplingParams(seed=k), choice=k % 2)
        for k, length in enumerate(lengths)
    ]
    while open_ones := [driven for driven in sequences if len(driven.outputs) < goal]:
        chosen = data.draw(
            st.lists(st.sampled_from(open_ones), min_size=1, unique_by=lambda s: s.seq)
        )
        work = []
        for driven in chosen:
            left = driven.length - driven.computed
            count = data.draw(st.integers(1, left)) if left > 1 else 1
            work.append((driven, count, int(count == left)))
        driver.run(work)
    for driven in sequences:
        if memory:
            expected = predict(
                driven.prompt, driven.sampling, driven.choice, goal, block_size=block_size
            )
        else:
            expected = predict_cheap(driven.prompt, driven.sampling, driven.choice, goal)
        assert driven.outputs == expected
    assert driver.executor.statistics().pages.pages_broken == 0


def start_two_sharing(executor: ToyExecutor | None = None):
    """A sequence of 5 pages and one whose first 3 pages are the same physical ones."""
    driver = PlanDriver(executor or ToyExecutor())
    shared = prompt_of(48, 1)
    first = driver.admit((*shared, *prompt_of(25, 2)), SamplingParams(seed=1))
    driver.run([(first, len(first.prompt), 1)])
    second = driver.admit(
        (*shared, *prompt_of(10, 3)), SamplingParams(seed=2), cached=first.table[:3]
    )
    return driver, first, second


def expected_stream(driven, count: int) -> list[int]:
    return predict(driven.prompt, driven.sampling, driven.choice, count)


def test_a_cached_prefix_gives_the_same_stream_and_is_read_back() -> None:
    driver, first, second = start_two_sharing()
    checked = driver.executor.statistics().pages.pages_checked
    driver.run([(second, 10, 1), (first, 1, 1)])
    assert driver.executor.statistics().pages.pages_checked >= checked + 3
    driver.decode([first, second], 30)
    assert first.outputs == expected_stream(first, 32)
    assert second.outputs == expected_stream(second, 31)
    assert driver.executor.statistics().pages.pages_broken == 0


@pytest.mark.parametrize("damage", ["foreign", "stale", "swapped", "missing"])
def test_a_wrong_page_under_a_prefix_changes_the_stream_and_is_counted(damage: str) -> None:
    driver, _first, second = start_two_sharing()
    other = driver.admit(prompt_of(64, 9), SamplingParams(seed=1))
    driver.run([(other, 64, 1)])
    table = list(second.table)
    if damage == "foreign":
        table[1] = other.table[1]
    elif damage == "stale":
        driver.executor.execute(StepPlan(99, copies=((other.table[2], table[2]),)))
    elif damage == "swapped":
        table[1], table[2] = table[2], table[1]
    else:
        table[1] = 4000
    wrong = driver.admit(second.prompt, second.sampling, cached=table)
    driver.run([(wrong, 10, 1)])
    driver.decode([wrong], 10)
    assert wrong.outputs != expected_stream(wrong, 11)
    assert driver.executor.statistics().pages.pages_broken > 0


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_page_overwritten_under_a_running_sequence_shows_within_a_round(victim: int) -> None:
    driver, first, _ = start_two_sharing()
    driver.decode([first], 5)
    source = first.table[(victim + 2) % 4]
    driver.executor.execute(StepPlan(99, copies=((source, first.table[victim]),)))
    driver.decode([first], 5)
    assert first.outputs[:6] == expected_stream(first, 6)
    assert first.outputs != expected_stream(first, 11)
    assert driver.executor.statistics().pages.pages_broken > 0


def test_two_sequences_writing_one_page_spoil_a_stream() -> None:
    driver = PlanDriver(ToyExecutor())
    one = driver.admit(prompt_of(5, 1), SamplingParams(seed=1))
    two = driver.admit(prompt_of(5, 2), SamplingParams(seed=1), table=[1])
    two.computed = 0
    driver.run([(one, 5, 1)])
    driver.run([(two, 5, 1)])
    driver.decode([one, two], 8)
    assert one.outputs != expected_stream(one, 9)


def test_forks_share_full_pages_and_copy_the_partial_one() -> None:
    driver = PlanDriver(ToyExecutor())
    sampling = SamplingParams(seed=5, n=3)
    parent = driver.admit(prompt_of(40), sampling)
    drawn = driver.run([(parent, 40, 3)]).result.tokens[0]
    assert len(set(drawn)) == 3
    children = []
    for choice in (1, 2):
        copy = next(driver.blocks)
        driver.copies.append((parent.table[2], copy))
        children.append(
            driver.admit(
                parent.prompt,
                sampling,
                choice=choice,
                outputs=drawn[choice : choice + 1],
                parent=parent.seq,
                table=[*parent.table[:2], copy],
            )
        )
    everyone = [parent, *children]
    driver.decode(everyone, 30)
    for driven in everyone:
        assert driven.outputs == expected_stream(driven, 31)


def test_a_fork_may_come_with_its_parents_end() -> None:
    driver = PlanDriver(ToyExecutor())
    sampling = SamplingParams(seed=5, n=2)
    parent = driver.admit(prompt_of(32), sampling)
    drawn = driver.run([(parent, 32, 2)]).result.tokens[0]
    child = driver.admit(
        parent.prompt, sampling, choice=1, outputs=drawn[1:], parent=parent.seq,
        table=parent.table,
    )  # fmt: skip
    driver.run([(child, 1, 1)], ended=[parent.seq])
    driver.decode([child], 3)
    assert child.outputs == expected_stream(child, 5)


def test_a_preempted_sequence_goes_on_as_a_new_one() -> None:
    driver, first, _ = start_two_sharing()
    driver.decode([first], 7)
    again = driver.admit(
        first.prompt, first.sampling, outputs=first.outputs, cached=first.table[:4]
    )
    driver.run([(again, again.length - again.computed, 1)], ended=[first.seq])
    driver.decode([again], 20)
    assert again.outputs == expected_stream(first, 29)


def test_bad_items_fail_alone() -> None:
    driver = PlanDriver(ToyExecutor(num_blocks=8))
    good = driver.admit(prompt_of(20), SamplingParams(seed=1))
    driver.run([(good, 20, 1)])
    sampling = SamplingParams()
    plan = StepPlan(
        7,
        (
            StepItem(77, 1, 0, 1),
            StepItem(good.seq, 1, 20, 1),
            StepItem(78, 0, 0, 2),
            StepItem(79, 0, 0, 2),
            StepItem(80, 0, 0, 3, (1,)),
            StepItem(81, 1, 0, 1),
        ),
        (
            NewSequence(78, (1, 2), (), sampling, 0, (8,)),
            NewSequence(79, (1, 2), (), sampling, 0, ()),
            NewSequence(80, (1, 2), (), sampling, 0),
            NewSequence(81, (), (4,), sampling, 1, (1,), parent=55),
        ),
    )
    result = driver.executor.execute(plan).result
    assert result.tokens[1] == tuple(expected_stream(good, 2)[1:])
    reasons = dict(result.failed)
    assert sorted(reasons) == [0, 2, 3, 4, 5]
    assert "not known" in reasons[0]
    assert "block 8 of 8" in reasons[2]
    assert "block table" in reasons[3]
    assert "2 tokens" in reasons[4]
    assert "unknown sequence 55" in reasons[5]


def test_logprob_frames_have_the_shape_of_the_protocol() -> None:
    driver = PlanDriver(ToyExecutor())
    plain = driver.admit(prompt_of(4), SamplingParams(seed=1))
    scored = driver.admit(prompt_of(6), SamplingParams(seed=1, logprobs=2, prompt_logprobs=1))
    output = driver.run([(plain, 4, 1), (scored, 4, 0)], score_prompt=True)
    assert output.result.num_top == 1
    assert output.result.logprob_rows == (3, 4)
    output = driver.run([(plain, 1, 1), (scored, 2, 1)], score_prompt=True)
    assert output.result.num_top == 2
    assert output.result.logprob_rows == (0, 2)  # one prompt token is left, and the drawn one
    ids, logprobs, ranks = (
        array.array(kind, frame) for kind, frame in zip("ifi", output.frames, strict=True)
    )
    assert len(ids) == len(logprobs) == 2 * 3
    assert ids[0] == scored.prompt[5]
    assert ids[3] == ids[4] == scored.outputs[0]
    assert list(ranks) == [1, 1]
    output = driver.run([(plain, 1, 1)])
    assert output.result.num_top == -1
    assert output.frames == ()


def test_faults_strike_where_they_are_asked_for() -> None:
    faults = ToyFaults(fail_item=5, fail_step=6)
    driver = PlanDriver(ToyExecutor(faults=faults))
    good = driver.admit((1, 2, 3), SamplingParams(seed=1))
    bad = driver.admit((1, 5), SamplingParams(seed=1))
    output = driver.run([(good, 3, 1), (bad, 2, 1)])
    assert [index for index, _ in output.result.failed] == [1]
    assert good.outputs == expected_stream(good, 1)
    with pytest.raises(RuntimeError, match="the step fails"):
        driver.run([(driver.admit((6,), SamplingParams()), 1, 1)])


def test_a_long_step_keeps_its_counter_moving() -> None:
    executor = ToyExecutor(step_s=0.12)
    executor.execute(StepPlan(1))
    assert executor.counter >= 3


def test_a_step_takes_time_for_each_token_that_it_computes() -> None:
    driver = PlanDriver(ToyExecutor(token_s=0.004))
    one = driver.admit(tuple(range(20, 52)), SamplingParams())
    prefill = driver.run([(one, 32, 1)])
    assert prefill.result.duration_ns >= 32 * 0.004 * 1e9
    assert one.outputs == expected_stream(one, 1)


@pytest.mark.parametrize(
    "options",
    [
        ItemOptions(source_step=3),
        ItemOptions(source_row=0),
        ItemOptions(positions=(0, 1)),
        ItemOptions(mask_row=0),
        ItemOptions(adapter="a"),
        ItemOptions(dp_rank=1),
        ItemOptions(hold=True),
        ItemOptions(token_ids=(1,)),
    ],
    ids=str,
)
def test_options_that_are_not_supported_fail_their_item(options: ItemOptions) -> None:
    driver = PlanDriver(ToyExecutor())
    good = driver.admit(prompt_of(2), SamplingParams(seed=1))
    news = (good.new, NewSequence(50, (1, 2), (), SamplingParams(), 0))
    items = (
        StepItem(50, ItemKind.PREFILL, 0, 2, (9,), options=options),
        StepItem(good.seq, ItemKind.PREFILL, 0, 2, (8,)),
    )
    result = driver.executor.execute(StepPlan(1, items, news)).result
    assert [index for index, _ in result.failed] == [0]
    assert "supported" in result.failed[0][1] or "1 token ids for 2 rows" in result.failed[0][1]
    assert list(result.tokens[1]) == expected_stream(good, 1)


def test_kinds_and_adapters_that_are_not_supported_fail_alone() -> None:
    executor = ToyExecutor()
    items = (
        StepItem(1, ItemKind.ENCODE, 0, 2, (1,)),
        StepItem(1, ItemKind.DUMMY, 0, 0),
        StepItem(2, ItemKind.PREFILL, 0, 2, (2,)),
    )
    news = (
        NewSequence(1, (1, 2), (), SamplingParams(), 0),
        NewSequence(2, (1, 2), (), SamplingParams(), 0, adapter="a"),
    )
    reasons = dict(executor.execute(StepPlan(1, items, news)).result.failed)
    assert sorted(reasons) == [0, 2]
    assert "kind 3" in reasons[0]
    assert "adapters" in reasons[2]


def test_the_context_is_no_longer_than_the_memory() -> None:
    def ready(**fields: int) -> int:
        return ToyExecutor(**fields).load(lambda done, total: None).max_model_len

    assert ready() == 8192
    assert ready(num_blocks=100, block_size=16) == 1600
    assert ready(num_blocks=100, block_size=16, max_model_len=500) == 500
