"""Scheduler and native executor together, in one process: every feature on or off, the tokens
are the model's."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.models import make_model
from tests.worker.native.plan_driver import PlanDriver, random_prompts
from tests.worker.native.reference import assert_greedy, load_reference
from xllm.config.scheduling import SchedulerSettings
from xllm.kvcache.hashing import chain_hashes, root_hash
from xllm.master.limits import InstanceLimits
from xllm.master.scheduler import Scheduler
from xllm.master.strategies.drafts import DraftProposer
from xllm.master.strategies.policy import build_policy
from xllm.protocol.instance import AdmitRequest, RequestEnded
from xllm.protocol.sampling import SamplingParams
from xllm.worker.executor import StepOutput

MODES = {
    "plain": {"strategy": "continuous", "prefix_cache": False, "max_in_flight": 1},
    "chunked": {"strategy": "chunked", "prefix_cache": False, "max_num_batched_tokens": 37},
    "cached": {"strategy": "continuous", "prefix_cache": True},
    "both": {"strategy": "chunked", "prefix_cache": True, "max_num_batched_tokens": 37},
    "few blocks": {"strategy": "chunked", "prefix_cache": True, "num_blocks": 18},
    "no pipeline": {"max_in_flight": 1, "share_prefixes": False},
    "pipeline of 3": {"max_in_flight": 3, "max_num_batched_tokens": 37, "num_blocks": 18},
}


class Instance:
    """One scheduler over one executor; `streams` by (request, choice)."""

    def __init__(
        self,
        directory: Path,
        strategy: str = "chunked",
        kv_memory: str = "xtensor",
        driver: PlanDriver | None = None,
        drafting: str = "none",
        draft_tokens: int = 4,
        proposer: DraftProposer | None = None,
        **limits: Any,
    ) -> None:
        """`proposer`: guesses tokens in place of what `drafting` says."""
        self.driver = driver or PlanDriver(directory, kv_memory=kv_memory)
        ready = self.driver.ready
        bounds = {
            "num_blocks": ready.num_blocks,
            "max_model_len": ready.max_model_len,
            "max_num_batched_tokens": 256,
            "num_slots": ready.num_slots,
            "max_mappings": ready.max_mappings,
            **limits,
        }
        self.limits = InstanceLimits(
            ready.model,
            block_size=ready.block_size,
            vocab_size=ready.vocab_size,
            eos_ids=ready.eos_ids,
            revision=ready.revision,
            **bounds,
        )
        settings = SchedulerSettings(
            strategy=strategy, drafting=drafting, draft_tokens=draft_tokens
        )
        policy = build_policy(settings)
        policy.drafts = proposer or policy.drafts
        self.scheduler = Scheduler(self.limits, policy)
        self.streams: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.ended: dict[str, RequestEnded] = {}
        self.scored: dict[str, list[float]] = {}
        self.in_flight: deque[StepOutput] = deque()
        self.now = 0.0

    def admit(self, request_id: str, prompt: Sequence[int], sampling: SamplingParams) -> None:
        root = root_hash(self.limits.revision)
        hashes = chain_hashes(root, prompt, self.limits.block_size)
        request = AdmitRequest(
            request_id, 1, self.limits.model, tuple(prompt), sampling, hashes, salt=root
        )
        assert self.scheduler.admit(request, self.now) is None

    def step(self) -> bool:
        """Plan and run what may be, then settle the oldest step."""
        self.now += 0.01
        while (plan := self.scheduler.schedule(self.now)) is not None:
            self.in_flight.append(self.driver.executor.execute(plan))
        if not self.in_flight:
            return False
        output = self.in_flight.popleft()
        assert output.result.failed == ()
        outcome = self.scheduler.update(output.result, output.frames, self.now)
        self.scheduler.check()
        for item in outcome.items:
            stream = self.streams.setdefault((item.request_id, item.choice), [])
            assert item.first_index == len(stream)
            stream.extend(item.token_ids)
            found = [entry.logprob for entry in item.logprobs or ()]
            self.logprobs.setdefault((item.request_id, item.choice), []).extend(found)
        for scores in outcome.prompt_scores:
            scored = self.scored.setdefault(scores.request_id, [])
            assert scores.first_position == len(scored) + 1
            scored.extend(entry.logprob for entry in scores.logprobs)
        self.ended.update((ended.request_id, ended) for ended in outcome.ended)
        return True

    def run(self) -> None:
        while self.step():
            pass
        assert self.scheduler.is_idle
        assert all(ended.code == "" for ended in self.ended.values())
        self.driver.executor.check()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen3", tmp_path_factory.mktemp("scheduled"))


def workload(instance: Instance) -> None:
    """Greedy and sampled requests, some with choices, some beginning alike, coming in while
    others run."""
    prefix = random_prompts(1, 50, 50, seed=1)[0]
    for number, prompt in enumerate(random_prompts(8, 1, 60, seed=2)):
        begun = [*prefix, *prompt] if number % 2 else prompt
        greedy = SamplingParams(temperature=0.0, seed=0, max_tokens=30, ignore_eos=True)
        instance.admit(f"greedy-{number}", begun, greedy)
        sampled = SamplingParams(
            seed=number, max_tokens=20, ignore_eos=True, n=1 + number % 3, logprobs=2
        )
        instance.admit(f"sampled-{number}", begun[:100], sampled)
        for _ in range(3):
            instance.step()
    instance.run()


@pytest.fixture(scope="module")
def plain_streams(directory: Path) -> dict[tuple[str, int], list[int]]:
    instance = Instance(directory, **MODES["plain"])
    workload(instance)
    return instance.streams


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_models_tokens(
    directory: Path, mode: str, plain_streams: dict[tuple[str, int], list[int]]
) -> None:
    instance = Instance(directory, **MODES[mode])
    workload(instance)
    assert len(instance.streams) == 8 + (3 * 1 + 3 * 2 + 2 * 3)
    # Sampled tokens as well: noise and position are the same wherever a step ended.
    assert instance.streams == plain_streams
    cached = sum(ended.cached_tokens for ended in instance.ended.values())
    assert (cached > 0) == instance.limits.prefix_cache
    if "num_blocks" in MODES[mode]:
        assert instance.scheduler.statistics().num_preemptions > 0


def test_the_plain_mode_is_right(
    directory: Path, plain_streams: dict[tuple[str, int], list[int]]
) -> None:
    reference = load_reference(directory)
    prefix = random_prompts(1, 50, 50, seed=1)[0]
    for number, prompt in enumerate(random_prompts(8, 1, 60, seed=2)):
        begun = [*prefix, *prompt] if number % 2 else prompt
        assert_greedy(reference, begun, plain_streams[f"greedy-{number}", 0])


def test_what_depends_on_the_history_is_the_same_with_the_pipeline(directory: Path) -> None:
    """Penalties, bias, min_tokens, stop ids and logprobs look at tokens that the master does not
    know yet when it plans the step."""
    prompts = random_prompts(6, 4, 30, seed=9)
    found = []
    for depth in (1, 2, 3):
        instance = Instance(directory, max_in_flight=depth, num_blocks=24)
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(
                seed=number,
                temperature=0.0 if number % 2 else 1.0,
                max_tokens=24,
                min_tokens=3 * (number % 3),
                repetition_penalty=1.3,
                presence_penalty=0.5,
                frequency_penalty=0.4,
                stop_token_ids=tuple(range(number, instance.limits.vocab_size, 7)),
                logprobs=1,
            )
            instance.admit(f"r{number}", prompt, sampling)
            instance.step()
        instance.run()
        found.append((instance.streams, set(instance.ended)))
    assert found[0] == found[1] == found[2]
    lengths = {len(stream) for stream in found[0][0].values()}
    assert min(lengths) < 24


def test_choices_differ(plain_streams: dict[tuple[str, int], list[int]]) -> None:
    for number in range(8):
        choices = [plain_streams[f"sampled-{number}", k] for k in range(1 + number % 3)]
        assert len({tuple(choice) for choice in choices}) == len(choices)


def test_prompt_scores_reach_every_position(directory: Path) -> None:
    """In chunks smaller than the prompts, beside others, and after the same prompt was cached."""
    prompts = random_prompts(3, 60, 90, seed=4)
    want: dict[str, list[float]] = {}
    for mode in ("plain", "both"):
        instance = Instance(directory, **MODES[mode])
        for name in ("first", "second"):
            for number, prompt in enumerate(prompts):
                sampling = SamplingParams(seed=1, max_tokens=2, prompt_logprobs=1, ignore_eos=True)
                instance.admit(f"{name}-{number}", prompt, sampling)
            instance.run()
        for number, prompt in enumerate(prompts):
            for name in ("first", "second"):
                found = instance.scored[f"{name}-{number}"]
                assert len(found) == len(prompt) - 1
                assert found == pytest.approx(want.setdefault(f"first-{number}", found), abs=1e-4)


def test_windows_survive_the_prefix_cache(tmp_path: Path) -> None:
    """A windowed model, prompts longer than its window, cached prefixes."""
    directory = make_model("mistral-window", tmp_path)
    streams = []
    for mode in ("plain", "both"):
        instance = Instance(directory, **MODES[mode])
        workload(instance)
        streams.append(instance.streams)
    assert streams[0] == streams[1]
