"""What captured graphs take of the device is measured before there is memory for KV: the plan has
it, and KV gets what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.models import make_model
from tests.worker.device.interpreted import InterpretedPlatform, interpreted_driver
from tests.worker.graphs.fake_graphs import FakeGraphs
from tests.worker.native.plan_driver import PlanDriver
from tests.worker.platform.host_device import HostDevice
from xllm.errors import ConfigError
from xllm.worker.execution.device import runner
from xllm.worker.execution.device.runner import MAX_GRAPHS
from xllm.worker.execution.device.stretch import StretchTensors
from xllm.worker.execution.native import NativeExecutor, NativeStatistics
from xllm.worker.graphs.choice import GraphKey, GraphMode
from xllm.worker.platform.platform import DeviceMemory

TOTAL = 56 << 20
EACH = 100 << 10
POOL = 3 << 20


class HungryGraphs(FakeGraphs):
    """Their driver takes memory for each of them; the first one takes what they share, too."""

    def __init__(self, each_bytes: int) -> None:
        super().__init__()
        self.each_bytes = each_bytes

    @property
    def taken_bytes(self) -> int:
        graphs = self.open_graphs()
        return self.each_bytes * len(graphs) + POOL * bool(graphs)


class SmallDevice(InterpretedPlatform):
    """A device that has little, and counts all of it but what steps compute with."""

    def __init__(self, each_bytes: int) -> None:
        super().__init__()
        self.host = HostDevice(total_bytes=TOTAL)
        self.graph_device = self.hungry = HungryGraphs(each_bytes)
        self.between_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self.host.used_bytes + self.hungry.taken_bytes + self.between_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(TOTAL - self.used_bytes, TOTAL)

    def kv_budget(self) -> int:
        return self.memory().free_bytes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("graphs"))


def engine(monkeypatch, directory: Path, platform: SmallDevice, **worker) -> PlanDriver:

    class Counted(StretchTensors):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            platform.between_bytes = self.num_bytes

    monkeypatch.setattr(f"{runner.__name__}.StretchTensors", Counted)
    fields = {"kv_cache_bytes": 0, "graph_max_batch": 8, **worker}
    return interpreted_driver(monkeypatch, directory, platform, **fields)


def statistics(driver: PlanDriver) -> NativeStatistics:
    assert isinstance(driver.executor, NativeExecutor)
    return driver.executor.statistics()


def test_kv_gives_way_to_graphs(monkeypatch, directory) -> None:
    plans = []
    for each in (0, EACH):
        driver = engine(monkeypatch, directory, SmallDevice(each))
        found = statistics(driver)
        assert found.plan is not None
        plans.append((found.plan, found.pool.total_bytes))
        driver.executor.close()
    (plain, much), (hungry, less) = plans
    assert hungry.graph_bytes - plain.graph_bytes == EACH * MAX_GRAPHS
    assert hungry.activation_bytes == plain.activation_bytes
    block = 24576
    assert much > less > 0
    assert much - less <= EACH * MAX_GRAPHS + block
    assert much - less + block >= EACH * MAX_GRAPHS
    for plan, kv_bytes in plans:
        assert plan.kv_bytes == kv_bytes
        # The weights are in the host's memory here, not in the device's.
        assert TOTAL - block < plan.total_bytes - plan.weight_bytes <= TOTAL


def test_what_is_captured_later_was_planned(monkeypatch, directory) -> None:
    platform = SmallDevice(EACH)
    driver = engine(monkeypatch, directory, platform)
    found = statistics(driver)
    executor = driver.executor
    assert isinstance(executor, NativeExecutor)
    assert executor._engine is not None
    device = executor._engine.device
    assert device is not None
    assert found.device is not None
    assert found.device.graphs is not None
    assert found.plan is not None
    # As many other kinds as are kept, and more.
    graphs = device._runner._graphs
    assert graphs is not None
    for number in range(MAX_GRAPHS + 10):
        assert graphs.run(GraphKey(GraphMode.PARTIAL, 1000 + number), lambda: None)
    taken = platform.hungry.taken_bytes
    assert taken == EACH * MAX_GRAPHS + POOL
    planned = found.plan.graph_bytes + found.plan.kv_bytes
    assert taken + platform.between_bytes + found.plan.kv_bytes <= planned
    assert platform.used_bytes + found.plan.activation_bytes <= TOTAL
    executor.close()
    assert platform.host.used_bytes == platform.hungry.taken_bytes == 0


def test_more_kv_than_graphs_leave_is_refused_and_the_graphs_are_given_up(
    monkeypatch, directory
) -> None:
    platform = SmallDevice(EACH)
    with pytest.raises(ConfigError, match=r"worker\.kv_cache_bytes"):
        engine(monkeypatch, directory, platform, kv_cache_bytes=TOTAL + 1)
    assert platform.host.used_bytes == 0
    assert not platform.hungry.open_graphs()
    starved = SmallDevice(1 << 20)
    with pytest.raises(ConfigError, match=r"worker\.kv_cache_bytes: 0 bytes hold 0 blocks"):
        engine(monkeypatch, directory, starved)
    assert starved.host.used_bytes == starved.hungry.taken_bytes == 0


def test_without_graphs_nothing_is_set_aside_for_them(monkeypatch, directory) -> None:
    driver = engine(monkeypatch, directory, SmallDevice(EACH), graph_max_batch=0, graph_max_rows=0)
    plan = statistics(driver).plan
    assert plan is not None
    assert plan.graph_bytes == 0
    driver.executor.close()
