"""The toy engine's vectors: a function of the text alone, and of every row of it."""

from __future__ import annotations

import math
from array import array

import pytest

from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import ItemKind, NewSequence, StepItem, StepPlan
from xllm.worker.loader.pooling import ModelTask
from xllm.worker.toy.executor import ToyExecutor, make_toy_executor
from xllm.worker.toy.vectors import WIDTH, predict_vector

PROMPT = tuple(range(20, 31))


def run_chunks(toy: ToyExecutor, chunks, pooling: str, start: int = 0, seq: int = 1):
    """The results of PROMPT in such chunks."""
    blocks = tuple(range(-(-len(PROMPT) // 4)))
    new = (NewSequence(seq, PROMPT, (), SamplingParams(), 0, blocks, pooling=pooling),)
    outputs = []
    for step, count in enumerate(chunks, 1):
        item = StepItem(seq, ItemKind.PREFILL, start, count, (), 0)
        outputs.append(toy.execute(StepPlan(step, (item,), new)))
        new, start = (), start + count
    return outputs


def engine(pooling: str, memory: bool = True) -> ToyExecutor:
    return ToyExecutor(num_blocks=16, block_size=4, memory=memory, task=ModelTask("embed", pooling))


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("chunks", [(11,), (4, 4, 3), (1, 9, 1)])
def test_the_vector_is_predicted_whatever_the_chunks(pooling, chunks, memory):
    *others, last = run_chunks(engine(pooling, memory), chunks, pooling)
    assert all(one.result.pooled == () and one.frames == () for one in others)
    assert last.result.pooled == (0,)
    assert last.frames == (predict_vector(PROMPT, pooling, 4, memory),)
    numbers = array("f", last.frames[0])
    assert len(numbers) == WIDTH
    assert math.isclose(math.fsum(x * x for x in numbers), 1, rel_tol=1e-6)


def test_a_row_that_was_not_computed_here_changes_the_mean():
    toy = engine("mean")
    run_chunks(toy, (11,), "mean")
    (again,) = run_chunks(toy, (3,), "mean", start=8, seq=2)
    assert again.frames != (predict_vector(PROMPT, "mean", 4),)


def test_a_foreign_page_changes_the_last_tokens_vector():
    toy = engine("last")
    run_chunks(toy, (8,), "last")
    toy._arena.write((0, 1), 0, (99,))
    (end,) = run_chunks(toy, (3,), "last", start=8, seq=2)
    assert end.frames != (predict_vector(PROMPT, "last", 4),)


def test_no_vector_without_pooling():
    (output,) = run_chunks(engine("last"), (11,), "")
    assert output.result.pooled == ()
    assert output.frames == ()


def test_the_settings_choose_the_task():
    model = ModelSettings(name="toy", task="embed", pooling="mean")
    worker = WorkerSettings(engine="toy", toy_num_blocks=8)
    ready = make_toy_executor(Settings(model=model, worker=worker)).load(lambda done, total: None)
    assert (ready.task, ready.pooling, ready.embedding_size) == ("embed", "mean", WIDTH)
    ready = make_toy_executor(Settings(worker=worker)).load(lambda done, total: None)
    assert (ready.task, ready.pooling, ready.embedding_size) == ("generate", "", 0)
