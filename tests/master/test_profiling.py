"""The steps before serving: what they teach, how long they may take, that they leave nothing."""

import asyncio
import dataclasses

import msgspec
import pytest

from tests.master.test_master_actor import Stage, make_settings
from tests.master.toy_instance import ToyInstance
from xllm.config.served_model import ModelSettings
from xllm.master.actor import MasterActor
from xllm.master.profiling import StartProfile, profile_load
from xllm.master.strategies.step_model import StepShape
from xllm.protocol.bus import InstanceLatency
from xllm.worker.toy.vectors import WIDTH

TOKEN_S, PAIR_S, CONSTANT_S = 2e-4, 1e-7, 5e-3


def true_s(plan) -> float:
    shape = StepShape.of(plan)
    return CONSTANT_S + TOKEN_S * shape.tokens + PAIR_S * shape.pairs


class Profiled(ToyInstance):
    """Runs a profile on a machine with known times."""

    def __init__(self, seconds=100.0, slowness=1.0, **limits) -> None:
        defaults = {"num_blocks": 400, "block_size": 16, "max_model_len": 4000}
        super().__init__(**{**defaults, "max_num_batched_tokens": 2048, **limits})
        self.num_finished = 0
        self.sent = []
        self.slowness = slowness
        self.profile = StartProfile(
            self.scheduler, seconds, self.sent.append, lambda: setattr(self, "num_finished", 1)
        )

    def run_profile(self, fail_at=-1) -> float:
        """Its length, seconds."""
        began = self.now
        self.profile.begin(self.now)
        while self.sent:
            plan = self.sent.pop(0)
            self.plans.append(plan)
            output = self.toy.execute(plan)
            seconds = self.slowness * true_s(plan)
            self.now += seconds
            if plan.step == fail_at:
                self.profile.fail(plan.step, "engine_error", "no", self.now)
                continue
            result = msgspec.structs.replace(output.result, duration_ns=round(1e9 * seconds))
            self.profile.settle(result, output.frames, self.now)
            self.scheduler.check()
        assert self.num_finished
        assert self.scheduler.is_idle
        # No request of a client has waited for anything.
        assert self.scheduler.take_latency() == InstanceLatency()
        return self.now - began


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("strategy", ["chunked", "prefill-first", "zero-evict", "slo-urgency"])
def test_step_times_are_known_before_the_first_request(depth, strategy):
    one = Profiled(max_in_flight=depth, strategy=strategy)
    one.run_profile()
    model = one.scheduler._state.policy.model
    assert model.is_ready
    assert len(one.plans) >= 20
    for start, num in ((0, 100), (0, 700), (512, 200)):
        shape = StepShape()
        shape.add_prefill(start, num)
        want = CONSTANT_S + TOKEN_S * num + PAIR_S * shape.pairs
        assert model.predict(shape) == pytest.approx(want, rel=0.15)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_instance_that_embeds_is_profiled_by_vectors(pooling):
    one = Profiled(task="embed", pooling=pooling, embedding_size=WIDTH)
    one.run_profile()
    items = [item for plan in one.plans for item in plan.items]
    assert len(items) >= 8
    assert all(item.num_samples == 0 for item in items)
    assert one.admit("a", range(10, 40), embed=True, max_tokens=0) is None
    one.run()
    assert one.ended["a", 1].code == ""


def test_some_prompts_are_computed_behind_a_prefix():
    one = Profiled()
    one.run_profile()
    starts = [item.start for plan in one.plans for item in plan.items if item.kind == 0]
    assert max(starts) >= 1008


@pytest.mark.parametrize("slowness", [1.0, 20.0, 1000.0])
def test_it_keeps_its_time(slowness):
    one = Profiled(seconds=1.0, slowness=slowness)
    # One wave may be under way: the first two are small.
    first_s = slowness * 8 * (CONSTANT_S + 16 * TOKEN_S)
    assert one.run_profile() < max(1.5, 2 * first_s)


@pytest.mark.parametrize(
    "limits",
    [
        {"num_blocks": 4, "block_size": 4, "max_model_len": 16},
        {"num_blocks": 40, "block_size": 4, "max_model_len": 150},
        {"num_blocks": 8, "block_size": 16, "max_model_len": 128, "max_num_seqs": 1},
        {"max_num_batched_tokens": 16},
        {"prefix_cache": False},
        {"max_waiting": 1},
    ],
)
def test_small_instances_are_profiled_as_far_as_they_go(limits):
    one = Profiled(**limits)
    one.run_profile()
    one.admit("a", range(10, 14), max_tokens=3)
    one.run()
    one.verify("a")


def test_a_step_that_fails_ends_it():
    one = Profiled()
    one.run_profile(fail_at=3)
    assert len(one.plans) == 3


def test_every_request_of_the_load_fits():
    for block_size in (1, 4, 16, 64):
        for num_blocks in (2, 10, 100):
            tokens = num_blocks * block_size
            one = ToyInstance(
                num_blocks=num_blocks, block_size=block_size, max_model_len=max(4, tokens)
            )
            for wave in profile_load(one.limits):
                for request in wave:
                    assert one.scheduler.admit(request, 0.0) is None


class MeasuredStage(Stage):
    """The master takes the toy engine of its worker for a native one."""

    def __init__(self, run_dir, task: str) -> None:
        settings = make_settings(run_dir)
        worker = dataclasses.replace(settings.worker, toy_num_blocks=1024)
        model = ModelSettings(name="toy", task=task)
        super().__init__(dataclasses.replace(settings, model=model, worker=worker))

    async def start(self) -> None:
        toy = self.settings
        native = dataclasses.replace(toy.worker, engine="native")
        self.settings = dataclasses.replace(toy, worker=native)
        self.master = MasterActor(self.settings, transport=self.transport)
        await self.master.open()
        self.settings = toy
        self.router = self.make_router()
        await self.start_worker()


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_a_master_measures_before_it_serves(run_dir, task):
    async def scenario():
        one = MeasuredStage(run_dir, task)
        await one.start()
        try:
            assert one.master.models[0].scheduler._state.policy.model.is_ready
            assert one.master.models[0].scheduler.is_idle
            embeds = {"embed": True, "max_tokens": 0} if task == "embed" else {}
            one.router.admit("a", range(20, 30), **embeds)
            assert (await one.router.ends("a")).code == ""
        finally:
            await one.close()

    asyncio.run(scenario())
