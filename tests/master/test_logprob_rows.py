"""A result whose logprob rows fall short is refused before anything of it is settled."""

import array

import pytest

from tests.master.toy_instance import PROMPT, ToyInstance
from xllm.errors import BadMessageError
from xllm.protocol.step import StepResult


def with_rows(step: int, num_items: int, rows: tuple[int, ...]) -> tuple[StepResult, list[bytes]]:
    """A result with one token an item and zeros for logprobs."""
    cells = array.array("i", [0] * max(sum(rows), 0)).tobytes()
    result = StepResult(step, ((5,),) * num_items, 1000, num_top=0, logprob_rows=rows)
    return result, [cells, cells, cells]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"logprobs": 0}, (1, 0)),
        ({"logprobs": 0}, (1,)),
        ({"logprobs": 0}, (1, 1, 1)),
        ({"logprobs": 0}, (3, -1)),
        ({"prompt_logprobs": 0}, (9, 8)),
        ({"prompt_logprobs": 0, "logprobs": 0}, (10, 9)),
    ],
)
def test_missing_rows_leave_the_step_in_flight(options, rows):
    one = ToyInstance(prefix_cache=False)
    one.admit("a", PROMPT, **options)
    one.admit("b", PROMPT, **options)
    plan = one.scheduler.schedule(one.now)
    before = one.scheduler.statistics()
    result, frames = with_rows(plan.step, 2, rows)
    with pytest.raises(BadMessageError):
        one.scheduler.update(result, frames, one.now)
    assert one.scheduler.statistics() == before
    one.scheduler.check()
    one.take(one.scheduler.fail_step(plan.step, "engine_error", "nonsense"))
    assert [ended.code for ended in one.ended.values()] == ["engine_error"] * 2
    one.scheduler.check()
    assert one.scheduler.is_idle


@pytest.mark.parametrize("options", [{"logprobs": 0}, {"prompt_logprobs": 0}])
def test_a_result_without_any_rows_is_refused_too(options):
    one = ToyInstance()
    one.admit("a", PROMPT, **options)
    plan = one.scheduler.schedule(one.now)
    with pytest.raises(BadMessageError, match="0 logprob rows"):
        one.scheduler.update(StepResult(plan.step, ((5,),), 1000), (), one.now)
    one.scheduler.check()


def test_items_that_failed_or_ended_need_no_rows():
    one = ToyInstance(prefix_cache=False)
    for name in "abc":
        one.admit(name, PROMPT, prompt_logprobs=0, logprobs=0)
    plan = one.scheduler.schedule(one.now)
    one.scheduler.cancel("b", 1)
    result, frames = with_rows(plan.step, 3, (0, 0, 10))
    result = StepResult(
        result.step, result.tokens, 1, (), result.logprob_rows, 0, failed=((0, "it failed"),)
    )
    one.take(one.scheduler.update(result, frames, one.now))
    assert one.ended["a", 1].message == "it failed"
    assert len(one.scores["c"]) == 9
    one.scheduler.check()
