"""What an executor promises beside tokens: loading again, the context it takes, what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import structlog.testing

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import GREEDY, PlanDriver, native_settings, random_prompts
from xllm.errors import ConfigError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, ItemOptions, NewSequence, StepItem, StepPlan
from xllm.worker.execution import loading
from xllm.worker.execution.native import NativeExecutor


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("contract") / "model")


def prefill(seq: int, count: int, **more: object) -> StepItem:
    return StepItem(seq, ItemKind.PREFILL, 0, count, **more)


def test_loading_again_keeps_the_model_and_forgets_the_rest(directory: Path) -> None:
    driver = PlanDriver(directory)
    (prompt,) = random_prompts(1, 20, 20)
    new = NewSequence(1, tuple(prompt), (), GREEDY, 0, (0, 1))
    expected = driver.run([prefill(1, 20)], [new]).result.tokens
    model = driver.executor._loaded().loop._model
    pool = driver.executor._loaded().pool
    driver.executor._loaded().loop._model._embedding.weight[400] = float("nan")
    spoilt = NewSequence(2, (*prompt[:19], 400), (), GREEDY, 0, (2, 3))
    assert driver.run([prefill(2, 20)], [spoilt]).result.failed
    assert pool.may_hold_nan
    told: list[tuple[int, int]] = []
    ready = driver.executor.load(lambda *sizes: told.append(sizes))
    assert ready == driver.ready
    assert told == [(told[0][1], told[0][1])]
    assert driver.executor._loaded().loop._model is model
    assert driver.executor._loaded().pool is pool
    assert not pool.may_hold_nan
    driver.executor.check()
    assert driver.executor.statistics().sequences.num_sequences == 0
    # The number of an old sequence is free again, and the old one is not known any more.
    assert driver.run([StepItem(2, ItemKind.DECODE, 20, 1)]).result.failed
    assert driver.run([prefill(1, 20)], [new]).result.tokens == expected


def test_the_context_is_no_longer_than_the_memory(directory: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        driver = PlanDriver(directory, kv_cache_bytes=20 * 1536 * 16)
    assert driver.ready.num_blocks == 20
    assert driver.ready.max_model_len == 320
    (line,) = [line for line in logs if line["event"] == "context_cut_to_kv_memory"]
    assert (line["log_level"], line["model_len"], line["max_model_len"]) == ("warning", 1024, 320)
    with structlog.testing.capture_logs() as logs:
        assert PlanDriver(directory).ready.max_model_len == 1024
    assert [line for line in logs if line["event"] == "context_cut_to_kv_memory"] == []


def test_a_context_beyond_the_model_is_refused_before_its_weights_are_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_weights", pytest.fail)
    settings = native_settings(directory)
    model = dataclasses.replace(settings.model, max_model_len=1025)
    with pytest.raises(ConfigError, match=r"must be at most 1024, .*, not 1025") as caught:
        PlanDriver(directory, executor=NativeExecutor(dataclasses.replace(settings, model=model)))
    assert caught.value.param == "model.max_model_len"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ItemOptions(source_step=3), "placeholders"),
        (ItemOptions(positions=(0, 1)), "positions"),
        (ItemOptions(mask_row=0), "masks"),
        (ItemOptions(adapter="a"), "adapters"),
        (ItemOptions(dp_rank=1), "ranks"),
        (ItemOptions(hold=True), "holds of KV"),
        (ItemOptions(token_ids=(1,)), "1 token ids for 2 rows"),
    ],
    ids=str,
)
def test_options_that_are_not_supported_fail_their_item(
    directory: Path, options: ItemOptions, words: str
) -> None:
    driver = PlanDriver(directory)
    new = NewSequence(1, (5, 6), (), GREEDY, 0, (0,))
    ((_, reason),) = driver.run([prefill(1, 2, options=options)], [new]).result.failed
    assert words in reason


def test_an_adapter_that_is_not_there_fails_its_sequence(directory: Path) -> None:
    driver = PlanDriver(directory)
    new = NewSequence(1, (5, 6), (), GREEDY, 0, (0,), adapter="a")
    ((_, reason),) = driver.run([prefill(1, 2)], [new]).result.failed
    assert "adapters" in reason


def test_a_sequence_that_is_new_and_ended_is_forgotten(directory: Path) -> None:
    """New ones are learnt before ended ones are forgotten."""
    driver = PlanDriver(directory)
    new = NewSequence(1, (5, 6), (), GREEDY, 0, (0,))
    plan = StepPlan(1, (), (new,), (1,))
    assert driver.executor.execute(plan).result.failed == ()
    assert driver.executor.statistics().sequences.num_sequences == 0


def test_penalties_count_as_a_fresh_history_would(directory: Path) -> None:
    """Counts that are kept from step to step, against the same history sent anew each time."""
    sampling = SamplingParams(
        temperature=0.0, seed=0, repetition_penalty=1.4, frequency_penalty=0.5, ignore_eos=True
    )
    driver = PlanDriver(directory)
    (prompt,) = random_prompts(1, 9, 9)
    job = driver.job(prompt, 12, sampling)
    driver.generate([job])
    for done in range(12):
        output = tuple(job.output[:done])
        new = NewSequence(100 + done, tuple(prompt), output, sampling, 0, (40, 41))
        result = driver.run([prefill(100 + done, 9 + done)], [new]).result
        assert result.tokens[0][0] == job.output[done]
