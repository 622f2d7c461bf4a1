"""Slots against block tables in the native engine: the same tokens, whatever happens to them."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import GREEDY, PlanDriver, random_prompts
from tests.worker.native.test_native_scheduler import Instance
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.step import MapPages, NewSequence
from xllm.worker.executor import StepOutput

FEW_MAPPINGS = {"max_model_len": 200, "max_mappings": 20}
MODES: dict[str, dict[str, Any]] = {
    "as is": {},
    "chunked": {"max_num_batched_tokens": 37},
    "no cache": {"prefix_cache": False},
    "no pipeline": {"max_in_flight": 1},
    "few blocks": {"num_blocks": 18},
    "few slots": {"num_slots": 3},
    "few mappings": FEW_MAPPINGS,
    "few of all": {"num_blocks": 30, "num_slots": 4, "max_num_batched_tokens": 37, **FEW_MAPPINGS},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("slots"))


class OverlappedInstance(Instance):
    """Plans arrive while those before them run on another thread, as in a worker."""

    def __init__(self, directory: Path, **limits: Any) -> None:
        super().__init__(directory, **limits)
        self.engine = ThreadPoolExecutor(1)
        self.running: deque[Future[StepOutput]] = deque()

    def step(self) -> bool:
        executor = self.driver.executor
        while (plan := self.scheduler.schedule(self.now + 0.01)) is not None:
            executor.arrive(plan)
            self.running.append(self.engine.submit(executor.execute, plan))
        if self.running:
            self.in_flight.append(self.running.popleft().result())
        return super().step()


def check_slots(instance: Instance) -> None:
    """Every running sequence reads in its slot what the pool has in its blocks."""
    engine = instance.driver.executor._engine
    assert engine is not None
    mapper, memory = engine.mapper, engine.pool
    assert mapper is not None
    size, tokens = memory.layout.block_bytes, memory.layout.block_size
    state = instance.scheduler._state
    untold = {fork.child for fork in state.pending_forks}
    for seq in (*state.decoding, *state.prefilling):
        if seq in untold:
            continue
        for index, block in enumerate(seq.block_ids[: -(-seq.num_computed // tokens)]):
            want = ctypes.string_at(memory.pool_address + block * size, size)
            assert ctypes.string_at(mapper.address(seq.slot) + index * size, size) == want


def run(instance: Instance, seed: int, aborts: bool) -> set[tuple[str, int]]:
    """Requests that come in while others run: some begin alike, some are drawn, some have choices;
    some are cancelled, or a choice of them is: which, as (name, choice)."""
    rng = random.Random(seed)
    prefix = random_prompts(1, 50, 50, seed=seed)[0]
    open_requests: list[tuple[str, int]] = []
    cancelled: set[tuple[str, int]] = set()
    for number, prompt in enumerate(random_prompts(9, 1, 60, seed=seed + 1)):
        n = 1 + number % 3
        sampling = SamplingParams(
            temperature=float(number % 2), seed=number, max_tokens=25, n=n, ignore_eos=True
        )
        instance.admit(f"r{number}", [*prefix, *prompt] if number % 4 else prompt, sampling)
        open_requests += [(f"r{number}", choice) for choice in range(n)]
        for _ in range(rng.randrange(4)):
            instance.step()
            if instance.limits.num_slots and not isinstance(instance, OverlappedInstance):
                check_slots(instance)
        if aborts and rng.random() < 0.6:
            name, choice = rng.choice(open_requests)
            whole = rng.random() < 0.5
            instance.scheduler.cancel(name, 1, -1 if whole else choice)
            cancelled |= {one for one in open_requests if one[0] == name} if whole else set()
            cancelled.add((name, choice))
    instance.run()
    return cancelled


@pytest.fixture(scope="module")
def by_tables(directory: Path) -> dict[int, dict[tuple[str, int], list[int]]]:
    """What each seed's requests say in an engine without slots that is never short of anything."""
    streams = {}
    for seed in (1, 2):
        instance = Instance(directory, kv_memory="paged", prefix_cache=False, max_in_flight=1)
        assert instance.limits.num_slots == 0
        run(instance, seed, aborts=False)
        streams[seed] = instance.streams
    return streams


