"""Several toy models over one pool of pages: each has its own streams, and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.shared_models import SharedModels
from xllm.config.master import MasterSettings
from xllm.config.models import each_model, join_models
from xllm.config.scheduling import SchedulerSettings
from xllm.config.served_model import ModelSettings
from xllm.config.settings import Settings
from xllm.config.worker import WorkerSettings
from xllm.errors import ConfigError, EngineError
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import StepPlan
from xllm.worker.factory import make_executor
from xllm.worker.toy.stream import predict


def sampling(num: int) -> SamplingParams:
    return SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True, seed=3)


def toys(names: str = "a,b", num_blocks: int = 64, **scheduler: object) -> SharedModels:
    first, _, more = names.partition(",")
    asked = SchedulerSettings(max_num_batched_tokens=64, **scheduler)
    model = ModelSettings(name=first, more=more, max_model_len=160)
    worker = WorkerSettings(engine="toy", toy_num_blocks=num_blocks)
    executor = make_executor(Settings(model=model, scheduler=asked, worker=worker))
    return SharedModels(executor, asked, 2 if asked.async_scheduling else 1)


def prompt(seed: int, length: int) -> list[int]:
    return [300 + (seed * 31 + i * 7) % 700 for i in range(length)]


def expect(models: SharedModels, model: str, name: str, ids: list[int], num: int) -> None:
    vocabulary = models.executor._models[model].token_ids
    assert models.streams[model, name, 0] == predict(ids, sampling(num), 0, num, vocabulary)


@pytest.mark.parametrize("is_async", [True, False])
def test_two_models_are_served_at_once(is_async: bool) -> None:
    models = toys(async_scheduling=is_async)
    for seed in range(4):
        for model in ("a", "b"):
            models.admit(model, str(seed), prompt(seed, 20 + 9 * seed), sampling(30))
    models.run()
    for seed in range(4):
        for model in ("a", "b"):
            expect(models, model, str(seed), prompt(seed, 20 + 9 * seed), 30)
    # Steps take the same time here: they take turns.
    turns = models.order[:40]
    assert abs(turns.count("a") - turns.count("b")) <= 2


def test_a_model_takes_pages_that_another_has_cached() -> None:
    models = toys(num_blocks=12)
    models.admit("a", "first", prompt(1, 150), sampling(8))
    models.run()
    assert models.memory.models["a"].cache.pool.num_kept >= 9
    models.admit("b", "second", prompt(2, 140), sampling(8))
    models.run()
    expect(models, "b", "second", prompt(2, 140), 8)
    assert models.schedulers["a"].statistics().num_evictions > 0


def test_a_long_prompt_gets_its_pages_from_a_model_that_is_never_idle() -> None:
    """a has more than the pool holds, all the time; b needs nearly all of it, once."""
    models = toys(num_blocks=12)
    for seed in range(30):
        models.admit("a", str(seed), prompt(seed, 40), sampling(20))
    for _ in range(10):
        models.step()
    models.admit("b", "long", prompt(99, 145), sampling(10))
    while ("b", "long") not in models.ended:
        assert models.step()
    assert len(models.ended) < 20  # of 31: it did not have to wait for the others
    models.run()
    expect(models, "b", "long", prompt(99, 145), 10)
    for seed in range(30):
        expect(models, "a", str(seed), prompt(seed, 40), 20)


def test_who_sleeps_gives_its_pages_and_wakes_again() -> None:
    models = toys(num_blocks=16)
    models.admit("a", "one", prompt(1, 50), sampling(5))
    models.run()
    models.sleep("a", drop_weights=True)
    models.memory.check()
    assert models.memory.pages.num_free == 16
    with pytest.raises(EngineError, match="sleeps"):
        models.executor.execute(StepPlan(99, model="a"))
    models.admit("b", "two", prompt(2, 150), sampling(8))
    models.run()
    models.wake("a")
    models.admit("a", "three", prompt(1, 50), sampling(5))
    models.run()
    expect(models, "a", "three", prompt(1, 50), 5)
    with pytest.raises(EngineError, match="no model 'c'"):
        models.executor.execute(StepPlan(100, model="c"))


REQUEST = st.tuples(
    st.sampled_from(["a", "b", "c"]), st.integers(1, 120), st.integers(1, 30), st.integers(0, 5)
)


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=14),
    num_blocks=st.integers(10, 30),
    strategy=st.sampled_from(["chunked", "continuous", "zero-evict"]),
    is_async=st.booleans(),
    slots=st.integers(2, 8),
)
def test_any_load_of_three_models_ends_as_each_would_alone(
    requests: list[tuple[str, int, int, int]],
    num_blocks: int,
    strategy: str,
    is_async: bool,
    slots: int,
) -> None:
    models = toys(
        "a,b,c",
        num_blocks,
        strategy=strategy,
        async_scheduling=is_async,
        max_num_seqs=slots,
    )
    for index, (model, length, num, pause) in enumerate(requests):
        models.admit(model, str(index), prompt(index, length), sampling(num))
        for _ in range(pause):
            models.step()
    models.run()
    for index, (model, length, num, _) in enumerate(requests):
        expect(models, model, str(index), prompt(index, length), num)
    for one in models.executor._models.values():
        assert one.statistics().pages.pages_broken == 0


def test_names_of_further_models() -> None:
    base = Settings(model=ModelSettings(path="/models/one", more="/models/two/, x=/models/one"))
    names = [(one.model.name, one.model.path) for one in each_model(base)]
    assert names == [("one", "/models/one"), ("two", "/models/two/"), ("x", "/models/one")]
    assert [one.model.name for one in each_model(join_models(each_model(base)))] == [
        "one", "two", "x",
    ]  # fmt: skip
    for more, words in (("", ""), ("/a/one", "two models"), ("b=", "names no model")):
        asked = Settings(model=ModelSettings(path="/models/one", more=more))
        if not words:
            assert each_model(asked) == (asked,)
            continue
        with pytest.raises(ConfigError, match=words):
            each_model(asked)
    ranks = Settings(model=base.model, master=MasterSettings(num_workers=2))
    with pytest.raises(ConfigError, match="share one worker"):
        each_model(ranks)
