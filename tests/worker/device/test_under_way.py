"""Steps under way: who waits, what is settled, and what a failure does to those behind it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.device.batches import PATIENCE_S, HeldCopy, batch_of, table_of
from xllm.errors import DeviceLostError, EngineError, InvariantError
from xllm.protocol.step import StepPlan
from xllm.worker.execution.device.under_way import (
    NOT_FINITE,
    StepsUnderWay,
    StepUnderWay,
    most_needed,
)
from xllm.worker.execution.outputs import StepOutputs


class Flow:
    """Decodes of some sequences, step by step, as the executor launches them."""

    def __init__(self, num_seqs=2, prompt=3):
        self.table = table_of(dict.fromkeys(range(1, num_seqs + 1), prompt))
        self.board = StepsUnderWay()
        self.num_seqs = num_seqs
        self.steps = []

    def launch(self, seqs=None):
        step = len(self.steps)
        seqs = range(1, self.num_seqs + 1) if seqs is None else seqs
        states = [self.table.find(seq) for seq in seqs]
        parts = [(state.seq, state.length - 1, 1) for state in states]
        batch = batch_of(self.table, parts)
        for number, entry in enumerate(batch.entries):
            entry.state.expect(100 * step + number)
        copy = HeldCopy()
        outputs = StepOutputs(len(parts), ())
        found = StepUnderWay(self.board, step, batch.entries, batch.entries, copy, outputs)
        self.board.add(found)
        self.steps.append((found, copy))
        return found, copy

    def outputs(self, seq):
        return self.table.find(seq).output_ids


def test_tokens_come_into_their_sequences_in_order():
    flow = Flow()
    (first, one), (second, two) = flow.launch(), flow.launch()
    assert flow.outputs(1) == [-1, -1]
    two.arrive([7, 8])
    assert not first.is_done
    flow.board.settle(flow.table)
    assert flow.outputs(1) == [-1, -1]  # the first is not known
    one.arrive([5, 6])
    assert first.wait().result.tokens == ((5,), (6,))
    flow.board.settle(flow.table)
    assert flow.outputs(1) == [5, -1]
    assert second.wait().result.tokens == ((7,), (8,))
    flow.board.settle(flow.table)
    assert (flow.outputs(1), flow.outputs(2)) == ([5, 7], [6, 8])
    assert len(flow.board) == 0


def test_the_engine_collects_itself_where_it_must_and_both_get_the_same():
    flow = Flow()
    (first, one), (second, two) = flow.launch(), flow.launch()
    found = []
    waiter = threading.Thread(target=lambda: found.extend([first.wait(), second.wait()]))
    waiter.start()
    one.arrive([5, 6])
    two.arrive([7, 8])
    flow.board.drain(flow.table)
    waiter.join(PATIENCE_S)
    assert [output.result.tokens for output in found] == [((5,), (6,)), ((7,), (8,))]
    assert flow.outputs(2) == [6, 8]


def test_a_sequence_that_failed_fails_in_the_steps_behind_and_alone():
    flow = Flow()
    (first, one), (second, two) = flow.launch(), flow.launch()
    one.arrive([-1, 6])
    two.arrive([7, 8])
    assert dict(first.wait().result.failed) == {0: NOT_FINITE}
    result = second.wait().result
    assert dict(result.failed) == {0: NOT_FINITE}
    assert result.tokens == ((), (8,))
    assert flow.board.settle(flow.table)  # numbers that are not finite were left
    with pytest.raises(EngineError, match="not a number"):
        flow.table.find(1)
    assert flow.outputs(2) == [6, 8]
    third, three = flow.launch([2])
    three.arrive([9])
    assert third.wait().result.failed == ()


def test_a_step_that_breaks_ends_its_sequences_and_no_others():
    flow = Flow()
    first, one = flow.launch([1])
    second, two = flow.launch([2])
    one.fail(EngineError("an illegal access"))
    two.arrive([8])
    with pytest.raises(DeviceLostError, match="the device is lost: an illegal access"):
        first.wait()
    assert second.wait().result.tokens == ((8,),)
    assert not flow.board.settle(flow.table)
    with pytest.raises(EngineError, match="a step of it failed"):
        flow.table.find(1)
    assert flow.outputs(2) == [8]


def test_what_nobody_expected_ends_its_step_and_no_other():
    flow = Flow()
    first, one = flow.launch([1])
    second, two = flow.launch([2])
    one.fail(ZeroDivisionError("a defect"))
    two.arrive([8])
    with pytest.raises(ZeroDivisionError):
        first.wait()
    assert second.wait().result.tokens == ((8,),)
    flow.board.settle(flow.table)
    assert len(flow.board) == 0


def test_pages_of_steps_under_way_are_in_use_until_they_are_settled():
    flow = Flow(prompt=17)
    first, one = flow.launch()
    assert flow.board.needs(16) == {1: 2, 2: 2}
    assert flow.board.needs(32) == {1: 1, 2: 1}
    one.arrive([1, 2])
    first.wait()
    flow.board.settle(flow.table)
    assert flow.board.needs(16) == {}
    assert most_needed({1: 2, 3: 1}, {1: 1, 2: 4}) == {1: 2, 2: 4, 3: 1}


def test_the_oldest_is_settled_alone():
    flow = Flow()
    (_, one), _ = flow.launch(), flow.launch()
    one.arrive([5, 6])
    assert not flow.board.settle_oldest(flow.table)
    assert flow.outputs(1) == [5, -1]
    assert len(flow.board) == 1


def test_a_failure_of_a_sequence_that_has_ended_is_not_kept():
    flow = Flow()
    first, one = flow.launch()
    flow.table.begin(StepPlan(9, ended=(1,)))
    one.arrive([-1, 6])
    assert dict(first.wait().result.failed) == {0: NOT_FINITE}
    flow.board.settle(flow.table)
    assert flow.table.statistics().num_refused == 0


def test_a_step_that_was_never_launched_is_a_defect():
    flow = Flow()
    found, copy = flow.launch()
    copy.arrive([1, 2])
    other = StepUnderWay(flow.board, 9, (), (), copy, StepOutputs(0, ()))
    with pytest.raises(InvariantError):
        StepsUnderWay().collect(other)
    found.wait()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["launch", "arrive", "wait", "settle"]), max_size=30))
def test_every_history_settles_to_the_tokens_that_were_drawn(events):
    flow = Flow(num_seqs=2)
    expected: list[int] = []
    arrived = waited = 0
    for event in events:
        if event == "launch" and len(flow.board) < 3:
            flow.launch()
        elif event == "arrive" and arrived < len(flow.steps):
            flow.steps[arrived][1].arrive([2 * arrived, 2 * arrived + 1])
            expected.append(2 * arrived)
            arrived += 1
        elif event == "wait" and waited < arrived:
            step = flow.steps[waited][0]
            assert step.is_done
            assert step.wait().result.tokens[0] == (2 * waited,)
            waited += 1
        elif event == "settle":
            flow.board.settle(flow.table)
        known = [token for token in flow.outputs(1) if token >= 0]
        assert known == expected[: len(known)]
    for step, copy in flow.steps[arrived:]:
        copy.arrive([2 * len(expected), 2 * len(expected) + 1])
        expected.append(2 * len(expected))
        assert step.is_done
    flow.board.drain(flow.table)
    assert flow.outputs(1) == expected
    flow.table.check()