@pytest.mark.parametrize(
    ("mode", "seed"), [*((mode, 1) for mode in MODES), ("as is", 2), ("few blocks", 2)]
)
def test_slots_give_the_tokens_of_block_tables(
    directory: Path, mode: str, seed: int, by_tables: dict[int, dict[tuple[str, int], list[int]]]
) -> None:
    instance = Instance(directory, **MODES[mode])
    cancelled = run(instance, seed, aborts=True)
    assert cancelled
    want = by_tables[seed]
    for key, stream in want.items():
        found = instance.streams.get(key, [])
        assert found == (stream[: len(found)] if key in cancelled else stream)
    statistics = instance.scheduler.statistics()
    assert statistics.num_available_blocks == statistics.num_blocks
    if mode == "few blocks":
        assert statistics.num_preemptions > 0
    slots = statistics.slots
    assert slots is not None
    assert slots.num_mappings <= slots.max_mappings
    if mode == "few mappings":
        assert slots.num_reclaimed > 0
    if instance.limits.prefix_cache:
        assert any(ended.cached_tokens for ended in instance.ended.values())
    mapper = instance.driver.executor.statistics().mapper
    assert mapper is not None
    assert mapper.num_ahead > 0
    assert mapper.num_steps_waited < mapper.num_steps


@pytest.mark.parametrize("mode", ["as is", "no pipeline", "few blocks", "few of all"])
def test_maps_that_begin_early_change_no_token(
    directory: Path, mode: str, by_tables: dict[int, dict[tuple[str, int], list[int]]]
) -> None:
    instance = OverlappedInstance(directory, **MODES[mode])
    with instance.engine:
        cancelled = run(instance, 1, aborts=True)
    for key, stream in by_tables[1].items():
        found = instance.streams.get(key, [])
        assert found == (stream[: len(found)] if key in cancelled else stream)
    mapper = instance.driver.executor.statistics().mapper
    assert mapper is not None
    assert mapper.num_ahead > 0


def test_a_sequence_whose_pages_are_not_mapped_fails_alone(directory: Path) -> None:
    driver = PlanDriver(directory)
    jobs = [driver.job(prompt) for prompt in random_prompts(2, 40, 40)]
    news: list[NewSequence] = [
        msgspec.structs.replace(new, slot=slot) for slot, new in enumerate(driver.news(jobs))
    ]
    maps = (MapPages(0, 0, tuple(jobs[0].blocks)), MapPages(1, 0, tuple(jobs[1].blocks[:2])))
    items = [driver.item(job, 64) for job in jobs]
    output = driver.run(items, news, maps=maps)
    reason = f"sequence {jobs[1].seq}: slot 1: 3 pages are needed and not mapped"
    assert output.result.failed == ((1, reason),)
    assert len(output.result.tokens[0]) == 1


def test_a_new_master_finds_nothing_mapped(directory: Path) -> None:
    instance = Instance(directory)
    instance.admit("a", random_prompts(1, 40, 40)[0], GREEDY)
    for _ in range(3):
        instance.step()
    executor = instance.driver.executor
    before = executor.statistics().mapper
    assert before is not None
    assert before.slots.num_mapped_pages > 0
    executor.load(lambda done, total: None)
    after = executor.statistics().mapper
    assert after is not None
    assert after.slots.num_mapped_pages == 0
    job = instance.driver.job([5, 6, 7])
    (new,) = instance.driver.news([job])
    output = instance.driver.run(
        [instance.driver.item(job, 64)], [msgspec.structs.replace(new, slot=0)]
    )
    assert "1 pages are needed and not mapped" in output.result.failed[0][1]


def test_block_tables_alone(directory: Path) -> None:
    driver = PlanDriver(directory, kv_memory="paged")
    assert (driver.ready.num_slots, driver.ready.max_mappings) == (0, 0)
    assert driver.executor.statistics().mapper is None
