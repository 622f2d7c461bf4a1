"""The engine on a GPU: the tokens and log-probabilities of a CPU in fp32, for every family; graphs,
eager steps and the pipeline alike; and no more memory than the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.models import FAMILIES, make_model
from tests.worker.device.test_device_executor import LaunchedInstance, sampling_of, serve
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.test_native_scheduler import Instance
from xllm.cli.model_source import demo_model_path
from xllm.worker.execution.native import NativeExecutor
from xllm.worker.graphs.choice import GraphMode

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-3
"""Between log-probabilities in fp32 of two devices: sums are taken in other orders."""


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")


def on(directory: Path, device: str, **worker: Any) -> LaunchedInstance:
    """An instance in fp32, with memory for a few sequences."""
    fields: dict[str, Any] = {"device": device, "dtype": "float32", "kv_cache_bytes": 1 << 28}
    return LaunchedInstance(directory, PlanDriver(directory, **{**fields, **worker}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_a_cpu(family, tmp_path):
    directory = make_model(family, tmp_path)
    wanted = on(directory, "cpu")
    found = on(directory, "cuda")
    assert serve(found, "host") == serve(wanted, "host")
    for name, scores in wanted.scored.items():
        assert found.scored[name] == pytest.approx(scores, abs=TOLERANCE)
    for instance in (wanted, found):
        instance.close()


@pytest.mark.parametrize("worker", [{}, {"graph_max_batch": 0, "graph_max_rows": 0}])
def test_the_demo_model_gives_the_tokens_of_a_cpu(worker):
    directory = Path(demo_model_path())
    streams = []
    for device, more in (("cpu", {}), ("cuda", worker)):
        instance = on(directory, device, **more)
        streams.append(serve(instance))
        if device == "cuda":
            used = instance.found.by_mode
            assert bool(used[GraphMode.FULL]) == (not worker)
        instance.close()
    assert streams[0] == streams[1]


def test_steps_are_under_way_while_others_are_launched(tmp_path):
    instance = on(make_model("qwen3", tmp_path), "cuda")
    assert isinstance(instance, Instance)
    for number, prompt in enumerate(random_prompts(4, 20, 60, seed=1)):
        instance.admit(f"r{number}", prompt, sampling_of(number, "device"))
    instance.run()
    assert instance.most_under_way > 1
    assert instance.found.num_host_draws == 0
    instance.close()


def test_the_peak_of_memory_is_within_a_twentieth_of_the_plan(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    directory = Path(demo_model_path())
    driver = PlanDriver(directory, device="cuda", dtype="bfloat16", kv_cache_bytes=4 << 30)
    instance = LaunchedInstance(directory, driver)
    serve(instance)
    executor = driver.executor
    assert isinstance(executor, NativeExecutor)
    found = executor.statistics()
    assert found.plan is not None
    # Blocks come from the driver, all else from torch.
    peak = torch.cuda.max_memory_reserved() + found.pool.total_bytes
    assert peak <= 1.05 * found.plan.total_bytes
    instance.close()
